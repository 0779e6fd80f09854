"""What a stock model computes, without its weights: two configs that give the same computation are one model.

The model is built on the meta device in its real size and put through the trial run. What it computes follows from its
modules (their classes, plain attributes and computed buffers), from the masks it asks for, and from the config fields
that it still reads in its forward pass. So `"head_dim": 8` where 8 is what the model takes anyway, or the
`max_window_layers` of a model without windows, make no difference here; a clipping value that random inputs would not
reach does.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from polymoe.bundle.tensor_file import raw_bytes
from polymoe.model.attention.paged import AttentionLayer
from polymoe.model.stock.kind import kind_of
from polymoe.model.stock.probe import trace

# Module attributes that no forward pass at inference uses. Ties are compared with the tensors.
_NO_PART = {"config", "generation_config", "padding_idx", "all_tied_weights_keys"}
_PLAIN = set(nn.Module().__dict__)  # what every module has; its submodules and weights are compared by name
_WINDOW = "sliding_window"
_TOKENS = 8  # positions of a rotary table that are compared
_GRID = torch.cat([torch.linspace(-20, 20, 4001), torch.logspace(1, 12, 100), -torch.logspace(1, 12, 100)])
_DEPTH = 6  # of plain objects within plain objects


@dataclass(frozen=True)
class Computation:
    """`modules`: path -> class and attributes. `buffers`: name -> values of computed buffers, shape and dtype of stored
    tensors. `attention`: layer -> its cache and window. `reads`: the config fields that the forward pass reads."""

    modules: Mapping[str, Any]
    buffers: Mapping[str, Any]
    attention: Mapping[int, AttentionLayer]
    reads: frozenset[str]

    @classmethod
    def of(cls, config: Any) -> Self:
        """Raises `UnsupportedModelError` for a model that cannot be served."""
        modules: dict[str, Any] = {}
        buffers: dict[str, Any] = {}
        reads: set[str] = set()

        def look(model: PreTrainedModel) -> None:
            for path, module in model.named_modules():
                if _is_activation(module):
                    modules[path] = ("activation", comparable(module(_GRID.clone())))
                    continue
                own = {name: value for name, value in vars(module).items() if name not in _PLAIN | _NO_PART}
                modules[path] = (type(module).__qualname__, comparable(own))
            buffers.update((name, comparable(value)) for name, value in model.named_buffers())
            buffers.update((name, comparable(value)) for name, value in model.named_parameters(remove_duplicate=False))
            reads.update(kind_of(model.config).fields_read(model))
            _watch(model, reads, buffers)

        trial = trace(config, look)
        return cls(modules, buffers, trial.attention_layers, frozenset(reads))

    def differs(self, other: "Computation", fields: set[str]) -> bool:
        """Whether the two could give different logits; `fields`: names of the config fields that they differ in.

        A field that is read in the forward pass counts as a difference, whatever is done with it. Of the window only
        what the masks make of it counts: one that is longer than the context is none.
        """
        if (self.modules, self.buffers, self.attention) != (other.modules, other.buffers, other.attention):
            return True
        return bool(fields & (self.reads | other.reads) - {_WINDOW})

    def same_tables(self, other: "Computation") -> bool:
        """Whether all computed buffers and the factors beside them are equal, whatever lengths the modules note."""

        def factors(modules: Mapping[str, Any]) -> dict[str, Any]:
            return {
                path: {name: value for name, value in own.items() if not isinstance(value, int)}
                for path, (_, own) in modules.items()
                if isinstance(own, dict)
            }

        return self.buffers == other.buffers and factors(self.modules) == factors(other.modules)


def _is_activation(module: nn.Module) -> bool:
    """One that is nothing but a function: "silu" and "swish" are two classes and one function."""
    known = type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")
    return known and not hasattr(module, "dim") and not any(True for _ in (*module.state_dict(), *module.children()))


def _watch(model: PreTrainedModel, reads: set[str], tables: dict[str, Any]) -> None:
    """From now on every field that is read of one of the model's configs is added to `reads`.

    The configs are the model's own copies; they get a class of their own, and no other config sees it. A rotary
    embedding may read sizes to make its tables: there the tables are noted in place of the sizes.
    """
    inside: list[str] = []  # the rotary embedding that is running

    def note(name: str) -> None:
        if not inside or "rope" in name or "position" in name:
            reads.add(name)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        made = [output] if isinstance(output, torch.Tensor) else list(output)
        # [1, T, …]; how many tokens a trial has is not the same for all configs, but more than these
        tables.setdefault(f"{inside.pop()} output", []).append([comparable(table[:, :_TOKENS]) for table in made])

    for path, module in model.named_modules():
        if "Rotary" in type(module).__name__ and not any(True for _ in module.parameters()):
            module.register_forward_pre_hook(lambda _module, _args, path=path: inside.append(path))
            module.register_forward_hook(leave)
    todo = [value for module in model.modules() for value in vars(module).values()]
    seen: set[int] = set()
    while todo:
        config = todo.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            todo += vars(config).values()
            config.__class__ = _watched(type(config), note)


def _watched(kind: Any, note: Callable[[str], object]) -> Any:
    def read(self: Any, name: str) -> Any:
        note(kind.attribute_map.get(name, name))
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})


def comparable(value: Any, depth: int = _DEPTH) -> Any:
    """Something that is equal for values that compute the same. Objects count by class and content."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        return value
    if isinstance(value, torch.Tensor):
        about = (str(value.dtype), tuple(value.shape))
        return about if value.is_meta else (*about, hashlib.sha256(raw_bytes(value)).hexdigest())
    if isinstance(value, Mapping):
        return {str(key): comparable(item, depth) for key, item in plain_rope(value).items()}
    if isinstance(value, list | tuple):
        return [comparable(item, depth) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, PreTrainedConfig):
        return None
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, functools.partial):
        return [comparable(part, depth) for part in (value.func, value.args, value.keywords)]
    if callable(value) and hasattr(value, "__qualname__"):
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        bound = [cell for cell in cells if not isinstance(cell, nn.Module)]
        return [value.__qualname__, comparable(bound, depth - 1) if depth else None]
    return [type(value).__qualname__, comparable(getattr(value, "__dict__", {}), depth - 1) if depth else None]


def plain_rope(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """A dictionary of a config without what says nothing: entries that are None, and the older `type` of a rotary
    embedding beside its `rope_type`."""
    return {k: v for k, v in values.items() if v is not None and not (k == "type" and "rope_type" in values)}
