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
    "attention_layer.cpp", "changes.cpp", "decoder.cpp", "gated_delta.cpp", "make_tiles.cpp", "routed_experts.cpp",
    "router.cpp", "sources.cpp", "threads.cpp",
)  # fmt: skip
# Five seconds or more, the longest first.
SLOWEST = ("tiled_experts.cpp", "tiled_linear.cpp", "packed_experts.cpp", "grouped_linear.cpp", "linear.cpp",
           "experts.cpp")  # fmt: skip


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc]  # mypy does not look into hatchling
    """Writes `libpolymoe_cpu….so` into `native/`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        if self.target_name == "sdist":
            return
        folder = Path(self.root) / NATIVE
        levels = LEVELS.get(platform.machine(), {})
        targets = [folder / f"libpolymoe_cpu{'' if level == 'avx512' else f'_{level}'}.so" for level in levels]
        old = [target for target in targets if not is_current(target, folder / "csrc")]
        failed = {*old} - {*compile_kernels(folder / "csrc", old)}
        made = [f"{NATIVE}/{target.name}" for target in targets if target not in failed]
        if made:
            build_data["artifacts"] += made
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{re.sub(r'[^A-Za-z0-9]', '_', sysconfig.get_platform())}"


def is_current(target: Path, folder: Path) -> bool:
    """Whether it was compiled from these sources, in this way: `make dev` installs the package twice."""
    if not target.exists() or target.stat().st_mtime < Path(__file__).stat().st_mtime:
        return False
    return digest_of(folder).encode() in target.read_bytes()


def digest_of(folder: Path) -> str:
    """Of the sources; as polymoe/native/library.py has it."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.[ch]*")))).hexdigest()


def compile_kernels(folder: Path, targets: Sequence[Path], flags: Sequence[str] = ()) -> list[Path]:
    """Those of the libraries that could be made. All levels at once, what takes longest first: no core idles."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        if targets:
            print("polymoe: no C++ compiler, the CPU kernels are not built", file=sys.stderr)
        return []
    common, made = [*FLAGS, *flags, f'-DPOLYMOE_SOURCES="{digest_of(folder)}"'], []
    # The threads wait for compilers, some three minutes of a core in all.
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(target: Path, source: Path) -> str:
            level, out = level_of(target), f"{temporary}/{target.stem}-{source.stem}.o"
            more = MORE_FLAGS.get(source.name, []) if level == "avx512" else []
            options = [*common, *_FLAGS_OF[level], *more]
            subprocess.run([compiler, *options, "-c", str(source), "-o", out], check=True, capture_output=True)
            return out

        sources = {target: sources_of(folder, level_of(target)) for target in targets}
        asked = [(target, source) for target in targets for source in sources[target]]
        order = {name: place for place, name in enumerate(SLOWEST)}
        asked.sort(key=lambda pair: order.get(pair[1].name, len(order)))
        objects = {pair: pool.submit(compiled, *pair) for pair in asked}
        for target in targets:
            try:
                library = Path(temporary) / target.name
                parts = [objects[target, source].result() for source in sources[target]]
                command = [compiler, "-shared", "-pthread", *flags, *parts, "-o", str(library)]
                subprocess.run(command, check=True, capture_output=True)
                shutil.move(library, target)  # may be on another disk
                made.append(target)
            except (OSError, subprocess.CalledProcessError) as error:
                detail = (getattr(error, "stderr", None) or b"").decode(errors="replace")[-500:]
                name = level_of(target)
                print(f"polymoe: the CPU kernels for {name} are not built ({error}) {detail}", file=sys.stderr)
    return made


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
    sys.exit(0 if compile_kernels(Path(__file__).parent / NATIVE / "csrc", [Path(sys.argv[1])], sys.argv[2:]) else 1)
