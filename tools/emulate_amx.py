"""Run the tests of the CPU kernels that multiply on AMX, with its instructions emulated (csrc/amx.h).

That takes a processor with what the kernels need otherwise.

    python tools/emulate_amx.py -k tiled
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_grouped_linear", "test_grouped_experts", "test_packed_experts", "test_tiled_experts")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libpolymoe_cpu.so"
        build = [sys.executable, str(ROOT / "hatch_build.py"), str(library), "-DPOLYMOE_EMULATE_AMX"]
        subprocess.run(build, check=True)
        environment = os.environ | {
            "POLYMOE_KERNELS": str(library),
            "POLYMOE_STRICT_TESTS": "1",
            "OMP_NUM_THREADS": "1",
        }
        asked = "from polymoe.native.library import instruction_set; assert instruction_set() == 'AMX'"
        subprocess.run([sys.executable, "-c", asked], env=environment, check=True)
        command = [sys.executable, "-m", "pytest", "-n", "0", *(f"tests/{test}.py" for test in TESTS), *sys.argv[1:]]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
