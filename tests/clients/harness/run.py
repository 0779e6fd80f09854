"""Evaluation and load that others wrote, against a server of the family that comes with the package: `make
test-harness`.

lm-evaluation-harness and guidellm are installed into `.venv-harness`, and `vllm bench serve` comes with vLLM's own
environment (`make vllm`). Each script ends with an error where its tool does not get what it expects. The generators
run for HARNESS_MINUTES each, over all variants.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

from polymoe.config import EngineConfig
from polymoe.demo import family_paths
from polymoe.offline.api import make_plan
from servers import ThreadServer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
ENVIRONMENT, VLLM = ROOT / ".venv-harness", ROOT / ".venv-vllm"
KEY = "harness-key"
VLLM_SCRIPT = "vllm_bench_client.py"
SCRIPTS = ("lm_eval_client.py", "guidellm_client.py", VLLM_SCRIPT)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """The variables that scripts read: a lossless plan of the family in float32, and its checkpoints."""
    paths = family_paths()
    make_plan(paths, "separate", None, folder / "bundle")
    config = EngineConfig(bundle=str(folder / "bundle"), device="cpu", dtype="float32", kv_cache_bytes=256 << 20)
    with ThreadServer(config, api_key=KEY) as running:
        yield {
            "POLYMOE_URL": running.url,
            "POLYMOE_KEY": KEY,
            "POLYMOE_CHECKPOINTS": os.pathsep.join(f"{name}={path}" for name, path in paths.items()),
            "OPENAI_API_KEY": KEY,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def install(python: Path, torch_index: str | None) -> None:
    """torch comes first, the release that polymoe has, from `torch_index` or PyPI."""
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
        source = ["--no-deps", "--index-url", torch_index] if torch_index else []
        subprocess.run([*pip, "torch", "-c", str(ROOT / "constraints.txt"), *source], check=True)
    subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, help="which; all without")
    parser.add_argument("--python", type=Path, help="one that has the tools already, in place of .venv-harness")
    parser.add_argument("--vllm", type=Path, default=VLLM, help="vLLM's environment")
    parser.add_argument("--torch-index", help="an index of torch builds, in place of PyPI")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each load generator")
    arguments = parser.parse_args()
    python = arguments.python or ENVIRONMENT / "bin" / "python"
    if arguments.python is None and set(arguments.scripts) - {VLLM_SCRIPT}:
        install(python, arguments.torch_index)
    failed = 0
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as variables:
        variables["HARNESS_MINUTES"] = str(arguments.minutes)
        for name in arguments.scripts:
            interpreter = arguments.vllm / "bin" / "python" if name == VLLM_SCRIPT else python
            began = time.monotonic()
            done = subprocess.run([str(interpreter), str(HERE / name)], env={**os.environ, **variables}, check=False)
            print(f"{name:24} {'passed' if done.returncode == 0 else 'FAILED'} in {time.monotonic() - began:.1f} s")
            failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
