"""All parts, each a process with a time of its own: a part that fails or hangs is recorded and the rest goes on.

    benchmarks/gpu/run.sh OUT [--device cpu --shape tiny] [--parts NAME,…]

OUT gets `results.json`, `results.md` and `logs.tar.gz` with what each part printed. The last line printed is the JSON.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targets import rows, table

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NEEDED = {
    "torch": (2, 11), "triton": (3, 6), "transformers": (5, 17), "msgspec": (0, 19), "safetensors": (0, 6),
    "rich": (13, 9), "pytest": (8, 0), "pytest-xdist": (3, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What is run, and for how many seconds at most on a GPU."""

    name: str
    command: list[str]
    seconds: float
    environment: tuple[tuple[str, str], ...] = ()


def parts(device: str, shape: str, out: Path) -> list[Part]:
    """In order of importance for those that come after: checks first, then one model after the other."""
    options = ["--device", device, "--shape", shape]

    def script(file: str, name: str, seconds: float, *more: str) -> Part:
        result = str(out / f"{name}.json")
        return Part(name, [sys.executable, str(HERE / file), *more, *options, "--out", result], seconds)

    names = ("exactness", "gpu_experts", "gpu_exact_deltas", "gpu_segmented_linear")
    tests = [f"tests/test_{name}.py" for name in names]
    # Of the architectures those that differ most, and nothing that runs on the CPU alone.
    left_out = ("cpu", "launched_before", "switch", "qwen2", "olmoe", "granite", "glm4", "phimoe")
    pick = ["-n", "12", "-k", " and ".join(f"not {name}" for name in left_out)]
    if device == "cpu":
        tests, pick = ["tests/test_device_path.py"], ["-k", "mixed_batch and mixtral"]
    exactness = [sys.executable, "-m", "pytest", "-q", *tests, *pick, "-p", "no:cacheprovider"]
    return [
        script("warm_up.py", "warm_up", 100),
        script("kernel_checks.py", "kernels", 80),
        # Tiny models in float32, whose kernels nothing else uses: no time to compile every candidate.
        Part("exactness", exactness, 90, (("POLYMOE_NO_AUTOTUNE", "1"),)),
        script("model_parts.py", "qwen3_shared", 55, "qwen3_shared"),
        script("model_parts.py", "mixtral_two", 50, "mixtral_two"),
        script("model_parts.py", "mixtral_four", 50, "mixtral_four"),
        script("model_parts.py", "qwen3_delta", 45, "qwen3_delta"),
        script("model_parts.py", "mixtral_switch", 35, "mixtral_switch"),
        script("scenario.py", "scenario", 200),
        script("model_parts.py", "mixtral_stored", 60, "mixtral_stored"),
    ]


def run_part(part: Part, folder: Path, seconds: float) -> dict[str, Any]:
    """Run one part; its figures, or what went wrong."""
    result, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    command = [*part.command]
    if part.name == "scenario":
        command += ["--seconds", str(max(seconds - 10, 5))]
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env={**os.environ, **dict(part.environment)},
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with the engines that it started
            process.wait()
            code = None
    figures: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    figures["wall_s"] = time.monotonic() - started
    figures["last_line"] = (log.read_text(errors="replace").strip().splitlines() or [""])[-1][-300:]
    if code != 0:
        figures["error"] = f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}"
        figures["log"] = log.read_text(errors="replace")[-2000:]
    return figures


def describe(device: str) -> dict[str, Any]:
    """Versions, device and driver. Exits with what is missing."""
    found, missing = {}, []
    for name, least in NEEDED.items():
        wanted = f"{name} >= {'.'.join(map(str, least))}"
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{wanted} (not installed)")
            continue
        if tuple(int(part) for part in found[name].split("+")[0].split(".")[:2]) < least:
            missing.append(f"{wanted} (there is {found[name]})")
    if missing:
        sys.exit(f"benchmarks/gpu/run.sh needs {', '.join(missing)}.")
    facts: dict[str, Any] = {"versions": found, "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")}
    if device == "cuda":
        query = "name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            facts["device"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            facts["device"] = f"nvidia-smi: {error}"
        code = (
            "import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.total_memory, torch.version.cuda)"
        )
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if asked.returncode:
            sys.exit(f"torch {found['torch']} has no CUDA device: {asked.stderr.strip().splitlines()[-1:]}")
        facts["torch_sees"] = asked.stdout.strip()
    else:
        facts["device"] = "cpu, Triton's interpreter: the figures mean nothing"
    return facts


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=("real", "tiny"), default="real")
    parser.add_argument("--parts", help="names, separated by commas; default all")
    parser.add_argument("--seconds", type=float, default=530.0, help="of all parts together")
    parser.add_argument("--least", type=float, default=10.0, help="seconds; with fewer left no part is started")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        chosen = parts(arguments.device, arguments.shape, work)
        if arguments.parts:
            names = arguments.parts.split(",")
            if unknown := set(names) - {part.name for part in chosen}:
                parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {[p.name for p in chosen]}")
            chosen = [part for part in chosen if part.name in names]
        report: dict[str, Any] = {**describe(arguments.device), "shape": arguments.shape, "parts": {}}
        print(json.dumps({name: report[name] for name in ("device", "versions", "date")}), flush=True)
        end = time.monotonic() + arguments.seconds
        for part in chosen:
            left = end - time.monotonic()
            limit = min(part.seconds if arguments.device == "cuda" else 600.0, left)
            too_late = {"error": "not started: out of time"}
            report["parts"][part.name] = run_part(part, work, limit) if left >= arguments.least else too_late
            figures = report["parts"][part.name]
            print(f"{part.name}: {figures.get('error', 'done')}, {figures.get('wall_s', 0):.0f} s", flush=True)
            found = rows(report["parts"])
            report["targets"] = [row.as_dict() for row in found]
            write(out / "results.json", json.dumps(report, indent=1))  # now, in case the machine is taken away
        with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
            for log in sorted(work.glob("*.log")):
                archive.add(log, log.name)
    text = table(found)
    write(out / "results.md", f"{report['device']}, {report['date']}\n\n{text}\n")
    print(text)
    print(json.dumps(report))
    return int(any("error" in figures for figures in report["parts"].values()))


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
