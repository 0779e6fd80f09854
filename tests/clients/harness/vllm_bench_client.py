"""`vllm bench serve`: one of it for each variant, all at once; no request fails and every answer has its length."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from given import CHECKPOINTS, SECONDS, URL

RATE = 1.5  # requests a second for each variant
OUTPUT = 32  # tokens


def command(name: str, tokenizer: Path, folder: str) -> list[str]:
    options = {
        "backend": "openai", "base-url": URL, "endpoint": "/v1/completions", "model": name, "tokenizer": str(tokenizer),
        "dataset-name": "random", "random-input-len": "64", "random-output-len": str(OUTPUT),
        "num-prompts": str(max(4, round(RATE * SECONDS))), "request-rate": str(RATE), "seed": "1",
        "result-dir": folder, "result-filename": f"{name}.json", "percentile-metrics": "ttft,tpot,itl,e2el",
    }  # fmt: skip
    named = [part for option, value in options.items() for part in (f"--{option}", value)]
    return [os.environ["VLLM"], "bench", "serve", *named, "--save-result", "--ignore-eos", "--disable-tqdm"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        running = [subprocess.Popen(command(name, path, folder)) for name, path in CHECKPOINTS.items()]
        codes = [process.wait() for process in running]
        assert not any(codes), codes
        for name in CHECKPOINTS:
            found = json.loads((Path(folder) / f"{name}.json").read_text())
            shown = {key: found[key] for key in ("completed", "failed", "total_output_tokens", "median_ttft_ms")}
            print(name, shown, flush=True)
            assert found["failed"] == 0
            assert found["completed"] == found["num_prompts"]
            assert found["total_output_tokens"] == OUTPUT * found["completed"]


if __name__ == "__main__":
    main()
