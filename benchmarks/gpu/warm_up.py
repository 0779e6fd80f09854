"""Compile the kernels that the other parts use, on all cores at once: Triton compiles one kernel at a time otherwise.

Each process runs the engine on one layer of a model, for some of the batch sizes. Only compiled kernels are kept: which
configuration is fastest is timed later, by the parts, when nothing else runs on the device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any
from unittest import mock

_DECODE = ((1, 2), (4, 8), (16, 24), (32,), (48, 64))
# What the first layout's engine process compiles at its start, and of the others what is timed.
_PREFILL = ((4096, 16), (2048, 32), (1024, 64), (512, 128), (256,)), ((4096,), (1000, 20))
# (shape, variants, further fields of the layout); the first five decode in graphs of many sizes
_LAYOUTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("mixtral-8x7b", 2, {"base": "int4", "delta": "d3"}),
    ("mixtral-8x7b", 4, {"base": "int4", "delta": "d1"}),
    ("qwen3-30b-a3b", 4, {}),
    ("qwen3-30b-a3b", 4, {"base": "int4", "delta": "d2"}),
    ("mixtral-8x7b", 2, {"base": "int4"}),
    ("mixtral-8x7b", 1, {"resident": 6}),
)
_NUM_GRAPHED = 5


def jobs(tiny: bool) -> list[tuple[int, str]]:
    """(layout, what to run); `decode:16,24` or `prefill:4096`."""
    if tiny:
        return [(0, "decode:1")]
    found = [
        (i, "prefill:" + ",".join(map(str, lengths))) for i in range(len(_LAYOUTS)) for lengths in _PREFILL[min(i, 1)]
    ]
    found += [(i, "decode:" + ",".join(map(str, sizes))) for sizes in _DECODE[::-1] for i in range(_NUM_GRAPHED)]
    return [*found, *((i, "decode:1") for i in range(_NUM_GRAPHED, len(_LAYOUTS)))]


def run_job(layout: int, what: str, device: str, tiny: bool) -> None:
    """One process's share."""
    from engine_load import first_token_seconds, load_engine
    from polymoe.model.graphs.decode_graphs import DecodeGraphs
    from synthetic_bundle import Layout

    # Else every process would begin with what a single sequence needs.
    mock.patch.object(DecodeGraphs, "capture", return_value=None).start()
    shape, variants, fields = _LAYOUTS[layout]
    described = Layout(
        {"mixtral-8x7b": "tiny-mixtral"}[shape] if tiny else shape, variants, device=device,
        dtype="bfloat16" if device == "cuda" else "float32", layers=1, **fields,
    )  # fmt: skip
    kind, _, sizes = what.partition(":")
    core = load_engine(described, max_num_seqs=1, kv_cache_bytes=(32 << 20) if tiny else (64 << 20))
    for size in map(int, sizes.split(",")):
        if kind == "prefill" or core.runner.graphs is None:
            first_token_seconds(core, 0, size)
            continue
        graphs = DecodeGraphs(core.model, size, core.runner.graphs.batch.max_blocks)
        graphs.sizes = (size,)
        graphs.batch.fill(graphs._dummy(size), size)
        graphs._compute(size)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="real")
    parser.add_argument("--job", help="LAYOUT DECODE-OR-PREFILL, as started by this script")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tiny = arguments.shape == "tiny"
    if arguments.job:
        layout, what = arguments.job.split()
        run_job(int(layout), what, arguments.device, tiny)
        return 0
    waiting = jobs(tiny)
    running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    failed: dict[str, str] = {}
    started = time.monotonic()
    count = len(waiting)
    with tempfile.TemporaryDirectory() as scratch:
        # Timings beside other processes are worth nothing: they are kept where nobody reads them.
        environment = {**os.environ, "XDG_CACHE_HOME": scratch, "OMP_NUM_THREADS": "1"}
        while waiting or running:
            while waiting and len(running) < max(len(os.sched_getaffinity(0)), 1):
                job = "{} {}".format(*waiting.pop(0))
                options = ["--device", arguments.device, "--shape", arguments.shape, "--out", str(arguments.out)]
                command = [sys.executable, __file__, *options, "--job", job]
                log: IO[bytes] = (Path(scratch) / job.replace(" ", "-").replace(":", "-")).open("w+b")
                running[job] = subprocess.Popen(command, env=environment, stdout=log, stderr=log), log
            for job, (process, log) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    if process.returncode:
                        log.seek(0)
                        failed[job] = log.read().decode(errors="replace")[-500:]
                    log.close()
            figures = {"jobs": count, "left": len(waiting) + len(running), "failed": failed}
            arguments.out.write_text(json.dumps({**figures, "seconds": time.monotonic() - started}))
            time.sleep(0.2)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
