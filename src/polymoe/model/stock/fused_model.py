"""The whole pass of a stock causal language model in one kernel call, where each of its decoder layers could be one.

    h = c embedding(ids),  h = layer(h) of each,  logits = a head(norm(h))        c and a: numbers

Between layers the stock model does nothing but call the next one, which takes as long as a small layer's kernels. That
it does nothing else is tried: with others in the place of its parts, which keep what they are given.
"""

from dataclasses import dataclass
from operator import is_
from typing import Any

import torch

from polymoe.model.attention.paged import asks_for_nothing
from polymoe.model.backends.base import Backend, CachedLayer, PassParts, PreparedDecoderLayer, PreparedPass
from polymoe.model.batch.batch import ForwardBatch
from polymoe.model.stock.fused_decoder_layer import FusedDecoderLayer
from polymoe.model.stock.fused_norm import norm_epsilon
from polymoe.model.stock.recorded import Call, equal, random_bf16, recorded
from polymoe.model.stock.turning import Turning
from polymoe.model.stock.weights_seen import WeightsSeen, weight_of

_TOKENS, _WIDTH, _KEPT = 3, 8, (0, 2)  # of a trial


@dataclass(frozen=True)
class _Parts:
    """Paths within the model."""

    embedding: str
    rotary: str
    layers: tuple[str, ...]
    norm: str
    head: str


def fuse_model(model: Any, backend: Backend, fixed: bool) -> "FusedModel | None":
    """None where it is no such model, or its weights are not for the backend. fixed: whether no version ever comes."""
    parts = _parts(model)
    formula = None if parts is None else _formula(model, parts)
    if parts is None or formula is None:
        return None
    fused = FusedModel(model, parts, formula, backend, fixed)
    return None if fused.computes() is None else fused


@dataclass(frozen=True)
class _Formula:
    """What embeddings are multiplied by; what logits are multiplied or divided by."""

    embeddings: float
    logits: float
    divides: bool


def _parts(model: Any) -> _Parts | None:
    """None where it has others."""
    children = dict(model.named_children())
    heads = [name for name, child in children.items() if type(child) is torch.nn.Linear and child.bias is None]
    if len(children) != 2 or len(heads) != 1:
        return None
    (inner,) = children.keys() - {*heads}
    found: dict[str, list[str]] = {"embedding": [], "layers": [], "norm": [], "rotary": []}
    for name, child in children[inner].named_children():
        path = f"{inner}.{name}"
        if type(child) is torch.nn.Embedding:
            found["embedding"].append(path)
        elif isinstance(child, torch.nn.ModuleList):
            if all(isinstance(layer.forward, FusedDecoderLayer) for layer in child):
                found["layers"] += [f"{path}.{index}" for index in range(len(child))]
        elif norm_epsilon(child) is not None:
            found["norm"].append(path)
        elif next(child.parameters(), None) is None and next(child.children(), None) is None:
            found["rotary"].append(path)
        else:
            return None
    alone = found["embedding"], found["rotary"], found["norm"]
    if not found["layers"] or any(len(paths) != 1 for paths in alone):
        return None
    return _Parts(alone[0][0], alone[1][0], tuple(found["layers"]), alone[2][0], heads[0])


def _formula(model: Any, parts: _Parts) -> _Formula | None:
    """None if it is no such model."""
    hidden = list(torch.split(random_bf16((len(parts.layers) + 2) * _TOKENS, _WIDTH)[None], _TOKENS, dim=1))
    embedded, *between, normed = hidden
    rotary, logits = (random_bf16(1, _TOKENS, 4), random_bf16(1, _TOKENS, 8)), random_bf16(1, len(_KEPT), 16)
    ids, positions, kept = torch.arange(_TOKENS)[None], torch.arange(5, 5 + _TOKENS)[None], torch.tensor(_KEPT)
    outs: dict[str, Any] = dict(zip(parts.layers, between, strict=True))
    outs |= {parts.embedding: embedded, parts.rotary: rotary, parts.norm: normed, parts.head: logits}
    tried = recorded(
        model, outs, input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=kept
    )  # fmt: skip
    order = [parts.embedding, parts.rotary, *parts.layers, parts.norm, parts.head]
    if tried is None or [call.path for call in tried[1]] != order:
        return None
    output, (embedding, turning, *layers, norm, head) = tried
    numbers = _numbers(model)
    start = layers[0].given[0] if layers[0].given else None
    multiplier = next((c for c in numbers if equal(start, embedded * c)), None)
    found = getattr(output, "logits", None)
    scaled = [(c, False) for c in numbers if equal(found, logits * c)]
    scaled += [(c, True) for c in numbers if c and equal(found, logits / c)]
    if multiplier is None or not scaled or not equal(_only(embedding), ids):
        return None
    options = dict(turning.named)
    place = turning.given[1] if len(turning.given) == 2 else options.pop("position_ids", None)
    if options or place is not positions or not equal(turning.given[0], embedded * multiplier):
        return None
    for call, given in zip(layers, [start, *between[:-1]], strict=True):
        options = dict(call.named)
        if len(call.given) != 1 or call.given[0] is not given or options.pop("position_embeddings", None) is not rotary:
            return None
        if options.pop("attention_mask", None) is not None or not asks_for_nothing(options):
            return None
    if _only(norm) is not between[-1] or not equal(_only(head), normed[:, kept]):
        return None
    return _Formula(multiplier, *scaled[0])


def _only(call: Call) -> Any:
    """What a part was given, where that is one thing."""
    return call.given[0] if len(call.given) == 1 and not call.named else None


def _numbers(model: Any) -> list[float]:
    """1, and all that the model and its configuration have."""
    holders = [vars(module) for module in (model, *model.children())] + [vars(model.config.get_text_config())]
    found = {float(value) for held in holders for value in held.values() if type(value) in (int, float)}
    return [1.0, *sorted(found - {1.0})]


class FusedModel:
    """See the module docstring."""

    def __init__(self, model: Any, parts: _Parts, formula: _Formula, backend: Backend, fixed: bool) -> None:
        self._embedding, self._norm, self._head = (
            model.get_submodule(path) for path in (parts.embedding, parts.norm, parts.head)
        )
        self._layers: list[FusedDecoderLayer] = [model.get_submodule(path).forward for path in parts.layers]
        self._turning = Turning(model.get_submodule(parts.rotary))
        self._formula, self._backend, self._fixed = formula, backend, fixed
        self._rotaries = frozenset.intersection(*(layer.attention.rotaries for layer in self._layers))
        self._made_of: list[PreparedDecoderLayer | None] = []
        self._seen = WeightsSeen([])
        self._prepared: PreparedPass | None = None
        self._caches: tuple[CachedLayer, ...] = ()

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor | None:
        """`input_ids, positions [T]` -> logits of rows `kept [R]`, `[R, O]`; None where the stock model is needed."""
        prepared = self.computes()
        if prepared is None or batch.shape is not None or batch.attention is None or not batch.attention.seq_lens:
            return None
        turns = self._turning.of(positions, max(batch.attention.seq_lens))
        if turns.cos.shape[1] not in self._rotaries or turns.cos.dtype != torch.bfloat16:
            return None
        first = self._layers[0].attention.cache
        if not self._caches or self._caches[0] is not first:
            self._caches = tuple(layer.attention.cache for layer in self._layers)
        tokens = input_ids
        if not prepared.looks_up:
            tokens = (self._embedding(input_ids[None]) * self._formula.embeddings)[0].contiguous()
        logits = prepared(tokens, turns, kept, batch, self._caches)
        if not prepared.has_head:
            logits = self._head(logits[None])[0]
        scale = self._formula.logits
        return logits if scale == 1 else logits / scale if self._formula.divides else logits * scale

    def computes(self) -> PreparedPass | None:
        """As `FusedDecoderLayer.computes`."""
        if self._fixed and self._prepared is not None:
            return None if self._layers[0].counts else self._prepared
        made_of = [layer.computes() for layer in self._layers]
        same = len(made_of) == len(self._made_of) and all(map(is_, made_of, self._made_of))
        if not same or not self._seen.are_current:
            self._made_of = made_of
            self._seen = WeightsSeen([(module, "weight") for module in (self._embedding, self._norm, self._head)])
            self._prepared = self._prepare([layer for layer in made_of if layer is not None])
        return self._prepared

    def _prepare(self, layers: list[PreparedDecoderLayer]) -> PreparedPass | None:
        if len(layers) < len(self._layers):
            return None
        embedding, norm, head = (weight_of(module.weight) for module in (self._embedding, self._norm, self._head))
        norm_parts = norm, norm_epsilon(self._norm) or 0.0
        return self._backend.prepare_pass(PassParts(layers, embedding, self._formula.embeddings, norm_parts, head))
