"""`vllm bench serve`, for each variant in turn: no request fails and every answer has its length.

Its command asks for the version of a package `vllm`, which vLLM for CPUs is not called; so what the command calls is
called here.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from given import CHECKPOINTS, SECONDS, URL
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

RATE = 4.0  # requests a second
OUTPUT = 32  # tokens


def run(name: str, tokenizer: Path, folder: str) -> Any:
    options = {
        "backend": "openai", "base-url": URL, "endpoint": "/v1/completions", "model": name, "tokenizer": str(tokenizer),
        "dataset-name": "random", "random-input-len": "64", "random-output-len": str(OUTPUT),
        "num-prompts": str(max(4, round(RATE * SECONDS / len(CHECKPOINTS)))), "request-rate": str(RATE), "seed": "1",
        "result-dir": folder, "result-filename": f"{name}.json",
    }  # fmt: skip
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    named = [part for option, value in options.items() for part in (f"--{option}", value)]
    main(parser.parse_args([*named, "--save-result", "--ignore-eos", "--disable-tqdm"]))
    return json.loads((Path(folder) / f"{name}.json").read_text())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, path in CHECKPOINTS.items():
            found = run(name, path, folder)
            shown = ("num_prompts", "completed", "failed", "total_output_tokens", "median_ttft_ms")
            print(name, {key: found[key] for key in shown}, flush=True)
            assert found["failed"] == 0
            assert found["completed"] == found["num_prompts"]
            assert found["total_output_tokens"] == OUTPUT * found["completed"]
