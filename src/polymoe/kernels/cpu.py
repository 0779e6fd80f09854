"""The compiled CPU kernels (the .cpp files beside this), where they are built and the processor can run them.

hatch_build.py compiles them when the package is installed; they need AVX512-BF16. Each has a torch implementation with
the same result that is used everywhere else; `POLYMOE_NO_KERNELS=1` turns them off.
"""

import ctypes
import functools
import hashlib
import os
import warnings
from pathlib import Path

LIBRARY = Path(__file__).with_name("libpolymoe_cpu.so")
_POINTER, _NUMBER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


@functools.cache
def cpu_kernels() -> ctypes.CDLL | None:
    """The library, or None: not built, not for this processor, or turned off."""
    if os.environ.get("POLYMOE_NO_KERNELS") or not LIBRARY.exists():
        return None
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx512_bf16" not in cpuinfo.read_text():
        return None
    # The library leaves its OpenMP symbols open. They must come from the runtime that torch has loaded: two pools of
    # threads would keep each other from running.
    with Path("/proc/self/maps").open() as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    if len(runtimes) != 1:
        return None
    ctypes.CDLL(runtimes.pop(), mode=ctypes.RTLD_GLOBAL)
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
    norm = library.polymoe_rms_norm_bf16
    norm.argtypes = [*[_POINTER] * 3, *[_NUMBER] * 3, _FLOAT, _POINTER, _INT]
    norm.restype = None
    encode = library.polymoe_encode_f32
    encode.argtypes = [_POINTER, *[_NUMBER] * 4, *[_POINTER] * 2, *[_FLOAT] * 2, _POINTER, _NUMBER, _POINTER, _INT]
    encode.restype = None
    linear.restype = attention.restype = combine.restype = experts.restype = None
    return library


def _is_current(library: ctypes.CDLL) -> bool:
    """Whether it was built from the sources beside it (hatch_build.py): a function may have other arguments by now."""
    if not hasattr(library, "polymoe_sources"):
        return False
    library.polymoe_sources.restype = ctypes.c_char_p
    sources = sorted(LIBRARY.parent.glob("*.[ch]*"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return bool(library.polymoe_sources() == digest.encode())
