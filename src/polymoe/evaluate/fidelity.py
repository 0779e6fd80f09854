"""How far a served variant is from its original: KL divergence, top-1 agreement and perplexities on a text.

The original runs in transformers, alone, from its own checkpoint; the served one in the engine, all variants mixed in
one batch. Both in float32 unless asked otherwise, so that the figures measure the plan and not rounding. Of an
encoder–decoder model the decoder's tokens are measured, each after the target's own tokens before it.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from polymoe.bundle.manifest import Fidelity
from polymoe.engine.core import EngineCore
from polymoe.errors import PolymoeError
from polymoe.model.stock.kind import kind_of
from polymoe.offline.checkpoint.place import Place


@dataclass(frozen=True)
class Samples:
    """Token ids that a variant is measured on.

    windows: every token but the first of each is predicted.
    inputs: of an encoder–decoder family, what the encoder reads for each window, which is then the decoder's.
    """

    windows: list[list[int]]
    inputs: list[list[int]] | None = None

    @property
    def longest(self) -> int:
        """What `max_model_len` must be: an encoder and its decoder have half of it each."""
        longest = max(len(window) for window in self.windows)
        return longest if self.inputs is None else 2 * max(longest, *(len(read) for read in self.inputs))


def windows_of(token_ids: list[int], length: int, limit: int | None) -> list[list[int]]:
    """Non-overlapping windows of `length` tokens, at most `limit`; a rest shorter than two tokens is left out.

    |-- window --|-- window --|-- rest --|     the first token of a window is context only
    """
    windows = [token_ids[i : i + length] for i in range(0, len(token_ids), length)]
    return [w for w in windows if len(w) >= 2][:limit]


class OriginalModel:
    """A checkpoint in stock transformers. `spec`: its folder, or BASE+CHANGE."""

    def __init__(self, spec: str | Path, dtype: torch.dtype, device: torch.device) -> None:
        model = _stock_model(Place.find(spec), dtype)
        self.model: Any = model.to(device).eval()
        self.device = device
        kind_of(model.config).as_generated(self.model)

    @torch.inference_mode()
    def logits(self, windows: list[list[int]], inputs: list[list[int]] | None = None) -> list[torch.Tensor]:
        """float32 `[tokens, vocabulary]` for each window. `inputs`: what an encoder reads for each."""
        if inputs is not None:
            decoder = padded(windows)["input_ids"]  # no token sees what follows it
            out = self.model(
                **{name: tensor.to(self.device) for name, tensor in padded(inputs).items()},
                decoder_input_ids=decoder.to(self.device),
                use_cache=False,
            ).logits
            return [row[: len(window)].float() for row, window in zip(out, windows, strict=True)]
        if len({len(w) for w in windows}) == 1:
            out = self.model(input_ids=torch.tensor(windows, device=self.device), use_cache=False).logits.float()
            return list(out)
        return [self.logits([w])[0] for w in windows]

    def numbered_logits(self, inputs: list[list[int]] | None = None) -> "Logits":
        """The same as `compare` wants it. `inputs` as in `Samples`."""
        return lambda first, windows: self.logits(windows, _slice(inputs, first, windows))


def _stock_model(place: Place, dtype: torch.dtype) -> Any:
    from polymoe.offline.checkpoint.checkpoint import Checkpoint, read_config
    from polymoe.offline.checkpoint.formats.formats import take_quantization
    from polymoe.offline.checkpoint.loaded_model import loaded_model

    config = read_config(place.folder)
    if place.changes or take_quantization(config) is not None or getattr(config, "left_out_inputs", None):
        return loaded_model(Checkpoint.open(str(place), "original"), dtype)
    return kind_of(config).auto.from_pretrained(place.folder, config=config, dtype=dtype, local_files_only=True)


def padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """`input_ids` int64 [B, longest], and `attention_mask`, 1 where there is a token."""
    tensors = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(tensor) for tensor in tensors]
    return {
        "input_ids": pad_sequence(tensors, batch_first=True),
        "attention_mask": pad_sequence(ones, batch_first=True),
    }


class _Sums:
    """Running sums over positions, in float64 on the CPU."""

    def __init__(self) -> None:
        self.nll_original = self.nll_served = self.kl = 0.0
        self.agreed = self.tokens = 0

    def add(self, window: list[int], original: torch.Tensor, served: torch.Tensor) -> None:
        p, q = torch.log_softmax(original[:-1], dim=-1), torch.log_softmax(served[:-1], dim=-1)
        target = torch.tensor(window[1:], device=p.device)[:, None]
        self.nll_original -= float(p.gather(1, target).double().sum())
        self.nll_served -= float(q.gather(1, target).double().sum())
        self.kl += float((p.exp() * (p - q)).double().sum())
        self.agreed += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        self.tokens += len(window) - 1

    def result(self) -> Fidelity:
        n = self.tokens
        return Fidelity(
            perplexity_original=math.exp(self.nll_original / n),
            perplexity_served=math.exp(self.nll_served / n),
            kl=max(0.0, self.kl / n),
            top1=self.agreed / n,
            tokens=n,
        )


# (number of the first window, windows) -> float32 [tokens, vocabulary] for each: logits or their log-softmax
Logits = Callable[[int, list[list[int]]], list[torch.Tensor]]


def compare(
    windows: list[list[int]],
    original: Logits,
    served: Logits,
    vocab_size: int,
    batch: int,
    advance: Callable[[int], None] | None = None,
) -> Fidelity:
    """One variant's windows through two models, `batch` at a time. `advance`: called with windows done since last.

    vocab_size: of the variant; what either model has beyond it is left out.
    """
    sums = _Sums()
    for start in range(0, len(windows), batch):
        group = windows[start : start + batch]
        for window, p, q in zip(group, original(start, group), served(start, group), strict=True):
            sums.add(window, p[:, :vocab_size], q[:, :vocab_size])
        if advance is not None:
            advance(len(group))
    return sums.result()


def served_logits(engine: EngineCore, variant: int, inputs: list[list[int]] | None = None) -> Logits:
    """What the engine computes for a variant (its index). `inputs` as in `Samples`."""

    def logits(first: int, windows: list[list[int]]) -> list[torch.Tensor]:
        read = _slice(inputs, first, windows)
        if read is None:
            return engine.prompt_logits([(variant, window) for window in windows])
        prompts = [(variant, source + window) for source, window in zip(read, windows, strict=True)]
        return engine.prompt_logits(prompts, [len(source) for source in read])

    return logits


def _slice(inputs: list[list[int]] | None, first: int, windows: list[list[int]]) -> list[list[int]] | None:
    """The inputs of `windows`, the first of which has number `first`."""
    return None if inputs is None else inputs[first : first + len(windows)]


def measure(
    engine: EngineCore,
    originals: Mapping[str, str | Path],
    texts: dict[str, Samples],
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    advance: Callable[[str, int], None] | None = None,
) -> dict[str, Fidelity]:
    """Compare every variant in `texts` with its original.

    Args:
        originals: variant -> its checkpoint, as `OriginalModel` takes it.
        texts: variant -> what it is measured on.
        dtype: of the originals; the engine has its own.
        batch: windows a pass.
        advance: called with (variant, windows done since the last call).

    One original is in memory at a time. Raises `PolymoeError` for a window with a token that the variant lacks.
    """
    index = {v.name: v.place for v in engine.info.variants}
    results = {}
    for name, samples in texts.items():
        vocab = engine.variants[index[name]].vocab_size
        check_token_ids(name, [*samples.windows, *(samples.inputs or ())], vocab)
        original = OriginalModel(originals[name], dtype, engine.device)
        served = served_logits(engine, index[name], samples.inputs)
        report = None if advance is None else partial(advance, name)
        results[name] = compare(samples.windows, original.numbered_logits(samples.inputs), served, vocab, batch, report)
        del original
        gc.collect()
    return results


def check_token_ids(name: str, windows: list[list[int]], vocab_size: int) -> None:
    """Raise `PolymoeError` for a token that the variant `name` lacks."""
    if any(max(w) >= vocab_size or min(w) < 0 for w in windows):
        raise PolymoeError(f"the text for {name} has token ids outside its vocabulary of {vocab_size}.")
