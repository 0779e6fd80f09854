"""Compile the CPU kernels for 64-bit Arm and compare them with plain loops (tests/native/check_kernels.cpp) in QEMU.

Needs Debian's g++-aarch64-linux-gnu and qemu-user; on Arm itself the same runs without them.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # of the other machine
# Level -> the emulated processor: the oldest that has what the level needs.
PROCESSORS = {"neon": "cortex-a53", "dotprod": "neoverse-n1"}


def main() -> int:
    is_arm = platform.machine() == "aarch64"
    if not is_arm and (missing := [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]):
        sys.exit(f"{' and '.join(missing)} not found; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user")
    compiler = "g++" if is_arm else COMPILER
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        check = Path(folder) / "check_kernels"
        source, headers = ROOT / "tests/native/check_kernels.cpp", ROOT / "src/polymoe/native/csrc"
        subprocess.run(
            [compiler, "-O1", "-std=c++17", f"-I{headers}", str(source), "-o", str(check), "-ldl"], check=True
        )
        for level, processor in PROCESSORS.items():
            library = Path(folder) / f"libpolymoe_cpu_{level}.so"
            build = [sys.executable, str(ROOT / "hatch_build.py"), str(library)]
            subprocess.run(build, env=os.environ | {"CXX": compiler}, check=True)
            emulator = [] if is_arm else [EMULATOR, "-cpu", processor, "-L", LIBRARIES]
            print(f"{level}, {'here' if is_arm else processor}: ", end="", flush=True)
            if subprocess.run([*emulator, str(check), str(library)], check=False).returncode != 0:
                failed.append(level)
    print(f"Arm: {'failed at ' + ', '.join(failed) if failed else 'all as expected'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
