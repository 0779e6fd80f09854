"""A stock module that runs once for each variant of a step, on that variant's rows, with plain weights; once for all
sequences that decode, with stacks for weights, where a trial run has shown that it can.

So runs what a variant stack cannot: layers that read and write a state of their sequence (linear attention, state
spaces, convolutions, sparse attention), and modules with operations that stacks do not know. The module's own forward
computes, unmodified, behind transformers' own cache interface; what is here takes rows apart and puts them together.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from polymoe.model.backends.context import ForwardContext
from polymoe.model.per_variant.operations import with_fast_operations
from polymoe.model.per_variant.plain_weights import PlainWeights
from polymoe.model.per_variant.sequence_states import Group, SequenceStates
from polymoe.model.per_variant.spec import MaskFunction, PerVariantSpec

Call = tuple[list[Any], Any]  # leaves, and the tree they hang on


class PerVariantModule:
    """The forward of such a module.

    Args:
        module: the stock module, whose weights are in place.
        spec: what a trial run learned of it.
        states: of the model's sequences.
        context: the model's, which its weights share.
    """

    def __init__(self, module: Any, spec: PerVariantSpec, states: SequenceStates, context: ForwardContext) -> None:
        self._module, self._spec, self._states, self._context = module, spec, states, context
        self._weights = PlainWeights(module)
        self._stock = with_fast_operations(module)
        self._names = argument_names(module)

    def renew(self) -> None:
        """After a weight of the module became a stack."""
        self._weights = PlainWeights(self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spec = self._spec
        leaves, tree = flat_call(self._names, args, kwargs)
        result: list[Any] = []
        for group in self._states.groups:
            inputs = list(leaves)
            for leaf, axes in spec.inputs.items():
                inputs[leaf] = axes.pick(leaves[leaf], group.rows, group.shape)
            with self._weights.of(group.variant) if group.batch is None else self._context.within(group.batch):
                outputs, out_tree = self._run(group, inputs, tree)
            if not result:
                result = [None if isinstance(x, torch.Tensor) else x for x in outputs]
            for leaf, axes in spec.outputs.items():
                rows = axes.flat(outputs[leaf])
                if len(self._states.groups) == 1:
                    result[leaf] = rows
                    continue
                if result[leaf] is None:
                    shape = list(rows.shape)
                    shape[axes.tokens] = sum(b * length for b, length in (g.shape for g in self._states.groups))
                    result[leaf] = rows.new_empty(shape)
                if isinstance(group.rows, slice):
                    result[leaf].narrow(axes.tokens, group.rows.start, rows.shape[axes.tokens]).copy_(rows)
                else:
                    result[leaf].index_copy_(axes.tokens, group.rows, rows)
        return pytree.tree_unflatten(result, out_tree)

    def _run(self, group: Group, inputs: list[Any], tree: Any) -> Call:
        """One group's call: where the stock code forgets what was before, token by token."""
        if not self._spec.one_by_one or not group.computed or group.shape[1] == 1:
            return run_stock(self._module, self._stock, self._spec, (inputs, tree), group.cache, group.computed)
        pieces = []
        for position in range(group.shape[1]):
            token = list(inputs)
            for leaf, axes in self._spec.inputs.items():
                token[leaf] = inputs[leaf].narrow(axes.tokens, position, 1)
            call = token, tree
            piece, out_tree = run_stock(
                self._module, self._stock, self._spec, call, group.cache, group.computed + position
            )
            pieces.append(piece)
        outputs = list(pieces[0])
        for leaf, axes in self._spec.outputs.items():
            outputs[leaf] = torch.cat([piece[leaf] for piece in pieces], dim=axes.tokens)
        return outputs, out_tree


def run_stock(module: Any, stock: Any, spec: PerVariantSpec, call: Call, cache: Any, computed: int) -> Call:
    """Call a stock forward for sequences of which `computed` tokens are in the cache.

    Masks are made here as transformers makes them: 0 where a token is visible, the lowest number elsewhere.
    """
    leaves, tree = call
    if spec.masks:
        leaves = list(leaves)
        length = leaves[next(iter(spec.inputs))].shape[next(iter(spec.inputs.values())).tokens]
        sizes = cache.get_mask_sizes(length, _layer_of(module))
        like = next(leaves[leaf] for leaf in spec.inputs if leaves[leaf].is_floating_point())
        for leaf, function in spec.masks.items():
            mask = _dense_mask(function, computed, length, sizes, like)
            leaves[leaf] = mask.expand(_batch_of(leaves, spec), -1, -1, -1)
    arguments = pytree.tree_unflatten(leaves, tree)
    if spec.cache_argument is not None:
        arguments[spec.cache_argument] = cache
    return pytree.tree_flatten(stock(**arguments))


def _dense_mask(
    function: MaskFunction, computed: int, length: int, keys: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """`[1, 1, L, keys]` for queries that follow `computed` tokens; keys: (how many there are, which is the first)."""
    count, first = keys
    queries = torch.arange(computed, computed + length, device=like.device)
    visible = torch.as_tensor(function(0, 0, queries[:, None], torch.arange(first, first + count, device=like.device)))
    mask = torch.zeros(1, 1, length, count, dtype=like.dtype, device=like.device)
    return mask.masked_fill(~visible.to(like.device), torch.finfo(like.dtype).min)


def _batch_of(leaves: Sequence[Any], spec: PerVariantSpec) -> int:
    """How many sequences a call is for: a stock module may join its mask to something of each of them."""
    sizes = (leaves[leaf].shape[axes.batch] for leaf, axes in spec.inputs.items() if axes.batch is not None)
    return next(sizes, 1)


def _layer_of(module: Any) -> int:
    """The layer of the cache that a module's own code, or that of a part of it, uses."""
    return int(next(part.layer_idx for part in module.modules() if hasattr(part, "layer_idx")))


def argument_names(module: Any) -> list[str]:
    """What the positional arguments of a module's forward are called."""
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in positional]


def flat_call(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """All arguments by name, flattened."""
    return pytree.tree_flatten({**dict(zip(names, args, strict=False)), **kwargs})


def attend_as_stock(module: torch.nn.Module) -> None:
    """Let attention inside `module` be transformers' plainest, with a mask: it sees the rows of one call only."""
    part: Any
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            part.config = copy.copy(config)
            part.config._attn_implementation_internal = "eager"


def install(
    model: torch.nn.Module, specs: Mapping[str, PerVariantSpec], states: SequenceStates, context: ForwardContext
) -> list[PerVariantModule]:
    """Replace the forward of each module named in `specs`, whose weights are in place. Returns what replaced them."""
    installed = []
    for path, spec in specs.items():
        module: Any = model.get_submodule(path)
        attend_as_stock(module)
        module.forward = PerVariantModule(module, spec, states, context)
        installed.append(module.forward)
    return installed
