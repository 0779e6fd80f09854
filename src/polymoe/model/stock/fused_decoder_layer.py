"""Decoder layers in one kernel call, where attention, router and experts are one call each already.

    h = x + c attention(norm(x)),   y = h + c experts(norm(h))

As with its parts, which modules are such layers is tried: with others in the place of its parts, which keep what they
are given, and with random numbers for what these return.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from polymoe.model.attention.paged import asks_for_nothing
from polymoe.model.backends.base import (
    Backend,
    DecoderParts,
    PreparedAttention,
    PreparedDecoderLayer,
    PreparedExperts,
)
from polymoe.model.stock.fused_attention import FusedAttention
from polymoe.model.stock.fused_norm import norm_epsilon
from polymoe.model.stock.fused_router import FusedRouter
from polymoe.model.stock.recorded import equal, random_bf16, recorded
from polymoe.model.stock.weights_seen import WeightsSeen, weight_of

_TOKENS = 3  # of a trial


def why_not_one_call(layer: Any) -> str:
    """Why a decoder layer with experts is not one kernel call; empty where it is."""
    if isinstance(layer.forward, FusedDecoderLayer):
        return "" if layer.forward.computes() is not None else "the experts are not one call"
    modules = list(layer.modules())
    if not any(isinstance(module.forward, FusedAttention) for module in modules):
        return "attention is not the kernel's formula"
    if not any(isinstance(module.forward, FusedRouter) for module in modules):
        return "the router is not the kernel's formula"
    return "its parts are joined in another way, or its experts are not one call"


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


def _joins_as_the_formula(parts: _Parts) -> bool:
    """Whether the block hands the router's choice to the experts, and what these make of it on."""
    router, experts = parts.in_block
    x, out = random_bf16(1, _TOKENS, parts.width), random_bf16(_TOKENS, parts.width)
    routed = random_bf16(_TOKENS, 4), random_bf16(_TOKENS, 2), torch.arange(2 * _TOKENS).view(_TOKENS, 2)
    tried = recorded(parts.modules[0], {router: routed, experts: out}, x)
    if tried is None or [call.path for call in tried[1]] != [router, experts]:
        return False
    found, (choice, made) = tried
    if len(choice.given) != 1 or choice.named or len(made.given) != 3 or made.named:
        return False
    same = made.given[1] is routed[2] and made.given[2] is routed[1] and equal(made.given[0], x[0])
    return same and equal(choice.given[0].reshape(-1, parts.width), x[0]) and equal(found, out[None])


def _formula(module: Any, parts: _Parts) -> tuple[tuple[str, str], float] | None:
    """Its norms in the order of the formula, and c; None if it is no such layer."""
    x, attended, routed, *normed = torch.split(random_bf16(5 * _TOKENS, parts.width)[None], _TOKENS, dim=1)
    outs = {parts.attention: (attended, None), parts.block: routed, **dict(zip(parts.norms, normed, strict=True))}
    rotary = random_bf16(1, _TOKENS, 4), random_bf16(1, _TOKENS, 8)
    tried = recorded(
        module, outs, x, position_embeddings=rotary, attention_mask=None, past_key_values=None,
        position_ids=torch.arange(_TOKENS)[None],
    )  # fmt: skip
    if tried is None or [call.path for call in tried[1]][1::2] != [parts.attention, parts.block]:
        return None
    found, (first, attention, second, block) = tried
    options = dict(attention.named)
    hidden = attention.given[0] if attention.given else options.pop("hidden_states", None)
    handed = first.given[0] is x, hidden is outs[first.path], len(block.given) == 1, block.given[0] is outs[second.path]
    if {first.path, second.path} != {*parts.norms} or not all(handed) or block.named:
        return None
    if options.pop("position_embeddings", None) is not rotary or not asks_for_nothing(options):
        return None
    floats = {value for value in vars(module).values() if isinstance(value, float)}
    for multiplier in (1.0, *sorted(floats - {1.0})):
        between = x + attended * multiplier
        if equal(second.given[0], between) and equal(found, between + routed * multiplier):
            return (first.path, second.path), multiplier
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
        self.prepared: PreparedDecoderLayer | None = None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Any:
        if attention_mask is None and past_key_values is None and asks_for_nothing(others):
            known = self.attention.known(hidden_states, position_embeddings)
            prepared = None if known is None else self.computes()
            if known is not None and prepared is not None:
                return prepared(*known)[None]
        return self.stock(
            hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, **others,
        )  # fmt: skip

    @property
    def counts(self) -> bool:
        """Whether somebody counts what is routed in this step: the same for all layers."""
        counts = self.experts.polymoe_experts.counts
        return counts is not None and bool(counts.counting)

    def computes(self) -> PreparedDecoderLayer | None:
        """The same object for as long as the weights are the same; None where the backend has nothing for them, or
        somebody counts."""
        layer = self.experts.polymoe_experts
        if self.counts:
            return None
        attention = self.attention.computes()
        made_of = self.made_of
        if (
            made_of is None
            or made_of[0] is not attention
            or made_of[1] is not layer.compute
            or not self.seen.are_current
        ):
            self.made_of = attention, layer.compute
            self.seen = WeightsSeen([(module, "weight") for module in (*self.norms, self.router)])
            self.prepared = None if attention is None else self._prepare(attention, layer.compute)
        return self.prepared

    def _prepare(self, attention: PreparedAttention, experts: PreparedExperts) -> PreparedDecoderLayer | None:
        first, second = ((weight_of(norm.weight), norm_epsilon(norm) or 0.0) for norm in self.norms)
        routed: FusedRouter = self.router.forward
        router = weight_of(self.router.weight), routed.top_k, routed.formula.scoring, routed.formula.scores
        return self.backend.prepare_decoder_layer(
            DecoderParts(attention, first, second, router, experts, self.multiplier)
        )
