"""Can a stock module run by itself, sequence by sequence and chunk by chunk? Found out with numbers, not assumed.

One module of each kind is given made-up weights and a made-up sequence, and must compute the same

- in one call and in chunks, with transformers' cache between them: then what tokens tell each other is in the cache;
- alone and beside another sequence, whose states were put together: then sequences do not meet.

Where it computes the same beside a sequence of another variant too, with stacks of both for weights, one call serves
all sequences that decode. Stock code that forgets the cache when it is given several tokens is found out so, and given
its tokens one by one.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import Cache

from polymoe.errors import UnsupportedModelError
from polymoe.model.backends.context import ForwardContext
from polymoe.model.batch.batch import ForwardBatch, RowMap, segments_from_variants
from polymoe.model.per_variant.module import Call, run_stock
from polymoe.model.per_variant.sequence_states import joined, tensors_of
from polymoe.model.per_variant.spec import MaskFunction, PerVariantSpec, StateSize, TokenAxes
from polymoe.model.variants.variant_stack import VariantStack

_STRIDES = (1, 7, 61, 401, 2003)
_TOLERANCE = 1e-3  # of the largest output


class NotPerVariantError(UnsupportedModelError):
    """This module cannot run by itself; perhaps the one around it can."""


@dataclass(frozen=True)
class Learned:
    """How modules of one kind run, and the results (shapes, for as many tokens as the trial has) that they give."""

    spec: PerVariantSpec
    results: Call


class ModuleTrial:
    """Tries one module on the arguments that it was called with.

    Args:
        module: on the meta device; gets made-up weights for as long as it is tried.
        stock: its own forward.
        call: the arguments; what depends on the tokens is NaN somewhere.
        masks: which of them are masks, and what these show.
        num_tokens: of the call, the size of no other axis.
        initialise: the stock model's own initialiser of a module.
    """

    def __init__(
        self, module: Any, stock: Any, cache_argument: str | None, call: Call, masks: dict[int, MaskFunction],
        num_tokens: int, new_cache: Callable[[], Cache], initialise: Callable[[Any], object],
    ) -> None:  # fmt: skip
        self.initialise = initialise
        self.module, self.stock, self.new_cache, self.num_tokens = module, stock, new_cache, num_tokens
        self.leaves, self.tree = call
        axes = {i: TokenAxes.of(x, num_tokens) for i, x in enumerate(self.leaves) if isinstance(x, torch.Tensor)}
        self.inputs = {i: found for i, found in axes.items() if found is not None}
        self.spec = PerVariantSpec(cache_argument, self.inputs, masks, {}, StateSize(), one_by_one=False)
        self.first, self.second = self._sequence(0), self._sequence(1)

    def learn(self) -> Learned:
        """Raises `NotPerVariantError`."""
        name = type(self.module).__name__
        if not any(self.leaves[i].is_floating_point() for i in self.inputs):
            raise NotPerVariantError(f"{name} is given no tokens.")
        with _made_up_weights(self.module, self.initialise):
            whole, tree = self._call(self.first, 0, self.num_tokens, self.new_cache())
            found = {i: TokenAxes.of(x, self.num_tokens) for i, x in enumerate(whole) if isinstance(x, torch.Tensor)}
            outputs = {i: axes for i, axes in found.items() if axes is not None}
            if not outputs or not any(whole[i].any() for i in outputs):
                raise NotPerVariantError(f"{name} gives nothing that its tokens decide.")
            self.spec = replace(self.spec, outputs=outputs)
            early, late = 5, self.num_tokens - 1
            cuts = [0, early, late, self.num_tokens]
            if not self._agrees(whole, cuts):
                self.spec = replace(self.spec, one_by_one=True)
                if not self._agrees(whole, [0, *range(early, self.num_tokens + 1)]):
                    raise NotPerVariantError(
                        f"{name} lets tokens reach each other by other ways than transformers' cache."
                    )
            self.spec = replace(self.spec, state=self._state_size())
            if self.spec.together:
                self._check_apart(whole, late)
        if self.spec.together:
            self.spec = replace(self.spec, joint=self._is_joint(late))
        shapes = [x.new_zeros(()).expand(x.shape) if isinstance(x, torch.Tensor) else x for x in whole]
        return Learned(self.spec, (shapes, tree))

    def _sequence(self, seed: int) -> list[Any]:
        """The arguments with numbers in place of all that depends on tokens."""
        generator = torch.Generator().manual_seed(seed)
        leaves = list(self.leaves)
        for i in self.inputs:
            if leaves[i].isnan().any():
                leaves[i] = torch.randn(leaves[i].shape, generator=generator)
        return leaves

    def _call(self, sequence: list[Any], start: int, end: int, cache: Cache | None) -> Call:
        """Tokens `start : end` of a sequence (or of several, of which `cache` has the states)."""
        leaves = list(sequence)
        for i, axes in self.inputs.items():
            leaves[i] = leaves[i].narrow(axes.tokens, start, end - start)
        try:
            return run_stock(self.module, self.stock, self.spec, (leaves, self.tree), cache, start)
        except Exception as error:  # a stock definition can fail in any way when it meets what it does not expect
            reason = f"{type(error).__name__}: {error}"
            raise NotPerVariantError(f"{type(self.module).__name__} does not run by itself ({reason})") from error

    def _agrees(self, whole: list[Any], cuts: list[int]) -> bool:
        """Whether the sequence gives the same cut into chunks.

        A result of which another axis grows with the sequence (chosen keys) is none of these: nobody gets to see it.
        """
        cache = self.new_cache()
        pieces = [self._call(self.first, start, end, cache)[0] for start, end in pairwise(cuts)]
        outputs = {}
        for i, axes in self.spec.outputs.items():
            shapes = [piece[i].shape for piece in pieces]
            if len({(*shape[: axes.tokens], *shape[axes.tokens + 1 :]) for shape in shapes}) == 1:
                outputs[i] = axes
        for i, axes in outputs.items():
            if not _close(torch.cat([piece[i] for piece in pieces], dim=axes.tokens), whole[i]):
                return False
        self.spec = replace(self.spec, outputs=outputs)
        return bool(outputs)

    def _state_size(self) -> StateSize:
        cache, sizes = self.new_cache(), []
        for start, end in pairwise([0, self.num_tokens // 2, self.num_tokens - 1, self.num_tokens]):
            self._call(self.first, start, end, cache)
            found = list(tensors_of(cache))
            sizes.append((end, sum(t.numel() for t in found), sum(t.numel() * t.element_size() for t in found)))
        if sizes[0][1] == sizes[-1][1]:
            return StateSize(fixed=sizes[0][2])
        grown = max(0, *(-(-(numbers - sizes[0][1]) // (tokens - sizes[0][0])) for tokens, numbers, _ in sizes[1:]))
        rest = max(0, *(numbers - grown * tokens for tokens, numbers, _ in sizes))
        return StateSize(fixed=4 * rest, per_token=grown)

    def _check_apart(self, whole: list[Any], late: int) -> None:
        """The last token of two sequences in one call; without an axis for sequences every token must stand alone."""
        name = type(self.module).__name__
        if any(axes.batch is None for axes in self.inputs.values()):
            if self.spec.cache_argument is not None or not self._agrees(whole, list(range(self.num_tokens + 1))):
                raise NotPerVariantError(f"{name} has no axis for sequences, and its tokens reach each other.")
            return
        caches = []
        for sequence in (self.first, self.second):
            caches.append(self.new_cache())
            for start, end in pairwise(range(late + 1) if self.spec.one_by_one else [0, late]):
                self._call(sequence, start, end, caches[-1])
        both = list(self.first)
        for i, axes in self.inputs.items():
            assert axes.batch is not None
            both[i] = torch.cat([self.first[i], self.second[i]], dim=axes.batch)
        together = self._call(both, late, late + 1, joined([(part, 0, 1) for part in caches]))[0]
        for i, axes in self.spec.outputs.items():
            assert axes.batch is not None
            if not _close(together[i].narrow(axes.batch, 0, 1), whole[i].narrow(axes.tokens, late, 1)):
                raise NotPerVariantError(f"{name} mixes the sequences of a batch.")

    def _is_joint(self, late: int) -> bool:
        """Whether the last tokens of three sequences, one of a first and two of a second variant, give in one call what
        each gives alone."""
        if self.spec.cache_argument is None or any(axes.batch is None for axes in self.inputs.values()):
            return False
        sequences = [self._sequence(2), self.second, self.first]
        owners = [0, 1, 1]
        caches: list[Any] = []
        alone: list[Any] = []
        for variant in (1, 0):
            with _made_up_weights(self.module, self.initialise, variant) as stacks:
                for sequence in [s for s, owner in zip(sequences, owners, strict=True) if owner == variant][::-1]:
                    cache = self.new_cache()
                    for start, end in pairwise(range(late + 1) if self.spec.one_by_one else [0, late]):
                        self._call(sequence, start, end, cache)
                    caches.insert(0, joined([(cache, 0, 1)]))
                    alone.insert(0, self._call(sequence, late, late + 1, cache)[0])
                if variant:
                    continue
                own = segments_from_variants(owners, [1] * len(owners))
                context = ForwardContext()
                context.set(ForwardBatch(tokens=own, sampled=own, shape=(len(owners), 1)))
                for part, name, rows in stacks:  # each with a map of its own, as in service
                    vars(part)[name] = VariantStack(rows, RowMap([0, 1]), context)
                together = list(self.first)
                for i, axes in self.inputs.items():
                    assert axes.batch is not None
                    together[i] = torch.cat([sequence[i] for sequence in sequences], dim=axes.batch)
                try:
                    outputs = self._call(together, late, late + 1, joined([(part, 0, 1) for part in caches]))[0]
                except NotPerVariantError:
                    return False
        for i, axes in self.spec.outputs.items():
            assert axes.batch is not None
            for row, expected in enumerate(alone):
                if not _close(outputs[i].narrow(axes.batch, row, 1), expected[i]):
                    return False
        return True


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= _TOLERANCE * max(float(b.abs().max()), 1e-6)


@contextmanager
def _made_up_weights(
    module: torch.nn.Module, initialise: Callable[[Any], object], variant: int = 0
) -> Iterator[list[tuple[Any, str, torch.Tensor]]]:
    """Weights of one of two variants that differ from each other and take no memory: all rows lie in a short strip of
    noise. Gives (part, name, both variants' rows) of each.

    Buffers may belong together (powers of the same decay), so they are what the model's initialiser makes of them.
    """
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[Any, dict[str, Any], str, Any]] = []
    stacks: list[tuple[Any, str, torch.Tensor]] = []

    def replace_by(part: Any, holder: dict[str, Any], name: str, value: torch.Tensor) -> None:
        kept.append((part, holder, name, holder.pop(name)))
        vars(part)[name] = value

    def stack(part: Any, name: str, like: torch.Tensor) -> torch.Tensor:
        stacks.append((part, name, _noise(like, generator)))
        return stacks[-1][2][variant]

    try:
        for part in module.modules():
            buffers = {name: value for name, value in part._buffers.items() if value is not None and value.is_meta}
            for name, value in buffers.items():
                replace_by(part, part._buffers, name, torch.zeros_like(value, device="cpu"))
            if buffers:
                initialise(part)
            for name in buffers:
                if not vars(part)[name].any():
                    vars(part)[name] = stack(part, name, vars(part)[name])
            for name, weight in list(part._parameters.items()):
                if weight is not None and weight.is_meta:
                    replace_by(part, part._parameters, name, stack(part, name, weight))
        yield stacks
    finally:
        for part, holder, name, value in kept:
            vars(part).pop(name, None)
            holder[name] = value


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Two tensors like it: `[2, *shape]`."""
    shape = (2, *like.shape)
    if not like.dtype.is_floating_point:
        return torch.zeros(shape, dtype=like.dtype)
    strides = _STRIDES[: len(shape)][::-1]
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    inputs = torch.Size(shape[2:]).numel() if len(shape) > 2 else 4
    strip: torch.Tensor = torch.randn(length, generator=generator) / math.sqrt(max(inputs, 1))
    return strip.as_strided(shape, strides)
