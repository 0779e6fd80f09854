"""Run the tests of the compiled CPU kernels under AddressSanitizer and ThreadSanitizer, at each level that runs here.

    python tools/sanitize.py                    # both, one after the other
    python tools/sanitize.py thread --levels avx2 -- -k norm

Each builds a level's library with `-fsanitize` into a temporary folder, which `POLYMOE_KERNELS` names, and preloads the
sanitizer's runtime, since Python itself is not built with it. A finding ends the test process. Kernels run on several
threads of their own (csrc/threads.h); torch runs on one, because its OpenMP is not built for ThreadSanitizer.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from polymoe.native.installed import LEVELS, library_of, processor_levels
from try_levels import TESTS

ROOT = Path(__file__).resolve().parents[1]
# Of the library's loading, in Pythons of their own: nothing of it is a kernel's.
LEFT_OUT = "tests/test_cpu_kernels.py::test_torch_is_loaded_with_threads_that_sleep_and_nobody_else_is_told"
KERNEL_THREADS = "3"
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# Variable -> settings.
OPTIONS = {
    # Python and torch never free all they have; a leak in the kernels would be of their few persistent helpers.
    "address": ("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1"),
    "thread": ("TSAN_OPTIONS", "halt_on_error=1:exitcode=66:die_after_fork=0:ignore_noninstrumented_modules=1"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", nargs="*", choices=[[], *RUNTIMES], help="default: both")
    parser.add_argument("--levels", nargs="*", choices=LEVELS, help="default: all that this processor can run")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files of tests/")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, pytest_options = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    failed = []
    for name in arguments.sanitizers or RUNTIMES:
        for level in arguments.levels or processor_levels():
            start = time.monotonic()
            if not is_clean(name, level, [f"tests/{test}" for test in arguments.tests], pytest_options):
                failed.append(f"{name} at {level}")
            print(f"{name}, {level}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"sanitizers: {'found something: ' + ', '.join(failed) if failed else 'nothing found'}")
    return 1 if failed else 0


def is_clean(name: str, level: str, tests: list[str], pytest_options: list[str]) -> bool:
    """Whether the tests pass with a level's library under one sanitizer."""
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / library_of(level).name
        flags = [f"-fsanitize={name}", "-O1", "-g", "-fno-omit-frame-pointer"]
        subprocess.run([sys.executable, str(ROOT / "hatch_build.py"), str(library), *flags], check=True)
        # With C++'s library: a runtime that comes first must find what throws, since torch does.
        preloaded = ":".join(str(path_of(compiler, file)) for file in (RUNTIMES[name], "libstdc++.so"))
        variable, options = OPTIONS[name]
        environment = os.environ | {variable: f"{options}:log_path={folder}/found"}  # pytest keeps what is printed
        environment |= {"LD_PRELOAD": preloaded, "OMP_NUM_THREADS": "1"}
        environment |= {"POLYMOE_KERNELS": str(library), "POLYMOE_STRICT_TESTS": "1", "PYTHONFAULTHANDLER": "1"}
        environment |= {"TEST_KERNEL_THREADS": KERNEL_THREADS}
        command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "not slow", "--deselect", LEFT_OUT, *tests]
        command += pytest_options
        print(f"{name}, {level}: {library.stat().st_size >> 10} KiB, {preloaded}", flush=True)
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        for report in sorted(Path(folder).glob("found.*")):
            print(report.read_text(errors="replace"), flush=True)
        return done.returncode == 0


def path_of(compiler: str, file: str) -> Path:
    """Where the compiler has a library."""
    found = subprocess.run([compiler, f"-print-file-name={file}"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip()).resolve()


if __name__ == "__main__":
    sys.exit(main())
