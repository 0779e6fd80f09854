"""How stored tensor names become a stock model's parameters. The only place that uses transformers' private loader API.

Checkpoints name tensors as transformers v4 did (one tensor an expert and matrix) or as v5 does (experts stacked).
transformers holds the renaming and merging rules of every architecture; `convert_and_load_state_dict_in_model` of
`transformers.core_model_loading` applies them to a whole model, `NameMap` to one target tensor at a time. It has none
for Switch Transformers, whose experts it keeps as modules; theirs are here.
Written against transformers 5.17 to 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from polymoe.errors import CheckpointError
from polymoe.model.stock.switch_experts import SwitchExperts
from polymoe.offline.checkpoint.source import some
from polymoe.offline.checkpoint.source_tensor import Load, SourceTensor


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
    nowhere.
    Raises `CheckpointError` when two stored tensors claim one target or a conversion rule fails on the stored shapes.
    """

    def __init__(self, model: Any, stored: Mapping[str, SourceTensor]) -> None:
        self.model, self.tensors = model, stored
        self.unmatched: list[str] = []
        self.targets: dict[str, Target] = {}
        # The rules run on meta tensors first: that gives names and shapes of all results without reading any data.
        shapes = {
            name: torch.empty(entry.shape, dtype=entry.dtype or torch.uint8, device="meta")
            for name, entry in stored.items()
        }
        for recipe in self._collect(stored):
            for target, tensor in self._apply(recipe, shapes.__getitem__).items():
                if target in self.targets:
                    names = [name for other in (self.targets[target].recipe, recipe) for _, name in other.sources]
                    raise CheckpointError(
                        f"{some(names)} all become {target}; the checkpoint stores it twice; save the "
                        "model again with one of them."
                    )
                self.targets[target] = Target(tuple(tensor.shape), tensor.dtype, recipe)

    def read(self, target: str, load: Load) -> Tensor:
        """Make one target; `load` is called for the stored tensors that it is made of, and no others."""
        return self._apply(self.targets[target].recipe, lambda name: self.tensors[name].make(load))[target]

    def _collect(self, stored: Mapping[str, SourceTensor]) -> list[Recipe]:
        """Group the stored names by the target they make, as transformers' loader does (natural order of names)."""
        rules = get_model_conversion_mapping(self.model) + _stacking_rules(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        recipes: dict[str, Recipe] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                # A rule fired on a name that was right already.
                target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
            if target not in state:
                self.unmatched.append(name)
                continue
            converter = None if pattern is None else by_pattern[pattern]
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
    if not any(isinstance(module, SwitchExperts) for module in model.modules()):
        return []
    return [
        WeightConverter(f".experts.expert_*.{stored}.weight", f".experts.{stacked}", [MergeModulelist(dim=0)])
        for stored, stacked in (("wi", "up_proj"), ("wo", "down_proj"))
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
