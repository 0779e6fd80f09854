"""Attention layers in one kernel call instead of some thirty operations.

Which modules are such layers is tried, on random numbers: the module must hand to attention exactly what the formula
gives, and make of its result what the output projection makes of it.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F

from polymoe.errors import UnsupportedModelError
from polymoe.kernels.cpu.attention_layer import rotated
from polymoe.kernels.cpu.rms_norm import rms_norm
from polymoe.model.attention.paged import PagedAttention, asks_for_nothing
from polymoe.model.backends.base import AttentionParts, Backend, CachedLayer, PreparedAttention
from polymoe.model.stock.fused_norm import norm_epsilon

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_TOKENS = 3  # of a trial


def fuse_attention(model: torch.nn.Module, backend: Backend) -> int:
    """Give every attention layer that computes the formula the backend's. Returns how many there are."""
    fused = 0
    tried: dict[Any, tuple[float, frozenset[int]] | None] = {}
    for module in model.modules():
        parts = _parts_of(module)
        if parts is None or backend.prepare_attention(parts) is None:
            continue
        key = _what_it_depends_on(module)
        if key not in tried:
            tried[key] = _trial(module, parts)
        if (found := tried[key]) is not None:
            parts = _parts_of(module, found[0])
            assert parts is not None
            prepared = backend.prepare_attention(parts)
            assert prepared is not None
            module.forward = _FusedAttention(module, prepared, found[1])
            fused += 1
    return fused


def _parts_of(module: Any, scaling: float = 1.0) -> AttentionParts | None:
    """Of a module that has nothing but these."""
    children = dict(module.named_children())
    if not set(_PROJECTIONS) <= children.keys() <= {*_PROJECTIONS, *_NORMS} or not hasattr(module, "layer_idx"):
        return None
    linears = [children[name] for name in _PROJECTIONS]
    head_dim = getattr(module, "head_dim", None)
    own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    if own or not isinstance(head_dim, int) or not all(type(linear) is torch.nn.Linear for linear in linears):
        return None
    if (
        any(linear.out_features % head_dim for linear in linears[:3])
        or linears[1].out_features != linears[2].out_features
    ):
        return None
    norms = []
    for name in _NORMS:
        norm = children.get(name)
        eps = None if norm is None else norm_epsilon(norm)
        if norm is not None and (eps is None or norm.weight.shape != (head_dim,)):
            return None
        norms.append(None if norm is None or eps is None else (norm, eps))
    return AttentionParts(*linears, *norms, head_dim, scaling)


def _what_it_depends_on(module: Any) -> Any:
    """Layers that are alike in this compute the same, up to their weights."""
    simple = {
        name: value
        for name, value in vars(module).items()
        if name != "layer_idx" and isinstance(value, bool | int | float | str | None)
    }
    sizes = [
        (name, c.in_features, c.out_features, c.bias is None)
        for name, c in module.named_children()
        if name in _PROJECTIONS
    ]
    norms = [(name, norm_epsilon(child)) for name, child in module.named_children() if name in _NORMS]
    return type(module), tuple(sorted(simple.items(), key=lambda pair: pair[0])), tuple(sizes), tuple(norms)


class _Recorder:
    """In the place of paged attention: keeps what it was given, gives `out`."""

    def __init__(self, out: torch.Tensor) -> None:
        self.out = out
        self.given: list[torch.Tensor] = []
        self.options: dict[str, Any] = {}

    def forward(self, _layer: int, *given: torch.Tensor, **options: Any) -> torch.Tensor:
        self.given, self.options = list(given), options
        return self.out


def _trial(module: Any, parts: AttentionParts) -> tuple[float, frozenset[int]] | None:
    """What scores are multiplied by, and of how many values rotary embeddings may be; None if it is no such layer."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    trial = copy.copy(module)
    trial._modules = dict(module._modules)
    for name, linear in zip(_PROJECTIONS, parts.linears, strict=True):
        own = copy.copy(linear)
        own._parameters = {}
        for leaf in ("weight", "bias"):
            own.__dict__.pop(leaf, None)
        weight = random(linear.out_features, linear.in_features) / linear.in_features**0.5
        bias = None if linear.bias is None else torch.nn.Parameter(random(linear.out_features), requires_grad=False)
        own._parameters = {"weight": torch.nn.Parameter(weight, requires_grad=False), "bias": bias}
        trial._modules[name] = own
    for name, norm in zip(_NORMS, parts.norms, strict=True):
        if norm is not None:
            own = copy.copy(norm[0])
            for leaf in ("weight", "forward"):
                own.__dict__.pop(leaf, None)
            own._parameters = {"weight": torch.nn.Parameter(random(parts.head_dim), requires_grad=False)}
            trial._modules[name] = own
    heads = parts.query.out_features // parts.head_dim
    proven = set()
    scaling = None
    for rotary in (parts.head_dim, parts.head_dim // 2, parts.head_dim // 4):
        x, out = random(1, _TOKENS, parts.query.in_features), random(_TOKENS, heads, parts.head_dim)
        positions = torch.randint(1 << 20, (1, _TOKENS), generator=generator)  # far on, should they matter
        recorder = _Recorder(out)
        trial.__dict__["polymoe_attention"] = recorder
        rotation = random(1, _TOKENS, rotary), random(1, _TOKENS, rotary)
        try:
            found, _ = trial(
                hidden_states=x, position_embeddings=rotation, attention_mask=None, past_key_values=None,
                position_ids=positions,
            )  # fmt: skip
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, UnsupportedModelError):
            continue
        options = dict(recorder.options)
        factor = options.pop("scaling", None)
        if any(value is not None for value in options.values()) or not isinstance(factor, float):
            return None
        if scaling not in (None, factor) or not _agrees(trial, parts, x, rotation, recorder, found):
            continue
        scaling = factor
        proven.add(rotary)
    return None if scaling is None else (scaling, frozenset(proven))


def _agrees(
    trial: Any,
    parts: AttentionParts,
    x: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    recorder: _Recorder,
    found: torch.Tensor,
) -> bool:
    """Whether the module gave to attention, and made of its result, what the formula says."""
    wanted = []
    for name, norm in zip(_PROJECTIONS[:3], (*_NORMS, ""), strict=True):
        linear = trial._modules[name]
        heads = F.linear(x[0], linear.weight, linear.bias).view(_TOKENS, -1, parts.head_dim)
        if norm in trial._modules:
            heads = rms_norm(heads, trial._modules[norm].weight, norm_epsilon(trial._modules[norm]) or 0.0)
        heads = heads.transpose(0, 1)
        wanted.append(heads if name == "v_proj" else rotated(heads, rotation[0][0], rotation[1][0]))
    last = trial._modules["o_proj"]
    if len(recorder.given) != 3 or not all(torch.equal(a, b) for a, b in zip(recorder.given, wanted, strict=True)):
        return False
    return torch.equal(found, F.linear(recorder.out.reshape(1, _TOKENS, -1), last.weight, last.bias))


class _FusedAttention:
    """The forward of one attention layer: the backend's, or the stock one where rows are not the step's tokens."""

    def __init__(self, module: Any, prepared: PreparedAttention, rotaries: frozenset[int]) -> None:
        self.module, self.prepared, self.rotaries, self.stock = module, prepared, rotaries, module.forward

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Any:
        if attention_mask is None and past_key_values is None and asks_for_nothing(others):
            out = self._computed(hidden_states, position_embeddings)
            if out is not None:
                return out, None
        return self.stock(
            hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, **others,
        )  # fmt: skip

    def _computed(self, hidden: torch.Tensor, rotary: Any) -> torch.Tensor | None:
        paged: PagedAttention = self.module.polymoe_attention
        batch = paged.context.batch
        if batch.shape is not None or batch.attention is None or not isinstance(rotary, tuple):
            return None
        cos, sin = rotary
        shape = 1, batch.tokens.num_tokens
        if hidden.shape[:2] != shape or hidden.dtype != cos.dtype or cos.shape != sin.shape or cos.shape[:2] != shape:
            return None
        if cos.shape[2] not in self.rotaries:
            return None
        layer = self.module.layer_idx
        cached = CachedLayer(
            (paged.cache.key[layer], paged.cache.value[layer]), paged.cache.layers[layer].sliding_window
        )
        out = self.prepared(hidden[0], (cos[0], sin[0]), batch, cached)
        return None if out is None else out[None]
