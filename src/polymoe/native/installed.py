"""Which compiled library is there and this processor can run: what can be told before torch is loaded.

There is one for each level, a set of instructions; all have the same functions (`csrc/`, `csrc/portable/`).
"""

import functools
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

# Level -> what it needs, as Linux spells it; the fastest first. hatch_build.py compiles a library for each.
LEVELS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"},
    "avx512vnni": {"avx2", "fma", "avx512f", "avx512vl", "avx512_vnni"},
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx2": {"avx2", "fma"},
    "dotprod": {"asimd", "asimddp"},
    "neon": {"asimd"},
}
_ASKED, _FILE = "POLYMOE_CPU_LEVEL", "POLYMOE_KERNELS"
_FASTEST = "amx"  # what else can be asked for: the fastest level, and AMX where the processor has it (csrc/amx.cpp)


@functools.cache
def instructions() -> frozenset[str]:
    """What this processor has, as Linux spells it; nothing where that cannot be told."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        return frozenset()


def processor_levels() -> list[str]:
    """The levels that this processor can run, the fastest first."""
    return [level for level, needed in LEVELS.items() if needed <= instructions()]


def processor_suits() -> bool:
    """Whether this processor can run any."""
    return bool(processor_levels())


def library_of(level: str) -> Path:
    """Where the package has a level's library."""
    return Path(__file__).with_name(f"libpolymoe_cpu{'' if level == 'avx512' else f'_{level}'}.so")


def level() -> str:
    """The level that is used: of the file that `POLYMOE_KERNELS` names, else `POLYMOE_CPU_LEVEL`, else the fastest of
    this processor whose library was built. Empty where this processor cannot run it."""
    levels = processor_levels()
    if given := os.environ.get(_FILE):
        asked = next((known for known in LEVELS if Path(given).stem.endswith(f"_{known}")), "avx512")
    elif (asked := os.environ.get(_ASKED, "")) in ("", _FASTEST):
        asked = next((known for known in levels if library_of(known).exists()), levels[0] if levels else "")
    return asked if asked in levels else ""


def library() -> Path:
    """The level's library."""
    return Path(os.environ.get(_FILE) or library_of(level()))


def obstacle() -> str:
    """What keeps the library from being loaded; empty where nothing does."""
    if os.environ.get("POLYMOE_NO_KERNELS"):
        return "POLYMOE_NO_KERNELS turns the CPU kernels off"
    if not processor_suits():
        return "this processor has neither AVX2 nor NEON, which the CPU kernels need"
    given, asked = os.environ.get(_FILE), os.environ.get(_ASKED)
    if not level() and not (given and not Path(given).exists()):
        wanted = f"{_FILE}={given}" if given else f"{_ASKED}={asked}"
        return f"{wanted}, where this processor has {', '.join(processor_levels())}"
    if not library().exists():
        return "the CPU kernels are not built; with a C++ compiler (g++) installed: pip install -e ."
    return ""


@functools.cache
def say_if_missing() -> None:
    """Log, once a process, that no compiled library can be used; for who starts what computes."""
    if not processor_suits():
        logger.warning("this processor has neither AVX2 nor NEON: the CPU computes with torch alone, slowly.")
    elif not library().exists():
        logger.warning("polymoe was installed without its compiled CPU kernels: the CPU computes with torch alone.")
