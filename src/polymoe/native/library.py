"""The compiled CPU kernels (the .cpp files beside this), where they are built and the processor can run them.

hatch_build.py compiles them when the package is installed, for several sets of instructions (`installed.LEVELS`). Each
has a torch implementation with the same result that is used everywhere else. `POLYMOE_NO_KERNELS=1` turns them off,
`POLYMOE_CPU_LEVEL=LEVEL` takes a slower level than the processor's fastest (avx512 leaves AMX alone), and
`POLYMOE_KERNELS=FILE` names another build of them (`make sanitize`).
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
from polymoe.native.installed import level, library, obstacle

SOURCES = Path(__file__).with_name("csrc")
# Microseconds that idle helpers look for the next job: the longest gap within a step, or what torch's threads, which
# spin as well, leave room for.
_SPIN, _SPIN_BESIDE_TORCH = 2000, 50
_NAMES = {
    "avx512vnni": "AVX2, AVX512-VNNI", "avxvnni": "AVX2, AVX-VNNI", "avx2": "AVX2",
    "dotprod": "NEON, dot products", "neon": "NEON",
}  # fmt: skip
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
    before, given = torch.get_num_threads(), getattr(_own, "threads", None)
    _own.threads = kernel_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _own.threads = given


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
    kernels = ctypes.CDLL(str(library()))
    if not _is_current(kernels):
        warnings.warn(
            "the CPU kernels were built from other sources and are not used; build them again: pip install -e .",
            stacklevel=2,
        )
        return None
    linear, attention = kernels.polymoe_grouped_linear_bf16, kernels.polymoe_paged_attention_bf16
    combine, experts = kernels.polymoe_combine_bf16, kernels.polymoe_experts_bf16
    linear.argtypes = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 5, _INT]
    attention.argtypes = [*[_POINTER] * 4, _NUMBER, *[_POINTER] * 4, *[_NUMBER] * 8, _FLOAT, _POINTER, _INT]
    combine.argtypes = [*[_POINTER] * 3, *[_NUMBER] * 3, _POINTER, _INT]
    experts.argtypes = [*[_POINTER] * 3, *[_NUMBER] * 5, *[_POINTER] * 3, _INT]
    packed = kernels.polymoe_packed_experts_bf16
    packed.argtypes = [*[_POINTER] * 5, *[_NUMBER] * 4, *[_POINTER] * 6, _INT]
    packed.restype = None
    tiled = kernels.polymoe_tiled_experts_bf16
    tiled.argtypes = [*[_POINTER] * 5, *[_NUMBER] * 4, *[_POINTER] * 4, *[_NUMBER] * 2, *[_POINTER] * 2, _INT]
    tiled.restype = None
    tiled_linear = kernels.polymoe_tiled_linear_bf16
    tiled_linear.argtypes = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 5, *[_NUMBER] * 2, _POINTER, _INT]
    tiled_linear.restype = None
    make = kernels.polymoe_make_tiles
    make.argtypes = [*[_POINTER] * 2, *[_NUMBER] * 4, *[_POINTER] * 2, _INT]
    make.restype = None
    for packed in (kernels.polymoe_packed_linear_bf16, kernels.polymoe_packed_linear_f32):
        packed.argtypes = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 8, _INT]
        packed.restype = None
    norm = kernels.polymoe_rms_norm_bf16
    norm.argtypes = [*[_POINTER] * 3, *[_NUMBER] * 3, _FLOAT, _POINTER, _INT]
    norm.restype = None
    layer, router = kernels.polymoe_attention_layer_bf16, kernels.polymoe_router_bf16
    layer.argtypes, layer.restype = [*[_POINTER] * 5, _NUMBER, _POINTER, _INT], None
    router.argtypes = [_POINTER, *[_NUMBER] * 3, *[_POINTER] * 3, *[_NUMBER] * 2, *[_POINTER] * 3, _INT]
    router.restype = None
    decoder, whole = kernels.polymoe_decoder_layer_bf16, kernels.polymoe_pass_bf16
    decoder.argtypes, decoder.restype = [*[_POINTER] * 5, _NUMBER, _POINTER, _INT], _INT
    whole.argtypes, whole.restype = [*[_POINTER] * 7, _NUMBER, _POINTER, _NUMBER, _POINTER, _INT], _INT
    routed = kernels.polymoe_routed_experts_bf16
    routed.argtypes, routed.restype = [*[_POINTER] * 5, *[_NUMBER] * 2, _POINTER, _INT], _INT
    delta = kernels.polymoe_gated_delta_f32
    delta.argtypes = [*[_POINTER] * 6, *[_NUMBER] * 5, _INT, _POINTER, _INT]
    delta.restype = None
    encode = kernels.polymoe_encode_f32
    encode.argtypes = [_POINTER, *[_NUMBER] * 4, *[_POINTER] * 2, *[_FLOAT] * 2, _POINTER, _NUMBER, _POINTER, _INT]
    encode.restype = None
    for changes in (kernels.polymoe_changes_16, kernels.polymoe_changes_32):
        changes.argtypes, changes.restype = [*[_POINTER] * 2, *[_NUMBER] * 2, *[_POINTER] * 2], _NUMBER
    kernels.polymoe_spin.argtypes, kernels.polymoe_spin.restype = [_NUMBER], None
    kernels.polymoe_spin(_SPIN if quiet_torch.SLEEPS else _SPIN_BESIDE_TORCH)
    linear.restype = attention.restype = combine.restype = experts.restype = None
    kernels.polymoe_amx.argtypes, kernels.polymoe_amx.restype = [], _INT
    return kernels


def instruction_set() -> str:
    """What the kernels multiply with, for the operator; nothing where that is plain AVX-512, the fastest but for AMX.

    AMX was tried when first asked, and is not used where vectors are faster (csrc/amx.cpp).
    """
    kernels = cpu_kernels()
    if kernels is None:
        return ""
    return _NAMES.get(level()) or ("", "AMX in bfloat16", "AMX in 8 bits", "AMX")[kernels.polymoe_amx()]


def _is_current(kernels: ctypes.CDLL) -> bool:
    """Whether it was built from the sources beside it (hatch_build.py): a function may have other arguments by now."""
    if not hasattr(kernels, "polymoe_sources"):
        return False
    kernels.polymoe_sources.restype = ctypes.c_char_p
    sources = sorted(SOURCES.rglob("*.[ch]*"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return bool(kernels.polymoe_sources() == digest.encode())
