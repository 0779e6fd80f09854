"""The compiled CPU kernels (the .cpp files beside this), where they are built and the processor can run them.

hatch_build.py compiles them when the package is installed; they need AVX512-BF16. Each has a torch implementation with
the same result that is used everywhere else. `POLYMOE_NO_KERNELS=1` turns them off, `POLYMOE_CPU_LEVEL=avx512` what
they have for AMX, and `POLYMOE_KERNELS=FILE` names another build of them (`make sanitize`).
"""

import ctypes
import functools
import hashlib
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from polymoe.native import quiet_torch
from polymoe.native.installed import LIBRARY, obstacle

SOURCES = Path(__file__).with_name("csrc")
# Microseconds that idle helpers look for the next job: the longest gap within a step, or what torch's threads, which
# spin as well, leave room for.
_SPIN, _SPIN_BESIDE_TORCH = 2000, 50
_POINTER, _NUMBER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


_own = threading.local()  # `threads`: of this thread's kernels, where torch has fewer


def kernel_threads() -> int:
    """How many threads a kernel may use: torch's number, whatever `one_torch_thread` made of it."""
    threads: int = getattr(_own, "threads", None) or torch.get_num_threads()
    return threads


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch's own operations run on one thread, the kernels on as many as before.

    For steps so small that their operations take less time than torch's threads need to come together.
    """
    _own.threads = kernel_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_own.threads)
        del _own.threads


def why_no_kernels() -> str:
    """What keeps the compiled kernels from being used here; empty where they are."""
    if cpu_kernels() is not None:
        return ""
    return obstacle() or "the CPU kernels were built from other sources; build them again: pip install -e ."


@functools.cache
def cpu_kernels() -> ctypes.CDLL | None:
    """The library, or None: not built, not for this processor, or turned off (`why_no_kernels`)."""
    if obstacle():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    if not _is_current(library):
        warnings.warn(
            "the CPU kernels were built from other sources and are not used; build them again: pip install -e .",
            stacklevel=2,
        )
        return None
    linear, attention = library.polymoe_grouped_linear_bf16, library.polymoe_paged_attention_bf16
    combine, experts = library.polymoe_combine_bf16, library.polymoe_experts_bf16
    linear.argtypes = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 5, _INT]
    attention.argtypes = [*[_POINTER] * 4, _NUMBER, *[_POINTER] * 4, *[_NUMBER] * 8, _FLOAT, _POINTER, _INT]
    combine.argtypes = [*[_POINTER] * 3, *[_NUMBER] * 3, _POINTER, _INT]
    experts.argtypes = [*[_POINTER] * 3, *[_NUMBER] * 5, *[_POINTER] * 3, _INT]
    packed = library.polymoe_packed_experts_bf16
    packed.argtypes = [*[_POINTER] * 5, *[_NUMBER] * 4, *[_POINTER] * 6, _INT]
    packed.restype = None
    tiled = library.polymoe_tiled_experts_bf16
    tiled.argtypes = [*[_POINTER] * 5, *[_NUMBER] * 4, *[_POINTER] * 4, *[_NUMBER] * 2, *[_POINTER] * 2, _INT]
    tiled.restype = None
    tiled_linear = library.polymoe_tiled_linear_bf16
    tiled_linear.argtypes = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 5, *[_NUMBER] * 2, _POINTER, _INT]
    tiled_linear.restype = None
    make = library.polymoe_make_tiles
    make.argtypes = [*[_POINTER] * 2, *[_NUMBER] * 4, *[_POINTER] * 2, _INT]
    make.restype = None
    for packed in (library.polymoe_packed_linear_bf16, library.polymoe_packed_linear_f32):
        packed.argtypes = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 8, _INT]
        packed.restype = None
    norm = library.polymoe_rms_norm_bf16
    norm.argtypes = [*[_POINTER] * 3, *[_NUMBER] * 3, _FLOAT, _POINTER, _INT]
    norm.restype = None
    delta = library.polymoe_gated_delta_f32
    delta.argtypes = [*[_POINTER] * 6, *[_NUMBER] * 5, _INT, _POINTER, _INT]
    delta.restype = None
    encode = library.polymoe_encode_f32
    encode.argtypes = [_POINTER, *[_NUMBER] * 4, *[_POINTER] * 2, *[_FLOAT] * 2, _POINTER, _NUMBER, _POINTER, _INT]
    encode.restype = None
    library.polymoe_spin.argtypes, library.polymoe_spin.restype = [_NUMBER], None
    library.polymoe_spin(_SPIN if quiet_torch.SLEEPS else _SPIN_BESIDE_TORCH)
    linear.restype = attention.restype = combine.restype = experts.restype = None
    library.polymoe_amx.argtypes, library.polymoe_amx.restype = [], _INT
    return library


def matrix_unit() -> str:
    """What multiplies beside the processor's vectors, for its operator: "AMX", which of two products where it is not
    both, or nothing. It was tried when first asked, and is not used where vectors are faster (csrc/amx.cpp)."""
    kernels = cpu_kernels()
    return ("", "AMX in bfloat16", "AMX in 8 bits", "AMX")[kernels.polymoe_amx()] if kernels is not None else ""


def _is_current(library: ctypes.CDLL) -> bool:
    """Whether it was built from the sources beside it (hatch_build.py): a function may have other arguments by now."""
    if not hasattr(library, "polymoe_sources"):
        return False
    library.polymoe_sources.restype = ctypes.c_char_p
    sources = sorted(SOURCES.glob("*.[ch]*"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return bool(library.polymoe_sources() == digest.encode())
