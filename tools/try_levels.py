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
# Files of tests/, or what of one calls kernels: every source of native/csrc is called by some.
TESTS = (
    "test_cpu_kernels.py", "test_paged_attention.py", "test_rms_norm.py", "test_grouped_linear.py",
    "test_grouped_experts.py", "test_packed_linear.py", "test_packed_experts.py", "test_tiled_experts.py",
    "test_packed_nonexperts.py::test_products_are_those_with_the_whole_matrices",
    "test_packed_nonexperts.py::test_products_of_tiles", "test_encode.py", "test_gated_delta.py",
    "test_quant.py::test_exact_deltas_are_those_of_the_reference", "test_fused_layers.py",
)  # fmt: skip


def main() -> int:
    files, failed = [f"tests/{test}" for test in TESTS], []
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
