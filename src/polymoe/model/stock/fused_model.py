"""The whole pass of a stock causal language model in a few calls, where all its decoder layers are kernel calls.

    h = c embedding(ids),  h = layer(h) of each,  logits = a head(norm(h))        c and a: numbers, a perhaps as 1 / a

Between layers the stock model does nothing but call the next one, which takes as long as a small layer's kernels. That
it does nothing else is tried: with others in the place of its parts, which keep what they are given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from polymoe.model.attention.paged import asks_for_nothing
from polymoe.model.backends.base import Backend, CachedLayer, PreparedDecoder
from polymoe.model.stock.fused_decoder_layer import FusedDecoderLayer
from polymoe.model.stock.fused_norm import norm_epsilon
from polymoe.model.stock.recorded import Call, equal, random_bf16, recorded

_TOKENS, _WIDTH, _KEPT = 3, 8, (0, 2)  # of a trial

_Scaling = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Parts:
    """Paths within the model."""

    embedding: str
    rotary: str
    layers: tuple[str, ...]
    norm: str
    head: str


def fuse_model(model: Any, backend: Backend) -> "FusedModel | None":
    """None where it is no such model."""
    parts = _parts(model)
    scalings = None if parts is None else _formula(model, parts)
    return None if parts is None or scalings is None else FusedModel(model, parts, *scalings, backend)


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


def _formula(model: Any, parts: _Parts) -> tuple[_Scaling, _Scaling] | None:
    """What becomes of embeddings and of logits; None if it is no such model."""
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
    of_embeddings = _scaling(embedded, start, numbers)
    of_logits = _scaling(logits, getattr(output, "logits", None), numbers)
    if of_embeddings is None or of_logits is None or not equal(_only(embedding), ids):
        return None
    turned = dict(turning.named)
    place = turning.given[1] if len(turning.given) == 2 else turned.pop("position_ids", None)
    if turned or place is not positions or not equal(turning.given[0], of_embeddings(embedded)):
        return None
    for call, given in zip(layers, [start, *between[:-1]], strict=True):
        options = dict(call.named)
        if len(call.given) != 1 or call.given[0] is not given or options.pop("position_embeddings", None) is not rotary:
            return None
        if options.pop("attention_mask", None) is not None or not asks_for_nothing(options):
            return None
    if _only(norm) is not between[-1] or not equal(_only(head), normed[:, kept]):
        return None
    return of_embeddings, of_logits


def _only(call: Call) -> Any:
    """What a part was given, where that is one thing."""
    return call.given[0] if len(call.given) == 1 and not call.named else None


def _numbers(model: Any) -> list[float]:
    """All that the model and its configuration have."""
    holders = [vars(module) for module in (model, *model.children())] + [vars(model.config.get_text_config())]
    return sorted({float(value) for held in holders for value in held.values() if type(value) in (int, float)} - {1.0})


def _scaling(x: torch.Tensor, found: Any, numbers: list[float]) -> _Scaling | None:
    """What makes `found` of `x`."""
    if equal(found, x):
        return lambda t: t
    for number in numbers:
        if equal(found, x * number):
            return lambda t: t * number
        if number and equal(found, x / number):
            return lambda t: t / number
    return None


class FusedModel:
    """See the module docstring."""

    def __init__(
        self, model: Any, parts: _Parts, of_embeddings: _Scaling, of_logits: _Scaling, backend: Backend
    ) -> None:
        self._embedding, self._rotary = (model.get_submodule(path) for path in (parts.embedding, parts.rotary))
        self._norm, self._head = (model.get_submodule(path) for path in (parts.norm, parts.head))
        self._layers: list[FusedDecoderLayer] = [model.get_submodule(path).forward for path in parts.layers]
        self._of_embeddings, self._of_logits, self._backend = of_embeddings, of_logits, backend
        self._rotaries = frozenset.intersection(*(layer.attention.rotaries for layer in self._layers))
        self._made_of: list[Any] = []
        self._decoder: PreparedDecoder | None = None
        self._caches: list[CachedLayer] = []

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor) -> torch.Tensor | None:
        """`input_ids, positions [T]` -> logits of rows `kept [R]`, `[R, O]`; None where the stock model is needed."""
        made_of = [layer.computes() for layer in self._layers]
        if any(layer is None for layer in made_of):
            return None
        hidden = self._of_embeddings(self._embedding(input_ids[None]))
        rotary = self._rotary(hidden, position_ids=positions[None])
        known = self._layers[0].attention.known(hidden, rotary)
        if known is None or rotary[0].shape[2] not in self._rotaries:
            return None
        tokens, turns, batch, first = known
        if self._decoder is None or any(a is not b for a, b in zip(made_of, self._made_of, strict=True)):
            self._decoder, self._made_of = self._backend.join_decoder_layers(made_of), made_of
        if not self._caches or self._caches[0] is not first:
            self._caches = [layer.attention.cache for layer in self._layers]
        hidden = self._norm(self._decoder(tokens, turns, batch, self._caches)[None])
        logits: torch.Tensor = self._of_logits(self._head(hidden[:, kept] if len(kept) < len(input_ids) else hidden))
        return logits[0]
