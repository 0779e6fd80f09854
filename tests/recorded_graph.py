"""A CUDA graph on a CPU: the operations of one call, recorded once and run again on the same tensors.

What a CUDA graph would freeze is frozen here too: each Python number, each tensor's address, and which operations run.
So a step that is replayed for other inputs, another mix of variants, another row map or table shows whether anything of
it was taken from the host while it was recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polymoe.model.backends.base import Backend

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "bincount")
_KERNELS = ("_linear", "_packed_linear", "_attention", "_experts", "_rms_norm")

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[torch.Tensor]]


def addresses(*roots: Any) -> set[int]:
    """Of all memory that tensors have which can be reached from `roots`."""
    found, seen, left = set[int](), set[int](), [*roots]
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, str | int | float | bytes | type | None):
            continue
        seen.add(id(thing))
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            found.add(thing.untyped_storage().data_ptr())
        elif isinstance(thing, dict):
            left += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            left += thing
        elif isinstance(thing, RecordedGraph):
            continue  # it keeps what a real one would not
        else:
            left.append(getattr(thing, "__dict__", {}))
    return found - {0}


class NoWaiting(TorchDispatchMode):
    """Whatever would make the host wait on a GPU is an operation that torch dispatches: none may be there."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        assert not any(name in str(func) for name in _WAITING), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class RecordedGraph(NoWaiting):
    """Records while it is entered; `replay` runs it all again. Stands for a `torch.cuda.CUDAGraph`.

    Args:
        backend: whose kernels' calls are recorded whole, as launches with the arguments that they had.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend
        self._calls: list[Call] = []
        self._made: set[int] = set()
        self.read: set[int] = set()  # addresses of what a replay reads and does not make itself
        self._inside = False  # a kernel's own operations are part of its launch
        self._own = {name: getattr(backend, name) for name in _KERNELS}

    def __enter__(self) -> "RecordedGraph":
        for name, function in self._own.items():
            setattr(self._backend, name, self._launch(function))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, function in self._own.items():
            setattr(self._backend, name, function)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._record(func, args, kwargs or {}, result)
        return result

    def _launch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self._inside = True
            result = function(*args, **kwargs)
            self._inside = False
            self._record(function, args, kwargs, result)
            return result

        return launch

    def _record(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.read |= addresses((args, kwargs)) - self._made
        self._made |= addresses(outputs) - given
        views = bool(outputs) and all(t.untyped_storage().data_ptr() in given for t in outputs)
        mutates = isinstance(function, torch._ops.OpOverload) and function._schema.is_mutable
        if not views or mutates:  # a view needs no work: it looks at what is there
            self._calls.append((function, args, kwargs, [] if mutates else outputs))

    @torch.inference_mode()
    def replay(self) -> None:
        """All calls again; what they make is written to where it was the first time."""
        for function, args, kwargs, outputs in self._calls:
            made = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for output, fresh in zip(outputs, made, strict=False):
                output.copy_(fresh)
