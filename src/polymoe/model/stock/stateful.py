"""Which stock modules keep a state of their sequence, and in what kind of cache. Nothing here knows an architecture."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from polymoe.errors import UnsupportedModelError
from polymoe.model.stock.skeleton import expert_modules

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "past_key_value")

# What a forward calls on transformers' cache for anything else than keys and values.
_STATE_METHODS = {
    *("get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state", "has_previous_state"),
    *("get_linear_cache", "set_linear_cache", "update_indexer", "update_index", "indexer_position_ids"),
}


def cache_argument(module: torch.nn.Module) -> str | None:
    """The name under which a module's forward takes the cache."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in names), None)


def stateful_modules(model: PreTrainedModel) -> list[str]:
    """Paths of the modules whose own code reads or writes a state.

    Raises `UnsupportedModelError` where that is code around the routed experts, which run for all variants at once.
    """
    found = []
    experts = [name for name, _ in expert_modules(model)]
    for path, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and _STATE_METHODS & set(code.co_names) and cache_argument(module) is not None:
            if any(name.startswith(f"{path}." if path else "") for name in experts):
                raise UnsupportedModelError(f"{type(module).__name__} keeps a state for all of its layers together.")
            found.append(path)
    return found


def enclosing(model: PreTrainedModel, path: str) -> str | None:
    """The module around `path`, if it is a part of the network that has no routed experts in it."""
    experts = [name for name, _ in expert_modules(model)]
    while path:
        path = path.rpartition(".")[0]
        if not path or any(name.startswith(f"{path}.") for name in experts):
            return None
        if type(model.get_submodule(path)) is not torch.nn.ModuleList:
            return path
    return None


def cache_factory(model: PreTrainedModel, config: Any) -> Callable[[], Cache]:
    """Makes empty caches of the kind that the stock model uses: its own, where its file has one, or the common one."""
    beside = vars(sys.modules[type(model).__module__])
    for kind in beside.values():
        if isinstance(kind, type) and issubclass(kind, Cache) and kind.__module__ == type(model).__module__:
            takes_config = "config" in inspect.signature(kind).parameters
            return functools.partial(kind, config=config) if takes_config else kind
    return functools.partial(DynamicCache, config=config)
