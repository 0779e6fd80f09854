"""Run the tests of the CPU kernels at every level that this processor can run, the fastest first.

Arguments are pytest's:

    python tools/try_levels.py -k tiled
"""

import os
import subprocess
import sys
from pathlib import Path

from polymoe.native.installed import processor_levels

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "test_cpu_kernels", "test_paged_attention", "test_rms_norm", "test_grouped_linear", "test_grouped_experts",
    "test_packed_linear", "test_packed_experts", "test_packed_nonexperts", "test_tiled_experts", "test_encode",
)  # fmt: skip


def main() -> int:
    files, failed = [f"tests/{test}.py" for test in TESTS], []
    for level in processor_levels():
        print(f"{level}:", flush=True)
        environment = os.environ | {"POLYMOE_CPU_LEVEL": level, "POLYMOE_STRICT_TESTS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-n", "0", *files, *sys.argv[1:]]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
            failed.append(level)
    print(f"levels: {'failed at ' + ', '.join(failed) if failed else 'all passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
