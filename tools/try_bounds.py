"""Run the tests of what depends on private parts with the oldest and the newest releases that pyproject.toml allows.

    python tools/try_bounds.py                 # both ends; stock PyPI: 2.8 GB to download and 6 GB on disk for each
    python tools/try_bounds.py lowest          # every dependency at its lower bound
    python tools/try_bounds.py newest          # the newest releases within the upper bounds, no constraints.txt
    python tools/try_bounds.py --torch-index https://download.pytorch.org/whl/cpu

Each end has an environment of its own, `.venv-lowest` and `.venv-newest`, made with the Python that runs this file.
polymoe replaces weights, experts and attention through transformers' registries and reads torch's internal switches;
neither promises to keep them, hence the upper bounds. To raise one: edit it, run this, and try the architectures.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What goes through torch's or transformers' private parts, and the commands that a user starts with.
TESTS = [
    "test_attention", "test_cli", "test_cpu_kernels", "test_exactness", "test_grouped_experts", "test_llm",
    "test_offline_family", "test_packed_experts", "test_server", "test_slots", "test_switch", "test_tokenizer",
    "test_variant_stack",
]  # fmt: skip
ENDS = ("lowest", "newest")
SHOWN = ("torch", "transformers", "tokenizers", "triton", "numpy")


def lowest(requirements: list[str]) -> list[str]:
    """`name>=1.2,<3` -> `name==1.2`, for those with a lower bound."""
    found = [re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement) for requirement in requirements]
    return [f"{match[1]}=={match[2]}" for match in found if match]


def make_environment(name: str, pins: list[str], torch_index: str | None) -> Path:
    """An environment with polymoe, its development tools and `pins`. Returns its python."""
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    if not (folder / "bin" / "pip").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    # A newer pip than some Pythons bring reads what a wheel needs before it downloads it.
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--upgrade", "pip"], check=True)
    install = [str(python), "-m", "pip", "install", "-q", "--upgrade", "--upgrade-strategy", "eager"]
    if torch_index:
        torch = next(r for r in dependencies() if r.startswith("torch"))
        step = [*install, "--no-deps", "--index-url", torch_index, "-c", str(constraints), torch]
        subprocess.run(step, check=True)
    subprocess.run([*install, "-c", str(constraints), "-e", ".[dev]"], cwd=ROOT, check=True)
    return python


def dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: list[str] = project["dependencies"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", nargs="?", choices=[*ENDS, "both"], default="both")
    parser.add_argument("--torch-index", help="index of another build of torch than PyPI's")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files of tests/, without .py")
    arguments = parser.parse_args()
    failed = []
    for end in ENDS if arguments.end == "both" else (arguments.end,):
        pins = lowest(dependencies()) if end == "lowest" else []
        try:
            python = make_environment(end, pins, arguments.torch_index)
        except subprocess.CalledProcessError as error:
            print(f"{end}: `{' '.join(map(str, error.cmd[1:4]))} …` failed; see above", file=sys.stderr)
            failed.append(end)
            continue
        show = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {SHOWN}), sep=', ')"
        versions = subprocess.run([str(python), "-c", show], capture_output=True, text=True, check=False).stdout
        print(f"{end}: Python {sys.version.split()[0]}, {versions.strip()}", flush=True)
        tests = [f"tests/{name}.py" for name in arguments.tests]
        command = [str(python), "-m", "pytest", "-n", "auto", "--dist", "loadfile", "-m", "not slow", *tests]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
            failed.append(end)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
