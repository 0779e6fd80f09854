"""Attention layers in one kernel call instead of some thirty operations.

Which modules are such layers is tried, on random numbers: the module must hand to attention exactly what the formula
gives, and make of its result what the output projection makes of it.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from polymoe.errors import UnsupportedModelError
from polymoe.kernels.cpu.attention_layer import rotated
from polymoe.kernels.cpu.rms_norm import rms_norm
from polymoe.model.attention.paged import KVCache, PagedAttention, asks_for_nothing
from polymoe.model.backends.base import AttentionParts, Backend, CachedLayer, PreparedAttention, Weight
from polymoe.model.batch.batch import ForwardBatch
from polymoe.model.stock.fused_norm import epsilon_of, norm_epsilon
from polymoe.model.stock.weights_seen import WeightsSeen, weight_of

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_TOKENS = 3  # of a trial
_LARGE = 1000.0  # queries, keys and values there: what is clipped shows

# Hidden states [T, H], cosines and sines [T, R], the step, the layer's cache.
Known = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], ForwardBatch, CachedLayer]


def fuse_attention(modules: Iterable[torch.nn.Module], backend: Backend) -> int:
    """Give every attention layer among them that computes the formula the backend's. Returns how many there are."""
    fused = 0
    tried: dict[Any, tuple[float, frozenset[int]] | None] = {}
    for module in modules:
        if not _has_the_parts(module) or backend.prepare_attention(_parts_of(module, 1.0)) is None:
            continue
        key = _what_it_depends_on(module)
        if key not in tried:
            tried[key] = _trial(module)
        if (found := tried[key]) is not None:
            module.forward = FusedAttention(module, *found, backend)
            fused += 1
    return fused


def _has_the_parts(module: Any) -> bool:
    """And nothing else."""
    children = dict(module.named_children())
    if not set(_PROJECTIONS) <= children.keys() <= {*_PROJECTIONS, *_NORMS} or not hasattr(module, "layer_idx"):
        return False
    linears = [children[name] for name in _PROJECTIONS]
    head_dim = getattr(module, "head_dim", None)
    own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    if own or not isinstance(head_dim, int) or not all(type(linear) is torch.nn.Linear for linear in linears):
        return False
    query, key, value, _ = (linear.out_features for linear in linears)
    if query % head_dim or key % head_dim or key != value:
        return False
    norms = [children[name] for name in _NORMS if name in children]
    widths = [(head_dim,), (head_dim,)] if not norms or norms[0].weight.shape == (head_dim,) else [(query,), (key,)]
    return len(norms) in (0, 2) and all(
        norm_epsilon(norm) is not None and norm.weight.shape == width
        for norm, width in zip(norms, widths, strict=False)
    )


def _weights_of(module: Any) -> list[tuple[torch.nn.Module, str]]:
    """All that `_parts_of` reads."""
    found = [(module._modules[name], leaf) for name in _PROJECTIONS for leaf in ("weight", "bias")]
    return found + [(module._modules[name], "weight") for name in _NORMS if name in module._modules]


def _parts_of(module: Any, scaling: float) -> AttentionParts:
    def linear(name: str) -> tuple[Weight, Weight | None]:
        part = module._modules[name]
        return weight_of(part.weight), None if part.bias is None else weight_of(part.bias)

    def norm(name: str) -> tuple[Weight, float] | None:
        part = module._modules.get(name)
        eps = None if part is None else norm_epsilon(part)
        return None if part is None or eps is None else (weight_of(part.weight), eps)

    linears = linear("q_proj"), linear("k_proj"), linear("v_proj"), linear("o_proj")
    return AttentionParts(*linears, norm("q_norm"), norm("k_norm"), module.head_dim, scaling)


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
    norms = [
        (name, norm_epsilon(child), child.weight.shape) for name, child in module.named_children() if name in _NORMS
    ]
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


def _trial(module: Any) -> tuple[float, frozenset[int]] | None:
    """What scores are multiplied by, and of how many values rotary embeddings may be; None if it is no such layer."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    trial = copy.copy(module)
    trial._modules = dict(module._modules)
    for name in _PROJECTIONS:
        linear = module._modules[name]
        own = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        own.weight = _parameter(_LARGE * random(linear.out_features, linear.in_features) / linear.in_features**0.5)
        if linear.bias is not None:
            own.bias = _parameter(random(linear.out_features))
        trial._modules[name] = own
    for name in _NORMS:
        if name in trial._modules:
            norm = copy.copy(module._modules[name])
            weight = random(*norm.weight.shape)
            for leaf in ("weight", "forward"):
                norm.__dict__.pop(leaf, None)
            norm._parameters = {"weight": _parameter(_LARGE * weight)}
            trial._modules[name] = norm
    head_dim, inputs = module.head_dim, module._modules["q_proj"].in_features
    heads = module._modules["q_proj"].out_features // head_dim
    proven = set()
    scaling = None
    for rotary in (head_dim, head_dim // 2, head_dim // 4):
        x, out = random(1, _TOKENS, inputs), random(_TOKENS, heads, head_dim)
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
        if scaling not in (None, factor) or not _agrees(trial, x, rotation, recorder, found):
            continue
        scaling = factor
        proven.add(rotary)
    return None if scaling is None else (scaling, frozenset(proven))


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _agrees(
    trial: Any,
    x: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    recorder: _Recorder,
    found: torch.Tensor,
) -> bool:
    """Whether the module gave to attention, and made of its result, what the formula says."""
    wanted = []
    for name, norm in zip(_PROJECTIONS[:3], (*_NORMS, ""), strict=True):
        linear = trial._modules[name]
        heads = F.linear(x[0], linear.weight, linear.bias)
        if norm in trial._modules:
            weight = trial._modules[norm].weight
            heads = heads.view(_TOKENS, -1, len(weight))
            heads = rms_norm(heads, weight, epsilon_of(trial._modules[norm]) or 0.0)
        heads = heads.view(_TOKENS, -1, trial.head_dim).transpose(0, 1)
        wanted.append(heads if name == "v_proj" else rotated(heads, rotation[0][0], rotation[1][0]))
    last = trial._modules["o_proj"]
    if len(recorder.given) != 3 or not all(torch.equal(a, b) for a, b in zip(recorder.given, wanted, strict=True)):
        return False
    return torch.equal(found, F.linear(recorder.out.reshape(1, _TOKENS, -1), last.weight, last.bias))


class FusedAttention:
    """The forward of one attention layer: the backend's, or the stock one where rows are not the step's tokens."""

    def __init__(self, module: Any, scaling: float, rotaries: frozenset[int], backend: Backend) -> None:
        self.module, self.scaling, self.rotaries, self.backend = module, scaling, rotaries, backend
        self.stock = module.forward
        self.seen = WeightsSeen([])  # that `prepared` was made of
        self.prepared: PreparedAttention | None = None
        self.cached: tuple[KVCache, CachedLayer] | None = None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Any:
        if attention_mask is None and past_key_values is None and asks_for_nothing(others):
            known = self.known(hidden_states, position_embeddings)
            prepared = None if known is None else self.computes()
            if known is not None and prepared is not None:
                return prepared(*known)[None], None
        return self.stock(
            hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, **others,
        )  # fmt: skip

    def known(self, hidden: torch.Tensor, rotary: Any) -> Known | None:
        """What a prepared layer is called with; None where the rows are not the step's tokens, or not of its kind."""
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
        return hidden[0], (cos[0], sin[0]), batch, self.cache

    @property
    def cache(self) -> CachedLayer:
        """The layer's; the same object for as long as the model has the same."""
        cache = self.module.polymoe_attention.cache
        if self.cached is None or self.cached[0] is not cache:
            layer = self.module.layer_idx
            tensors = cache.key[layer], cache.value[layer]
            self.cached = cache, CachedLayer(tensors, cache.layers[layer].sliding_window)
        return self.cached[1]

    def computes(self) -> PreparedAttention | None:
        """The same object for as long as the weights are the same; None where the backend has nothing for them."""
        if self.prepared is None or not self.seen.are_current:
            self.seen = WeightsSeen(_weights_of(self.module))
            self.prepared = self.backend.prepare_attention(_parts_of(self.module, self.scaling))
        return self.prepared
