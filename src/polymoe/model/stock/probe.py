"""A trial run of the stock forward pass: can polymoe serve this model, and where in its tensors are the tokens?

Two variants stand in every weight, all zeros without memory, so that any size takes seconds. Experts and attention are
left out. The run refuses, naming the reason, what could otherwise go wrong in silence at request time:

- an operation on a weight that `VariantStack` does not know;
- attention that is not causal, full or over a sliding window: the mask the model asks for is read and compared;
- tokens that reach each other outside attention (convolutions, state-space layers, token shifts): one token is NaN, and
  no other may become it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from polymoe.errors import UnsupportedModelError
from polymoe.model.attention.paged import AttentionLayer, check_attention_arguments
from polymoe.model.backends.context import ForwardContext
from polymoe.model.batch.batch import ForwardBatch, RowMap, segments_from_variants
from polymoe.model.stock.kind import kind_of
from polymoe.model.stock.skeleton import (
    accepts_logits_to_keep,
    build_skeleton,
    expert_modules,
    expert_tensor_names,
    retie,
    set_weight,
)
from polymoe.model.variants.variant_stack import METADATA, VariantStack

_TRIAL = "polymoe_trial"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_EXPERT_TENSORS = {f"{name}{end}" for name in ("gate_up_proj", "up_proj", "down_proj") for end in ("", "_bias")}
_PRODUCTS = {(F.linear, 1): "product", (F.embedding, 1): "look-up"}  # and the argument that is the weight
_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113)


@dataclass(frozen=True)
class Trial:
    """What the trial run learned."""

    attention_layers: dict[int, AttentionLayer]  # layer index -> shape of its cache
    token_axes: dict[str, dict[int, int]]  # weight -> what its `VariantStack` must know
    products: frozenset[str] = frozenset()  # matrices that are multiplied by or looked up in, and nothing else


@dataclass(frozen=True)
class _AskedMask:
    """Stands for the mask of a layer: a token sees the last `window` tokens, itself included; None: all."""

    window: int | None
    length: int  # up to which this was looked at

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedModelError("it computes with its attention mask, which paged attention never makes.")

    def __getitem__(self, index: object) -> Any:
        return self.__getattr__("")


def _ask_mask(*, mask_function: Callable[..., Any], config: Any, **_: Any) -> _AskedMask:
    """The function registered with transformers' mask registry: look at some rows of the mask instead of making it."""
    length = min(getattr(config, "max_position_embeddings", None) or 1 << 17, 1 << 24)
    keys = torch.arange(length)
    window = length
    for query in (length - 1, length - 1 - length // 3, length // 2):
        visible = torch.as_tensor(mask_function(0, 0, torch.tensor(query), keys)).expand(length)
        if query == length - 1:
            window = int(visible.sum())
        if not torch.equal(visible, (keys <= query) & (keys > query - window)):
            raise UnsupportedModelError("its attention mask is neither causal nor a causal sliding window.")
    return _AskedMask(window if window < length else None, length)


def _trial_attention_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Stands where `polymoe_attention_forward` stands in service; zeros of the right shape."""
    mask = attention_mask if isinstance(attention_mask, _AskedMask) else None
    check_attention_arguments(module, attention_mask if mask is None else None, kwargs)
    # Only the mask counts in transformers' own attention; the argument is for kernels that build the mask themselves.
    window = None if mask is None else mask.window
    argument = kwargs.get("sliding_window")
    if argument is not None and argument != window and not (window is None and mask and argument >= mask.length):
        raise UnsupportedModelError(
            f"{type(module).__name__} gives attention a sliding window of {argument} tokens and a mask of "
            f"{window or 'all'}."
        )
    given = {"sinks": kwargs.get("sinks", kwargs.get("s_aux")), "softcap": kwargs.get("softcap")}
    extras = tuple(name for name, value in given.items() if value is not None)
    module.polymoe_attention.see(module.layer_idx, query[0], key[0], value[0], window, extras)
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(_TRIAL, _trial_attention_forward)
AttentionMaskInterface.register(_TRIAL, _ask_mask)


class _TrialAttention:
    def __init__(self, layers: dict[int, AttentionLayer], tainted: int) -> None:
        self.layers, self.tainted = layers, tainted

    def see(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None,
        extras: tuple[str, ...],
    ) -> None:  # fmt: skip
        for tensor in (query, key, value):  # [heads, T, D]
            _check_local(tensor.transpose(0, 1).flatten(1), self.tainted, f"layer {layer}")
        if layer in self.layers:
            raise UnsupportedModelError(f"layer {layer} attends twice, which one cache a layer cannot hold.")
        self.layers[layer] = AttentionLayer(
            kv_heads=key.shape[0], key_dim=key.shape[2], value_dim=value.shape[2], sliding_window=window, extras=extras
        )


class _TrialExperts:
    def __init__(self, context: ForwardContext) -> None:
        self.context = context

    def forward(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        name = type(module).__name__
        if index.shape != weights.shape or index.shape[0] != hidden.shape[0]:
            raise UnsupportedModelError(f"{name} is not routed by (index, weight) pairs of each token.")
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                f"{name} normalises the output of each expert, which the expert pool does not do."
            )
        if strange := set(expert_tensor_names(module)) - _EXPERT_TENSORS:
            raise UnsupportedModelError(
                f"{name} has expert tensors that the pool does not use: {', '.join(sorted(strange))}."
            )
        self.context.batch.segments(hidden.shape[0])
        return hidden * 0 + weights.sum(dim=-1, keepdim=True).to(hidden.dtype) * 0  # zeros that keep NaN


class _TrialStack(VariantStack):
    """A stack of zeros whose matmuls cost nothing, whatever its size.

    uses: the operations that it met; "product" and "look-up" for those in which it is the weight.
    """

    uses: set[str]

    @staticmethod
    def __new__(
        cls, rows: torch.Tensor, row_map: RowMap, context: ForwardContext, token_axes: dict[int, int] | None = None
    ) -> "_TrialStack":
        stack: Any = VariantStack.__new__(cls, rows, row_map, context, token_axes)
        stack.uses = set()
        found: _TrialStack = stack
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in METADATA:
            for place, stack in enumerate((*args, *(kwargs or {}).values())):
                if isinstance(stack, _TrialStack):
                    stack.uses.add(_PRODUCTS.get((func, place), str(func)))
        if func is F.linear and isinstance(args[1], VariantStack) and not kwargs:
            x, weight = args[0], args[1]
            weight.context.batch.segments(x.numel() // x.shape[-1])
            assert x.shape[-1] == weight.shape[1]
            return x.sum(dim=-1, keepdim=True).mul(0).repeat(*(1,) * (x.ndim - 1), weight.shape[0])
        return super().__torch_function__(func, types, args, kwargs)


def trace(config: Any, look: Callable[[PreTrainedModel], None] | None = None) -> Trial:
    """Try the stock model of `config`. Raises `UnsupportedModelError` naming what cannot be served.

    look: called with the model before it runs.
    """
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS)
    if strange:
        raise UnsupportedModelError(
            f"{type(config).__name__} cannot be served: it has {', '.join(strange)} layers; "
            "only full and sliding-window attention is served."
        )
    name = type(config).__name__
    try:
        model = build_skeleton(config, _TRIAL)
        name = type(model).__name__
        if look is not None:
            look(model)
        layers = kind_of(config).attention_layers(model)
        return _run(model, config) if layers is None else Trial(layers, {})
    except (UnsupportedModelError, NotImplementedError) as error:
        raise UnsupportedModelError(f"{name} cannot be served: {error}") from error
    except Exception as error:  # a stock definition can fail in any way when it meets what it does not expect
        kind = type(error).__name__
        raise UnsupportedModelError(f"{name} cannot be served: a trial run of it fails ({kind}: {error})") from error


@torch.no_grad()
def _run(model: PreTrainedModel, config: Any) -> Trial:
    # Sizes that no axis of the model has, so that no other axis is taken for the tokens.
    sizes = {size for p in model.state_dict().values() for size in p.shape} | set(_integers(config.to_dict()))
    num_sampled, num_tokens = [p for p in _PRIMES if p not in sizes][:2]
    context = ForwardContext()
    stacks = _place_trial_stacks(model, context)
    layers: dict[int, AttentionLayer] = {}
    tainted = num_tokens - 2
    for module in model.modules():
        module.polymoe_attention = _TrialAttention(layers, tainted)
        module.polymoe_experts = _TrialExperts(context)

    def taint(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, tainted] = float("nan")
        return output

    model.get_input_embeddings().register_forward_hook(taint)
    # |--- variant 0 ---|--- variant 1 ---|; the last rows are sampled, one of variant 0 and the rest of variant 1
    context.set(
        ForwardBatch(
            tokens=segments_from_variants([0, 1], [num_tokens - num_sampled + 1, num_sampled - 1]),
            sampled=segments_from_variants([0, 1], [1, num_sampled - 1]),
        )
    )
    sampled = torch.arange(num_tokens - num_sampled, num_tokens)
    options = {"logits_to_keep": sampled} if accepts_logits_to_keep(model) else {}
    ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    output = model(input_ids=ids, position_ids=torch.arange(num_tokens)[None], use_cache=False, **options)
    logits = output.logits[0]
    if logits.shape[0] == num_tokens:
        logits = logits[sampled]
    if logits.shape[0] != num_sampled:
        raise UnsupportedModelError(f"it gives {logits.shape[0]} rows of logits for {num_sampled}.")
    _check_local(logits, tainted - (num_tokens - num_sampled), "the logits")
    if not layers:
        raise UnsupportedModelError("its attention does not go through transformers' registry.")
    products = {
        name for name, stack in stacks.items()
        if stack.ndim == 2 and stack.uses and stack.uses <= set(_PRODUCTS.values())
    }  # fmt: skip
    return Trial(layers, {weight: stack.token_axes for weight, stack in stacks.items()}, frozenset(products))


def _place_trial_stacks(model: PreTrainedModel, context: ForwardContext) -> dict[str, _TrialStack]:
    """Replace every weight but the experts by zeros for two variants.

    Each gets a row map of its own, as in service, where variants may share one weight and not another: two weights
    that meet before any token does cannot be combined.
    """
    experts = {f"{path}.{leaf}" for path, module in expert_modules(model) for leaf in expert_tensor_names(module)}
    tied = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    stacks: dict[str, _TrialStack] = {}
    for name, tensor in list(model.state_dict().items()):
        if name not in experts and name not in tied:
            dtype = tensor.dtype if not tensor.is_floating_point() else torch.float32
            stacks[name] = _TrialStack(torch.zeros((), dtype=dtype).expand(2, *tensor.shape), RowMap([0, 1]), context)
            set_weight(model, name, stacks[name])
    retie(model, tied)
    return stacks


def _check_local(rows: torch.Tensor, tainted: int, where: str) -> None:
    """`rows [T, …]`: only row `tainted` may hold NaN."""
    others = rows.isnan().any(dim=-1)
    others[tainted] = False
    if others.any():
        raise UnsupportedModelError(
            f"tokens reach each other before {where} other than through attention, and a paged KV cache keeps no such "
            "state."
        )


def _integers(value: Any) -> Iterator[int]:
    """All integers inside a config's dictionary."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)
