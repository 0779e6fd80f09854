"""How stored tensor names become a stock model's parameters. The only place that uses transformers' private loader API.

Checkpoints name tensors as transformers v4 did (one tensor an expert and matrix) or as v5 does (experts stacked).
transformers holds the renaming and merging rules of every architecture; `convert_and_load_state_dict_in_model` of
`transformers.core_model_loading` applies them to a whole model, `NameMap` to one target tensor at a time. It has none
for Switch Transformers, whose experts it keeps as modules; theirs are here.
Written against transformers 5.17 to 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from polymoe.errors import CheckpointError
from polymoe.model.stock.kind import kind_of
from polymoe.model.stock.language_part import is_left_out
from polymoe.offline.checkpoint.source import some
from polymoe.offline.checkpoint.source_tensor import Load, SourceTensor

# Where a multimodal checkpoint has its text model: `model.language_model.layers.0…`, `language_model.model.layers.0…`
_LANGUAGE_MODEL = re.compile(r"^(model\.)?language_model\.")


@dataclass
class Recipe:
    """The stored tensors, with the pattern that matched each, that make one group of targets together."""

    target: str  # the first of the group
    converter: Any | None  # None: a plain rename
    sources: list[tuple[str, str]] = field(default_factory=list)  # (pattern, stored name), in natural order


@dataclass(frozen=True)
class Target:
    """One parameter or buffer of the stock model and how to make it. Shape and dtype are those of the stored data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    recipe: Recipe


class NameMap:
    """All targets that a checkpoint's tensors make in `model` (on the meta device).

    `tensors`: stored name -> how to read it. `targets`: target name -> Target. `unmatched`: stored names that map
    nowhere; `left_out`: those of them that belong to parts that the model was built without.
    Raises `CheckpointError` when two stored tensors claim one target or a conversion rule fails on the stored shapes.
    """

    def __init__(self, model: Any, stored: Mapping[str, SourceTensor]) -> None:
        self.model, self.tensors = model, dict(stored)
        self.edits: dict[str, list[Callable[[Tensor], Tensor]]] = {}  # target -> what is done to it, in order
        rules = get_model_conversion_mapping(model) + _stacking_rules(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._state = model.state_dict()
        self.unmatched: list[str] = []
        self.left_out: set[str] = set()
        self.targets: dict[str, Target] = {}
        # The rules run on meta tensors first: that gives names and shapes of all results without reading any data.
        shapes = {
            name: torch.empty(entry.shape, dtype=entry.dtype or torch.uint8, device="meta")
            for name, entry in stored.items()
        }
        for recipe in self._collect(stored):
            for target, tensor in self._apply(recipe, shapes.__getitem__).items():
                if target not in self._state and is_left_out(model, target):
                    continue  # stored together with what is read
                if target in self.targets:
                    names = [name for other in (self.targets[target].recipe, recipe) for _, name in other.sources]
                    raise CheckpointError(
                        f"{some(names)} all become {target}; the checkpoint stores it twice; save the "
                        "model again with one of them."
                    )
                self.targets[target] = Target(tuple(tensor.shape), tensor.dtype, recipe)

    def read(self, target: str, load: Load) -> Tensor:
        """Make one target; `load` is called for the stored tensors that it is made of, and no others."""
        tensor = self._apply(self.targets[target].recipe, lambda name: self.tensors[name].make(load))[target]
        for edit in self.edits.get(target, ()):
            tensor = edit(tensor)
        return tensor

    def rename(self, name: str) -> tuple[str, str | None]:
        """The target that a stored name becomes, and the pattern of the rule that combines it with others, if any."""
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if target not in self._state and name in self._state:
            # A rule fired on a name that was right already.
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=self._state)
        if target not in self._state and (inner := _LANGUAGE_MODEL.sub("", name)) != name:
            return self.rename(inner if inner in self._state or inner.startswith(f"{prefix}.") else f"{prefix}.{inner}")
        return target, pattern

    def target_of(self, name: str) -> str | None:
        """The target that the stored tensor `name` is a part of; None for one that is not read."""
        target, _ = self.rename(name)
        return target if target in self._state else None

    def row_of(self, name: str, target: str, pattern: str) -> tuple[int, int, int] | None:
        """Where the tensor of one expert, as transformers 4 named it, lies in a stack that transformers 5 stored:
        (expert, i, n), for the i-th of n equal parts along the expert's first axis. None where the rule is another."""
        rule = self._converter(pattern)
        kinds = [type(operation) for operation in rule.operations]
        index = re.search(r"\.experts\.(\d+)\.", name)
        simple = kinds in ([MergeModulelist], [MergeModulelist, Concatenate])
        if not simple or index is None or any(op.dim != i for i, op in enumerate(rule.operations)):
            return None
        experts = self.targets[target].shape[0]
        if int(index[1]) >= experts:
            return None
        return int(index[1]), rule.source_patterns.index(pattern), len(rule.source_patterns)

    def _converter(self, pattern: str) -> Any:
        return next(rule for rule in reversed(self._converters) if pattern in rule.source_patterns)

    def _collect(self, stored: Mapping[str, SourceTensor]) -> list[Recipe]:
        """Group the stored names by the target they make, as transformers' loader does (natural order of names)."""
        recipes: dict[str, Recipe] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self.rename(name)
            if target not in self._state:
                self.unmatched.append(name)
                if is_left_out(self.model, target):
                    self.left_out.add(name)
                continue
            converter = None if pattern is None else self._converter(pattern)
            recipe = recipes.setdefault(target, Recipe(target, converter))
            if recipe.converter is not converter or (converter is None and recipe.sources):
                raise CheckpointError(
                    f"{some([s for _, s in recipe.sources] + [name])} all become {target}; "
                    "the checkpoint stores it twice; save the model again with one of them."
                )
            recipe.sources.append((name if pattern is None else pattern, name))
        for recipe in recipes.values():
            _check_numbering(recipe)
        return list(recipes.values())

    def _apply(self, recipe: Recipe, load: Load) -> dict[str, Tensor]:
        if recipe.converter is None:
            return {recipe.target: load(recipe.sources[0][1])}
        converter = deepcopy(recipe.converter)
        for pattern, name in recipe.sources:
            # Callables are resolved inside `convert`; data is read only there.
            converter.add_tensor(recipe.target, name, pattern, lambda name=name: load(name))
        try:
            made = converter.convert(recipe.target, model=self.model, config=self.model.config)
        except CheckpointError:
            raise
        except Exception as error:  # transformers' rules raise whatever torch raises
            names = [name for _, name in recipe.sources]
            raise CheckpointError(
                f"{some(names)} cannot be combined into {recipe.target}: {error} "
                "Is a tensor missing or of another shape than its neighbours?"
            ) from error
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def _stacking_rules(model: Any) -> list[WeightConverter]:
    """For experts that polymoe stacked itself, the rules that transformers has for those it stacks."""
    return [
        WeightConverter(f".experts.expert_*.{stored}", f".experts.{stacked}", [MergeModulelist(dim=0)])
        for stored, stacked in kind_of(model.config).stacked.items()
    ]


def _check_numbering(recipe: Recipe) -> None:
    """Stacked sources must be numbered 0, 1, 2 …: a gap would silently shift every later expert."""
    numbered: dict[str, list[str]] = {}
    for pattern, name in recipe.sources:
        if "*" in pattern:
            numbered.setdefault(pattern, []).append(name)
    for pattern, names in numbered.items():
        shape = re.escape(pattern).replace(r"\*", r"(\d+)").removeprefix(r"\^")
        indices = [match[1] for name in names if (match := re.search(shape, name))]
        if len(indices) == len(names) and [int(i) for i in indices] != list(range(len(names))):
            raise CheckpointError(
                f"{some(names)}: numbered {', '.join(indices)}; experts are missing in between. Is a shard "
                "missing? Download it again."
            )
