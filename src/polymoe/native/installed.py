"""Whether the compiled library is there and this processor can run it: what can be told before torch is loaded."""

import functools
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

LIBRARY = Path(os.environ.get("POLYMOE_KERNELS") or Path(__file__).with_name("libpolymoe_cpu.so"))
INSTRUCTIONS = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}  # as Linux spells what hatch_build.py compiles for


def processor_suits() -> bool:
    """Whether this processor has the instructions that the kernels are compiled for."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split()) >= INSTRUCTIONS
    except OSError:  # not Linux
        return False


def obstacle() -> str:
    """What keeps the library from being loaded; empty where nothing does."""
    if os.environ.get("POLYMOE_NO_KERNELS"):
        return "POLYMOE_NO_KERNELS turns the CPU kernels off"
    if not processor_suits():
        return "this processor has no AVX512-BF16, which the CPU kernels need"
    if not LIBRARY.exists():
        return "the CPU kernels are not built; with a C++ compiler (g++) installed: pip install -e ."
    return ""


@functools.cache
def say_if_missing() -> None:
    """Log, once a process, that the package has no compiled library; for who starts what computes."""
    if not LIBRARY.exists():
        logger.warning("polymoe was installed without its compiled CPU kernels: the CPU computes with torch alone.")
