"""Build hook: compile the CPU kernels when there is a compiler. Without one polymoe runs on torch alone.

A wheel with the libraries suits one platform and every Python (they are loaded by ctypes); one without suits them all.
There is a library for each level, a set of instructions, whatever the processor that compiles: which of them another
processor can run is asked when they are loaded (polymoe/native/installed.py).

    python hatch_build.py LIBRARY [FLAG …]      compiles one alone, for example with -fsanitize=thread

The library's name says the level: libpolymoe_cpu_avx2.so; avx512's has none.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/polymoe/native")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread"]
_AVX2 = ["-mavx2", "-mfma"]
# Machine -> level -> flags. What a level needs of a processor: polymoe/native/installed.py.
LEVELS = {
    "x86_64": {
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"],
        "avx512vnni": [*_AVX2, "-mavx512f", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=256"],
        "avxvnni": [*_AVX2, "-mavxvnni"],
        "avx2": _AVX2,
    },
    "aarch64": {"dotprod": ["-march=armv8.2-a+dotprod"], "neon": ["-march=armv8-a"]},
}
_FLAGS_OF = {level: flags for levels in LEVELS.values() for level, flags in levels.items()}
_TILES = ["-mavx512vnni", "-mavx512vbmi"]  # for what is called only where the processor has these too
MORE_FLAGS = dict.fromkeys(("amx.cpp", "tiled_experts.cpp", "tiled_linear.cpp"), _TILES)
# All other sources of a level are in csrc/ or in csrc/portable/.
SHARED = (
    "attention_layer.cpp", "changes.cpp", "gated_delta.cpp", "make_tiles.cpp", "routed_experts.cpp", "router.cpp",
    "sources.cpp", "threads.cpp",
)  # fmt: skip


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc]  # mypy does not look into hatchling
    """Writes `libpolymoe_cpu….so` into `native/`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        folder = Path(self.root) / NATIVE
        made = []
        for level in LEVELS.get(platform.machine(), {}):
            target = folder / f"libpolymoe_cpu{'' if level == 'avx512' else f'_{level}'}.so"
            if compile_kernels(folder / "csrc", target):
                made.append(f"{NATIVE}/{target.name}")
        if made:
            build_data["artifacts"] += made
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{re.sub(r'[^A-Za-z0-9]', '_', sysconfig.get_platform())}"


def compile_kernels(folder: Path, target: Path, flags: Sequence[str] = ()) -> bool:
    """Whether it worked."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        print("polymoe: no C++ compiler, the CPU kernels are not built", file=sys.stderr)
        return False
    level = level_of(target)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.[ch]*")))).hexdigest()
    with tempfile.TemporaryDirectory() as temporary:
        options = [*FLAGS, *_FLAGS_OF[level], *flags, f'-DPOLYMOE_SOURCES="{digest}"']

        def compiled(source: Path) -> str:
            made = str(Path(temporary) / f"{source.stem}.o")
            more = MORE_FLAGS.get(source.name, []) if level == "avx512" else []
            subprocess.run([compiler, *options, *more, "-c", str(source), "-o", made], check=True, capture_output=True)
            return made

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # which waits for compilers, a minute of a core in all
                objects = list(pool.map(compiled, sources_of(folder, level)))
            library = Path(temporary) / target.name
            command = [compiler, "-shared", "-pthread", *flags, *objects, "-o", str(library)]
            subprocess.run(command, check=True, capture_output=True)
            shutil.move(library, target)  # may be on another disk
        except (OSError, subprocess.CalledProcessError) as error:
            detail = (getattr(error, "stderr", None) or b"").decode(errors="replace")[-500:]
            print(f"polymoe: the CPU kernels for {level} are not built ({error}) {detail}", file=sys.stderr)
            return False
    return True


def level_of(library: Path) -> str:
    """What a library of this name is compiled for."""
    name = library.stem.rpartition("_")[2]
    return name if name in _FLAGS_OF else "avx512"


def sources_of(folder: Path, level: str) -> list[Path]:
    """What a level's library is compiled from."""
    if level == "avx512":
        # Of what several objects have under one name (the C++ library's) the first is linked: it must run anywhere.
        return sorted(folder.glob("*.cpp"), key=lambda source: (source.name in MORE_FLAGS, source.name))
    return [*sorted((folder / "portable").glob("*.cpp")), *(folder / name for name in SHARED)]


if __name__ == "__main__":
    sys.exit(0 if compile_kernels(Path(__file__).parent / NATIVE / "csrc", Path(sys.argv[1]), sys.argv[2:]) else 1)
