"""llama.cpp for `make compare`: the libraries that its Node package brings, and a worker compiled against them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from workers import HERE, run_step

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
            packed = run_step(["npm", "pack", "--silent", f"{package}@{RELEASE}"], folder).split()[-1]
            run_step(["tar", "xzf", packed], folder)
            (folder / packed).unlink()
        shutil.rmtree(folder / "sources", ignore_errors=True)
        run_step(["git", "clone", "-q", "package/llama/gitRelease.bundle", "sources"], folder)
        (folder / "package" / "bins" / "linux-x64").rename(folder / "lib")
        shutil.rmtree(folder / "package")
    libraries = sorted(str(path) for path in (folder / "lib").glob("lib*.so") if "ggml-cpu" not in path.name)
    includes = [f"-I{folder / 'sources' / part}" for part in ("include", "ggml/include", "vendor")]
    compiler = ["g++", "-O2", "-std=c++17", "-o", str(worker), str(source)]
    run_step([*compiler, *includes, *libraries, "-Wl,-rpath,$ORIGIN/lib"], folder)
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
        run_step([str(worker), "--quantise", str(gguf_copy(checkpoint, "BF16", worker)), str(unfinished), kind],
             checkpoint.parent, environment(worker, [0]))  # fmt: skip
    unfinished.rename(path)
    return path
