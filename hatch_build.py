"""Build hook: compile the CPU kernels when there is a compiler. Without one polymoe runs on torch alone.

A wheel with the library suits one platform and every Python (it is loaded by ctypes); one without suits them all. Which
processors can run the kernels is asked when they are loaded (polymoe/native/installed.py), not here.

    python hatch_build.py LIBRARY [FLAG …]      compiles it alone, for example with -fsanitize=thread
"""

import hashlib
import os
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
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"]
_TILES = ["-mavx512vnni", "-mavx512vbmi"]  # for what is called only where the processor has these too
MORE_FLAGS = dict.fromkeys(("amx.cpp", "make_tiles.cpp", "tiled_experts.cpp", "tiled_linear.cpp"), _TILES)


class CustomBuildHook(BuildHookInterface):
    """Writes `libpolymoe_cpu.so` into `native/`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        target = Path(self.root) / NATIVE / "libpolymoe_cpu.so"
        if compile_kernels(Path(self.root) / NATIVE / "csrc", target):
            build_data["artifacts"].append(f"{NATIVE}/{target.name}")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{re.sub(r'[^A-Za-z0-9]', '_', sysconfig.get_platform())}"


def compile_kernels(folder: Path, target: Path, flags: Sequence[str] = ()) -> bool:
    """Whether it worked."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        print("polymoe: no C++ compiler, the CPU kernels are not built", file=sys.stderr)
        return False
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.[ch]*")))).hexdigest()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        options = [*FLAGS, *flags, f'-DPOLYMOE_SOURCES="{digest}"']

        def compiled(source: Path) -> str:
            made = str(Path(temporary) / f"{source.stem}.o")
            command = [compiler, *options, *MORE_FLAGS.get(source.name, []), "-c", str(source), "-o", made]
            subprocess.run(command, check=True, capture_output=True)
            return made

        try:
            # Of what several objects have under one name (the C++ library's) the first is linked: it must run anywhere.
            sources = sorted(folder.glob("*.cpp"), key=lambda source: (source.name in MORE_FLAGS, source.name))
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # which waits for compilers, a minute of a core in all
                objects = list(pool.map(compiled, sources))
            library = Path(temporary) / target.name
            command = [compiler, "-shared", "-pthread", *flags, *objects, "-o", str(library)]
            subprocess.run(command, check=True, capture_output=True)
            shutil.move(library, target)  # may be on another disk
        except (OSError, subprocess.CalledProcessError) as error:
            detail = (getattr(error, "stderr", None) or b"").decode(errors="replace")[-500:]
            print(f"polymoe: the CPU kernels are not built ({error}) {detail}", file=sys.stderr)
            return False
    return True


if __name__ == "__main__":
    sys.exit(0 if compile_kernels(Path(__file__).parent / NATIVE / "csrc", Path(sys.argv[1]), sys.argv[2:]) else 1)
