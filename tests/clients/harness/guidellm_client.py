"""guidellm: a steady rate of requests to each variant in turn, none of which fails."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from given import CHECKPOINTS, KEY, SECONDS, URL

RATE = 3  # requests a second


def run(name: str, tokenizer: Path, api: str, out: Path) -> Any:
    options = {
        "--backend": f"kind=openai_http,target={URL},model={name},api_key={KEY},request_format={api}",
        "--profile": f"kind=constant,rate={RATE}",
        "--constraint": f"kind=max_duration,seconds={SECONDS / len(CHECKPOINTS):.0f}",
        "--tokenizer": f"kind=hf_auto,model={tokenizer}",
        "--data": "kind=synthetic_text,prompt_tokens=64,output_tokens=24",
        "--output": f"kind=json,path={out}",
    }
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
    subprocess.run([*command, *(part for option in options.items() for part in option)], check=True)
    return json.loads(out.read_text())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for k, (name, path) in enumerate(CHECKPOINTS.items()):
            api = ("/v1/completions", "/v1/chat/completions")[k % 2]
            found = run(name, path, api, Path(folder) / f"{name}.json")
            for benchmark in found["benchmarks"]:
                totals = benchmark["metrics"]["request_totals"]
                print(name, api, totals, flush=True)
                assert totals["errored"] == 0, (name, totals)
                assert totals["successful"] > 0, (name, totals)


if __name__ == "__main__":
    main()
