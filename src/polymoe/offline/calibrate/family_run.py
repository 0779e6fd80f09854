"""The variants' own forward passes over their texts, in step, stopped at every layer of experts.

The network is the stock transformers definition of any architecture that polymoe serves; nothing is rewritten. Each
variant runs in a thread of its own, of which one moves at a time: to the next experts module, where it leaves what was
routed and waits until the caller says what the experts put out. A decoder layer's other weights are read when the
layer is entered and dropped when it is left, so one layer of each variant is in memory.

    run.arrive() -> [Routed of each variant]  ──  caller decides  ──>  run.proceed([outputs])  ->  next layer

An encoder–decoder model runs its encoder over inputs, then its decoder over windows (teacher forcing): layers of the
encoder come first, each with the tokens of its own stack.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from polymoe.errors import CheckpointError
from polymoe.model.stock.kind import kind_of
from polymoe.model.stock.skeleton import accepts_logits_to_keep, build_skeleton, set_weight
from polymoe.offline.calibrate.kind import calibrated
from polymoe.offline.calibrate.token_rows import TokenRows
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.family import Family


@dataclass(frozen=True, eq=False)
class Routed:
    """What reached one variant's experts of a layer. T tokens (rows flattened, without padding), K experts a token.

    module: the stock experts module (without weights), for its activation and layout flags.
    hidden: float32 [T, H]. index: int64 [T, K], -1 for a token beyond its expert's capacity. gate: float32 [T, K].
    """

    module: Any
    hidden: Tensor
    index: Tensor
    gate: Tensor

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """(int64 [t] rows of `hidden`, float32 [t] gates) of the tokens that were routed to `expert`."""
        token, place = torch.where(self.index == expert)
        return token, self.gate[token, place].float()


class FamilyRun:
    """One pass of every variant over `texts[v]`. Use as a context manager.

    `logits_of[v]`: rows of `texts[v]` whose logits `logits()` is to give, at every `logits_stride`-th token.
    """

    def __init__(
        self,
        family: Family,
        texts: Sequence[TokenRows],
        logits_of: Sequence[Sequence[int]] | None = None,
        logits_stride: int = 1,
    ) -> None:
        self.num_layers = family.architecture.num_layers
        self.arrived = 0  # layers
        rows = logits_of or [()] * len(texts)
        self._lanes = [
            _Lane(checkpoint, text, list(keep), logits_stride)
            for checkpoint, text, keep in zip(family.checkpoints, texts, rows, strict=True)
        ]
        self._answers: Sequence[Tensor | None] = [None] * len(self._lanes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._lanes:
            lane.stop()

    def model(self, variant: int) -> Any:
        """The stock model that runs for `variant`; its weights are there while a layer needs them."""
        return self._lanes[variant].model

    def arrive(self) -> list[Routed]:
        """What reaches the experts of the next layer, in each variant. Raises `CheckpointError` for NaN or infinity."""
        assert self.arrived < self.num_layers, "all layers were visited"
        found = [lane.move(answer) for lane, answer in zip(self._lanes, self._answers, strict=True)]
        for lane, routed in zip(self._lanes, found, strict=True):
            assert isinstance(routed, Routed)
            if not bool(torch.isfinite(routed.hidden).all() & torch.isfinite(routed.gate).all()):
                raise CheckpointError(
                    f"{lane.checkpoint.path}: the input of expert layer {self.arrived} "
                    f"({lane.checkpoint.architecture.expert_modules[self.arrived]}) has NaN or infinite values on "
                    f"the calibration text of {lane.checkpoint.name}."
                )
        self.arrived += 1
        return [routed for routed in found if isinstance(routed, Routed)]

    def proceed(self, outputs: Sequence[Tensor]) -> None:
        """The experts' weighted sum [T, H] of each variant for the layer that was arrived at."""
        self._answers = outputs

    def logits(self) -> list[Tensor]:
        """float32 [tokens, vocabulary] of each variant, row after row without padding, after the last layer."""
        assert self.arrived == self.num_layers
        found = [lane.move(answer) for lane, answer in zip(self._lanes, self._answers, strict=True)]
        return [logits for logits in found if isinstance(logits, Tensor)]


class _Stopped(BaseException):
    """Ends a lane that nobody waits for any more."""


class _Lane:
    """One variant's forward pass in a thread that only moves while `move` waits."""

    def __init__(self, checkpoint: Checkpoint, text: TokenRows, keep: list[int], stride: int) -> None:
        self.checkpoint, self.text, self.keep, self.stride = checkpoint, text, keep, stride
        self._to_lane: queue.Queue[Any] = queue.Queue()
        self._from_lane: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=f"polymoe-{checkpoint.name}", daemon=True)
        self._started = False
        self.model = _streamed_model(checkpoint, self)

    def move(self, answer: Tensor | None) -> Routed | Tensor:
        """Run to the next experts module or, after the last, to the logits."""
        if self._started:
            self._to_lane.put(answer)
        else:
            self._started = True
            self._thread.start()
        found = self._from_lane.get()
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, Routed | Tensor)
        return found

    def stop(self) -> None:
        if self._started and self._thread.is_alive():
            self._to_lane.put(_Stopped())
            self._thread.join()

    def experts(self, module: Any, real: Tensor, hidden: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """Called by the model in the lane's thread. `real` bool [T]: the tokens that are no padding."""
        self._from_lane.put(Routed(module, hidden[real], index[real].long(), gate[real].float()))
        answer = self._to_lane.get()
        if isinstance(answer, _Stopped):
            raise answer
        assert isinstance(answer, Tensor)
        out = torch.zeros_like(hidden)
        out[real] = answer.to(hidden.dtype)
        return out

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._from_lane.put(self._logits(self.model))
        except _Stopped:
            pass
        except BaseException as error:  # the caller's thread raises it
            self._from_lane.put(error)

    def _logits(self, model: Any) -> Tensor:
        def keep_rows(_module: Any, _args: Any, output: Any) -> Any:
            wanted = self.text.real()[self.keep][:, :: self.stride]
            output.last_hidden_state = output.last_hidden_state[self.keep][:, :: self.stride][wanted][None]
            return output

        kind_of(model.config).trunk(model).register_forward_hook(keep_rows)
        extra = {"logits_to_keep": 0} if accepts_logits_to_keep(model) else {}
        logits: Tensor = model(**self.text.model_arguments(), use_cache=False, **extra).logits[0].float()
        return logits


@dataclass(frozen=True, eq=False)
class _Stopping:
    """Stands where the expert pool stands in a served model. `real` bool [T]: the tokens that are no padding."""

    lane: _Lane
    real: Tensor

    def forward(self, module: Any, hidden: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """`gate [T, K]` is 0 for tokens beyond their expert's capacity, which no expert sees."""
        return self.lane.experts(module, self.real, hidden, index.masked_fill(gate == 0, -1), gate)


def _streamed_model(checkpoint: Checkpoint, lane: _Lane) -> Any:
    """The stock model in float32 whose weights, but for experts, come and go with the modules that need them."""
    info, kind = checkpoint.architecture, kind_of(checkpoint.config)
    model_class: Any = kind.classes[type(checkpoint.config)]
    if not hasattr(model_class, "_supports_sdpa"):  # several classes for one config: AutoModel builds the first
        model_class = model_class[0]
    model: Any = build_skeleton(checkpoint.config, calibrated(checkpoint.config).attention(model_class))
    kind.as_generated(model)
    for path in info.expert_modules:
        real = lane.text.real(kind.in_encoder(path)).flatten()
        model.get_submodule(path).polymoe_experts = _Stopping(lane, real)
    experts = {f"{path}.{tensor}" for path in info.expert_modules for tensor in info.expert_shapes}
    names = [name for name in model.state_dict() if name not in experts]
    for path, owned in _units(info.expert_modules, names).items():
        load, drop = _loader(checkpoint, model, owned)
        module = model.get_submodule(path)
        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)
    return model


def _units(expert_modules: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """{module path: the weights it brings}: a whole decoder layer, or for what lies outside of them each module."""
    lists = {match[1] for path in expert_modules if (match := re.match(r"(.*?)\.\d+\.", path))}
    units: dict[str, list[str]] = {}
    for name in names:
        inside = next((root for root in lists if re.match(rf"{re.escape(root)}\.\d+\.", name)), None)
        path = name.rpartition(".")[0] if inside is None else ".".join(name.split(".")[: inside.count(".") + 2])
        units.setdefault(path, []).append(name)
    return units


def _loader(
    checkpoint: Checkpoint, model: Any, names: Sequence[str]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that put the weights `names` into the model, and take them out again."""

    def load(*_args: Any) -> None:
        for name in names:
            value = checkpoint.tensor(checkpoint.tied.get(name, name))
            set_weight(model, name, value.float() if value.is_floating_point() else value)

    def drop(*_args: Any) -> None:
        for name in names:
            path, _, leaf = name.rpartition(".")
            set_weight(model, name, getattr(model.get_submodule(path), leaf).detach().to("meta"))

    return load, drop
