"""A trial run of the stock forward pass: can polymoe serve this model, and where in its tensors are the tokens?

Two variants stand in every weight, all zeros without memory, so that any size takes seconds. Experts and attention are
left out. The run refuses, naming the reason, what could otherwise go wrong in silence at request time:

- an operation on a weight that `VariantStack` does not know;
- attention that is not causal, full or over a sliding window: the mask the model asks for is read and compared;
- tokens that reach each other outside attention (convolutions, state-space layers, token shifts): one token is NaN, and
  no other may become it.

A module that reads or writes a state in transformers' cache, and one that stumbles here over an operation or a mask, is
tried as one that runs once for each variant, and so are all of its class: `module_trial.py` proves that it can. If not,
the module around it is.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers import Cache, PreTrainedModel

from polymoe.errors import UnsupportedModelError
from polymoe.model.attention.paged import AttentionLayer
from polymoe.model.backends.context import ForwardContext
from polymoe.model.batch.batch import ForwardBatch, RowMap, segments_from_variants
from polymoe.model.per_variant.module import argument_names, attend_as_stock, flat_call
from polymoe.model.per_variant.spec import PerVariantSpec, TokenAxes
from polymoe.model.stock.asked_mask import AskedMask
from polymoe.model.stock.choice import Choice
from polymoe.model.stock.kind import kind_of
from polymoe.model.stock.module_trial import Learned, ModuleTrial
from polymoe.model.stock.skeleton import (
    accepts_logits_to_keep,
    build_skeleton,
    expert_modules,
    expert_tensor_names,
    retie,
    set_weight,
)
from polymoe.model.stock.stand_ins import TRIAL, USES, TrialAttention, TrialExperts, TrialStack, check_local
from polymoe.model.stock.stateful import cache_argument, cache_factory, stateful_modules

_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113)


@dataclass(frozen=True)
class Trial:
    """What the trial run learned."""

    attention_layers: dict[int, AttentionLayer]  # layer index -> shape of its cache
    token_axes: dict[str, dict[int, int]]  # weight -> what its `VariantStack` must know
    per_variant: dict[str, PerVariantSpec] = field(default_factory=dict)  # module -> how it runs by itself
    products: frozenset[str] = frozenset()  # matrices that are multiplied by or looked up in, and nothing else


def trace(config: Any, look: Callable[[PreTrainedModel], None] | None = None) -> Trial:
    """Try the stock model of `config`. Raises `UnsupportedModelError` naming what cannot be served.

    look: called with the model before it runs.
    """
    name = type(config).__name__
    try:
        choice: Choice | None = None
        while True:
            model = build_skeleton(config, TRIAL, torch.float32)  # a comparison, whatever the checkpoint's dtype
            name = type(model).__name__
            if look is not None:
                look(model)
            layers = kind_of(config).attention_layers(model)
            if layers is not None:
                return Trial(layers, {})
            choice = choice or Choice(stateful_modules(model))
            attempt = _Attempt(model, config, choice.paths)
            try:
                return attempt.run()
            except Exception as error:
                choice.widen(model, attempt.inside, error)
    except (UnsupportedModelError, NotImplementedError) as error:
        raise UnsupportedModelError(f"{name} cannot be served: {error}") from error
    except Exception as error:  # a stock definition can fail in any way when it meets what it does not expect
        kind = type(error).__name__
        raise UnsupportedModelError(f"{name} cannot be served: a trial run of it fails ({kind}: {error})") from error


class _TrialModule:
    """Stands for a module that runs once for each variant: sees to it that each of its tokens is one token's own."""

    def __init__(self, attempt: "_Attempt", path: str, module: Any) -> None:
        self.attempt, self.path, self.module = attempt, path, module
        self.stock, self.names, self.cache_argument = module.forward, argument_names(module), cache_argument(module)
        layer_types = getattr(attempt.config.get_text_config(), "layer_types", None) or ()
        layer = getattr(module, "layer_idx", None)
        kind = layer_types[layer] if isinstance(layer, int) and layer < len(layer_types) else None
        shapes = tuple((name, tensor.shape) for name, tensor in module.state_dict().items())
        self.kind = (type(module), shapes, kind)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attempt = self.attempt
        leaves, tree = flat_call(self.names, args, kwargs)
        masks = {i: leaf.function for i, leaf in enumerate(leaves) if isinstance(leaf, AskedMask)}
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                attempt.check_local(leaf, self.path)
        learned = attempt.learned.get(self.kind)
        if learned is None:
            learned = attempt.learned[self.kind] = ModuleTrial(
                self.module, self.stock, self.cache_argument, (leaves, tree), masks, attempt.num_tokens,
                attempt.new_cache, attempt.model._init_weights,
            ).learn()  # fmt: skip
        attempt.specs[self.path] = learned.spec
        results: list[Any] = []
        for i, leaf in enumerate(learned.results[0]):
            axes = learned.spec.outputs.get(i)
            if axes is None:
                results.append(None if isinstance(leaf, torch.Tensor) else leaf)
                continue
            results.append(leaf.clone())
            if leaf.is_floating_point():
                results[-1].select(axes.tokens, attempt.tainted).fill_(float("nan"))
        return pytree.tree_unflatten(results, learned.results[1])


class _Attempt:
    """One trial run, in which the modules `paths` stand by themselves."""

    def __init__(self, model: PreTrainedModel, config: Any, paths: list[str]) -> None:
        self.model, self.config, self.paths = model, config, paths
        self.learned: dict[Any, Learned] = {}
        self.specs: dict[str, PerVariantSpec] = {}
        self.new_cache = cache_factory(model, config)
        self._running = [""]
        # Sizes that no axis of the model has, so that no other axis is taken for the tokens.
        sizes = {size for p in model.state_dict().values() for size in p.shape} | set(_integers(config.to_dict()))
        self.num_sampled, self.num_tokens = [p for p in _PRIMES if p not in sizes][:2]
        self.tainted = self.num_tokens - 2
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda _module, _args, path=path: self._running.append(path))
            module.register_forward_hook(lambda _module, _args, _output: (self._running.pop(), None)[1])
        for path in paths:
            module = model.get_submodule(path)
            attend_as_stock(module)
            module.forward = _TrialModule(self, path, module)

    @property
    def inside(self) -> str:
        """The module that is running, or was when the attempt failed."""
        return self._running[-1]

    def check_local(self, x: torch.Tensor, where: str) -> None:
        """Only the tainted token of an argument may hold NaN."""
        axes = TokenAxes.of(x, self.num_tokens)
        rows = x.flatten()[None] if axes is None else x.movedim(axes.tokens, 0).flatten(1)
        check_local(rows, self.tainted if axes is not None else None, where)

    @torch.no_grad()
    def run(self) -> Trial:
        """Raises whatever the stock model does, and `UnsupportedModelError`."""
        model, num_sampled, num_tokens = self.model, self.num_sampled, self.num_tokens
        context = ForwardContext()
        stacks = _place_trial_stacks(model, context, self.paths)
        layers: dict[int, AttentionLayer] = {}
        for module in model.modules():
            module.polymoe_attention = TrialAttention(layers, self.tainted)
            module.polymoe_experts = TrialExperts(context)

        def taint(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[0, self.tainted] = float("nan")
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
        check_local(logits, self.tainted - (num_tokens - num_sampled), "the logits")
        if not layers and not any(spec.cache_argument for spec in self.specs.values()):
            raise UnsupportedModelError("its attention does not go through transformers' registry.")
        _check_caches(self.new_cache(), layers)
        products = {
            name for name, stack in stacks.items()
            if stack.ndim == 2 and stack.uses and stack.uses <= set(USES.values())
        }  # fmt: skip
        axes = {weight: stack.token_axes for weight, stack in stacks.items()}
        return Trial(layers, axes, self.specs, frozenset(products))


def _check_caches(cache: Any, layers: Iterable[int]) -> None:
    """The stock model's own cache keeps of each layer what paged attention does: a class of the model's own may drop
    tokens by other rules, of which a pass without a cache shows nothing."""
    for layer, kept in enumerate(getattr(cache, "layers", ())):
        if layer in layers and type(kept).__module__ != Cache.__module__:
            raise UnsupportedModelError(f"its cache ({type(kept).__name__}) has rules of its own of what is kept.")


def _place_trial_stacks(model: PreTrainedModel, context: ForwardContext, alone: list[str]) -> dict[str, TrialStack]:
    """Replace every weight but the experts, and those below the modules `alone`, by zeros for two variants.

    Each gets a row map of its own, as in service, where variants may share one weight and not another: two weights
    that meet before any token does cannot be combined.
    """
    experts = {f"{path}.{leaf}" for path, module in expert_modules(model) for leaf in expert_tensor_names(module)}
    tied = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    stacks: dict[str, TrialStack] = {}
    for name, tensor in list(model.state_dict().items()):
        if name not in experts and name not in tied and not any(name.startswith(f"{path}.") for path in alone):
            dtype = tensor.dtype if not tensor.is_floating_point() else torch.float32
            stacks[name] = TrialStack(torch.zeros((), dtype=dtype).expand(2, *tensor.shape), RowMap([0, 1]), context)
            set_weight(model, name, stacks[name])
    retie(model, tied)
    return stacks


def _integers(value: Any) -> Iterator[int]:
    """All integers inside a config's dictionary."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)
