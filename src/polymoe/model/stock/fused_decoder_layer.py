"""Decoder layers in one kernel call, where attention, router and experts are one call each already.

    h = x + c attention(norm(x)),   y = h + c experts(norm(h))

As with its parts, which modules are such layers is tried: with others in the place of its parts, which keep what they
are given, and with random numbers for what these return.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from polymoe.errors import UnsupportedModelError
from polymoe.model.attention.paged import asks_for_nothing
from polymoe.model.backends.base import Backend, DecoderParts, PreparedLayer
from polymoe.model.stock.fused_attention import FusedAttention
from polymoe.model.stock.fused_norm import norm_epsilon
from polymoe.model.stock.fused_router import FusedRouter
from polymoe.model.stock.weights_seen import WeightsSeen, weight_of

_TOKENS = 3  # of a trial


def fuse_decoder_layers(modules: Iterable[torch.nn.Module], backend: Backend) -> int:
    """Give every decoder layer among them that computes the formula the backend's. Returns how many there are."""
    fused = 0
    for module in modules:
        parts = _parts(module)
        if parts is None or not _joins_as_the_formula(parts) or (formula := _formula(module, parts)) is None:
            continue
        layer = FusedDecoderLayer(module, parts, *formula, backend)
        if layer.computes() is not None:
            module.forward = layer
            fused += 1
    return fused


@dataclass(frozen=True)
class _Parts:
    """A layer's children by name, and what is within one of them: router and experts."""

    attention: str
    norms: tuple[str, str]
    block: str
    in_block: tuple[str, str]  # router, experts
    modules: tuple[Any, Any, Any]  # block, router, experts

    @property
    def width(self) -> int:
        return int(self.modules[1].weight.shape[1])


def _parts(module: Any) -> _Parts | None:
    """None where it has others."""
    children = dict(module.named_children())
    attention = [name for name, child in children.items() if isinstance(child.forward, FusedAttention)]
    norms = [name for name, child in children.items() if norm_epsilon(child) is not None]
    rest = [name for name in children if name not in (*attention, *norms)]
    own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    if (len(attention), len(norms), len(rest)) != (1, 2, 1) or own:
        return None
    block = children[rest[0]]
    inside = dict(block.named_children())
    routers = [name for name, child in inside.items() if isinstance(child.forward, FusedRouter)]
    experts = [name for name, child in inside.items() if hasattr(child, "polymoe_experts")]
    held = [tensor for tensor in (*block._parameters.values(), *block._buffers.values()) if tensor is not None]
    if len(inside) != 2 or len(routers) != 1 or len(experts) != 1 or held:
        return None
    names = routers[0], experts[0]
    modules = block, inside[names[0]], inside[names[1]]
    return _Parts(attention[0], (norms[0], norms[1]), rest[0], names, modules)


class _Recorder(torch.nn.Module):
    """In the place of a part: keeps what it was given, gives `out`. `calls` is shared by those of a trial."""

    def __init__(self, name: str, calls: list[tuple[str, Any]], out: Any) -> None:
        super().__init__()
        self.name, self.calls, self.out = name, calls, out

    def forward(self, *given: Any, **named: Any) -> Any:
        self.calls.append((self.name, (given, named)))
        return self.out


def _tried(
    module: Any, returned: dict[str, Any], *given: Any, **named: Any
) -> tuple[Any, list[tuple[str, Any]]] | None:
    """What `module` returns where its children return this, and what they were called with; None if it fails."""
    calls: list[tuple[str, Any]] = []
    trial = copy.copy(module)
    trial._modules = {name: _Recorder(name, calls, out) for name, out in returned.items()}
    try:
        return trial(*given, **named), calls
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, UnsupportedModelError):
        return None


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.bfloat16)


def _joins_as_the_formula(parts: _Parts) -> bool:
    """Whether the block hands the router's choice to the experts, and what these make of it on."""
    router, experts = parts.in_block
    width = parts.width
    x, out = _random(1, _TOKENS, width), _random(_TOKENS, width)
    routed = _random(_TOKENS, 4), _random(_TOKENS, 2), torch.arange(2 * _TOKENS).view(_TOKENS, 2)
    tried = _tried(parts.modules[0], {router: routed, experts: out}, x)
    if tried is None or [name for name, _ in tried[1]] != [router, experts]:
        return False
    found, ((_, (to_router, more)), (_, (to_experts, others))) = tried
    if len(to_router) != 1 or more or len(to_experts) != 3 or others or not isinstance(found, torch.Tensor):
        return False
    same = to_experts[1] is routed[2] and to_experts[2] is routed[1]
    handed = [to_router[0].reshape(-1, width), to_experts[0]]
    return same and all(torch.equal(tensor, x[0]) for tensor in handed) and torch.equal(found, out[None])


def _formula(module: Any, parts: _Parts) -> tuple[tuple[str, str], float] | None:
    """Its norms in the order of the formula, and c; None if it is no such layer."""
    width = parts.width
    x, attended, routed, *normed = torch.split(_random(5 * _TOKENS, width)[None], _TOKENS, dim=1)
    outs = {parts.attention: (attended, None), parts.block: routed, **dict(zip(parts.norms, normed, strict=True))}
    rotary = _random(1, _TOKENS, 4), _random(1, _TOKENS, 8)
    tried = _tried(
        module, outs, x, position_embeddings=rotary, attention_mask=None, past_key_values=None,
        position_ids=torch.arange(_TOKENS)[None],
    )  # fmt: skip
    if tried is None or [name for name, _ in tried[1]][1::2] != [parts.attention, parts.block]:
        return None
    found, calls = tried
    (first, (to_first, _)), (_, (to_attention, options)), (second, (to_second, _)), (_, (to_block, others)) = calls
    options = dict(options)
    hidden = to_attention[0] if to_attention else options.pop("hidden_states", None)
    handed = [to_first[0] is x, hidden is outs[first], len(to_block) == 1 and to_block[0] is outs[second]]
    if {first, second} != {*parts.norms} or not all(handed) or not isinstance(found, torch.Tensor):
        return None
    if options.pop("position_embeddings", None) is not rotary or not asks_for_nothing(options) or others:
        return None
    floats = {value for value in vars(module).values() if isinstance(value, float)}
    for multiplier in (1.0, *sorted(floats - {1.0})):
        between = x + attended * multiplier
        if torch.equal(to_second[0], between) and torch.equal(found, between + routed * multiplier):
            return (first, second), multiplier
    return None


class FusedDecoderLayer:
    """The forward of one decoder layer: the backend's, or the stock one where rows are not the step's tokens, or
    somebody counts what is routed."""

    def __init__(self, module: Any, parts: _Parts, norms: tuple[str, str], multiplier: float, backend: Backend) -> None:
        self.multiplier, self.backend, self.stock = multiplier, backend, module.forward
        self.attention: FusedAttention = module._modules[parts.attention].forward
        self.norms = [module._modules[name] for name in norms]
        _, self.router, self.experts = parts.modules
        self.made_of: tuple[Any, Any] | None = None
        self.seen = WeightsSeen([])
        self.prepared: PreparedLayer | None = None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Any:
        counts = self.experts.polymoe_experts.counts
        if attention_mask is None and past_key_values is None and asks_for_nothing(others):
            known = self.attention.known(hidden_states, position_embeddings)
            if known is not None and (counts is None or not counts.counting):
                prepared = self.computes()
                if prepared is not None:
                    return prepared(*known)[None]
        return self.stock(
            hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, **others,
        )  # fmt: skip

    def computes(self) -> PreparedLayer | None:
        """As `FusedAttention.computes`."""
        made_of = self.attention.computes(), self.experts.polymoe_experts.compute
        known = self.made_of is not None and all(a is b for a, b in zip(made_of, self.made_of, strict=True))
        if not known or not self.seen.are_current:
            self.made_of = made_of
            self.seen = WeightsSeen([(module, "weight") for module in (*self.norms, self.router)])
            self.prepared = self._prepare(*made_of)
        return self.prepared

    def _prepare(self, attention: PreparedLayer | None, experts: Any) -> PreparedLayer | None:
        if attention is None:
            return None
        first, second = ((weight_of(norm.weight), norm_epsilon(norm) or 0.0) for norm in self.norms)
        routed: FusedRouter = self.router.forward
        router = weight_of(self.router.weight), routed.top_k, routed.formula.scoring, routed.formula.scores
        return self.backend.prepare_decoder_layer(
            DecoderParts(attention, first, second, router, experts, self.multiplier)
        )
