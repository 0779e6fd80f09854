"""llama.cpp for `make compare`: the libraries that its Node package brings, and a worker compiled against them."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from workers import HERE, WorkerError

RELEASE = "3.22.1"  # of node-llama-cpp; llama.cpp 0.5.0 of 2026-09
TYPES = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")


def install_llama(folder: Path) -> Path:
    """The compiled worker in `folder`, made now unless it is there; its libraries lie in `folder`/lib.

    The package for Linux on x86-64 has the libraries, each kind of processor's beside the others; the main package has
    the sources, of which only headers are used. Raises `WorkerError` where npm, git or g++ is missing or fails.
    """
    worker = folder / "worker_llama"
    source = HERE / "worker_llama.cpp"
    if worker.exists() and worker.stat().st_mtime > source.stat().st_mtime:
        return worker
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "lib").exists():
        for package in ("@node-llama-cpp/linux-x64", "node-llama-cpp"):
            packed = _run(["npm", "pack", "--silent", f"{package}@{RELEASE}"], folder).split()[-1]
            _run(["tar", "xzf", packed], folder)
            (folder / packed).unlink()
        shutil.rmtree(folder / "sources", ignore_errors=True)
        _run(["git", "clone", "-q", "package/llama/gitRelease.bundle", "sources"], folder)
        (folder / "package" / "bins" / "linux-x64").rename(folder / "lib")
        shutil.rmtree(folder / "package")
    libraries = sorted(str(path) for path in (folder / "lib").glob("lib*.so") if "ggml-cpu" not in path.name)
    includes = [f"-I{folder / 'sources' / part}" for part in ("include", "ggml/include", "vendor")]
    _run(["g++", "-O2", "-std=c++17", "-o", str(worker), str(source), *includes, *libraries, "-Wl,-rpath,$ORIGIN/lib"],
         folder)  # fmt: skip
    return worker


def environment(worker: Path, cores: Sequence[int]) -> dict[str, str]:
    """Of a process on `cores`, with a thread for each."""
    return {"LLAMA_CORES": ",".join(map(str, cores)), "LLAMA_LIBRARIES": str(worker.parent / "lib")}


def gguf_copy(checkpoint: Path, kind: str, worker: Path) -> Path:
    """The checkpoint as llama.cpp reads it, in one of `TYPES`; made beside it now unless it is there."""
    path = checkpoint.with_name(f"{checkpoint.name}-{kind}.gguf")
    if path.exists() and path.stat().st_mtime > (checkpoint / "config.json").stat().st_mtime:
        return path
    unfinished = path.with_suffix(".part")
    if kind == "BF16":
        from gguf_file import write_gguf  # torch and transformers only where something is written

        write_gguf(checkpoint, unfinished)
    else:
        _run([str(worker), "--quantise", str(gguf_copy(checkpoint, "BF16", worker)), str(unfinished), kind],
             checkpoint.parent, environment(worker, [0]))  # fmt: skip
    unfinished.rename(path)
    return path


class Scorer:
    """Logits of a GGUF file: one process, one sequence at a time."""

    def __init__(self, worker: Path, path: Path, max_model_len: int, cores: Sequence[int]) -> None:
        self._process = subprocess.Popen(
            [str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, **environment(worker, cores)},
        )  # fmt: skip
        self._ask(models=[str(path)], options={"max_model_len": max_model_len, "max_num_seqs": 1})

    def logits(self, tokens: Sequence[int], path: Path) -> int:
        """Write float32 `[len(tokens), vocabulary]` to `path`; returns the size of the vocabulary."""
        return int(str(self._ask(tokens=list(tokens), logits=str(path))["vocab"]))

    def stop(self) -> None:
        self._process.communicate(timeout=20)

    def _ask(self, **fields: object) -> dict[str, object]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, object] = json.loads(line) if line else {"error": "llama.cpp's process ended"}
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        return answer


def _run(command: Sequence[str], folder: Path, extra: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **(extra or {})}
        )
    except FileNotFoundError as error:
        raise WorkerError(f"llama.cpp needs {command[0]}, which is not installed") from error
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise WorkerError(f"`{' '.join(command[:4])} …` failed: {reason[0]}")
    return done.stdout
