"""The planner's process, beside a server: it makes additions, one at a time, and gives way to everybody else.

    python -m polymoe.offline.addition.process --threads N

A line of JSON on stdin is a `Job`, each line on stdout an `Answer`; it ends when stdin does. What needs seconds to be
imported is imported before the first job comes.
"""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from polymoe.native import quiet_torch  # noqa: F401  (first: it loads torch)

# isort: split
import torch

from polymoe.bundle.reader import Bundle
from polymoe.errors import BundleError, FamilyError, PolymoeError, explain
from polymoe.offline.addition.bits import write_fitting
from polymoe.offline.addition.nearness import distance
from polymoe.offline.addition.new_variant import open_new
from polymoe.offline.api import make_plan
from polymoe.offline.plan.options import PlanOptions
from polymoe.progress import Listener
from polymoe.protocol.planning import Answer, Job, PlanJob, RankJob

_NICE = 15
_PR_SET_PDEATHSIG = 1


def run(job: Job | PlanJob | RankJob, answer: Callable[[Answer], None]) -> Answer:
    """Raises what planning raises."""
    if isinstance(job, RankJob):
        return rank(job, answer)
    if isinstance(job, PlanJob):
        listener = Listener(lambda stage, fraction: answer(Answer(stage=stage, fraction=fraction)))
        options = PlanOptions(accept_unrelated=True)  # they are served together already
        make_plan(job.specs, job.policy, job.memory, job.out, True, listener, options)
        return Answer(stage="planned", fraction=1.0, done=True)
    answer(Answer(stage="reading", fraction=0.0))
    bundle = Bundle.open(job.bundle)
    new = open_new(bundle, job.name, job.spec)
    addition, files = write_fitting(
        bundle, new, Path(job.folder), job.free_bytes, job.bits, job.max_kl,
        lambda stage, fraction: answer(Answer(stage=stage, fraction=fraction)),
    )  # fmt: skip
    return Answer(stage="planned", fraction=1.0, done=True, addition=addition, files=files, notes=new.notes)


def rank(job: RankJob, answer: Callable[[Answer], None]) -> Answer:
    """Raises `CheckpointError` for what cannot be read; of bundles that it does not fit the reason is told."""
    distances: dict[str, float] = {}
    refusals: dict[str, str] = {}
    for number, path in enumerate(job.bundles):
        answer(Answer(stage="comparing", fraction=number / len(job.bundles)))
        try:
            distances[path] = distance(Bundle.open(path), job.name, job.spec)
        except (FamilyError, BundleError) as error:
            refusals[path] = str(error)
    return Answer(stage="compared", fraction=1.0, done=True, distances=distances, refusals=refusals)


def _end_with_parent() -> None:
    """A server that was killed leaves no planner behind, however long its job is (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _give_back_memory() -> None:
    """What the server's `planner.py` lets the allocator keep during a job (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="polymoe.offline.addition.process")
    parser.add_argument("--threads", type=int, default=0)
    threads = parser.parse_args().threads
    os.nice(_NICE)
    _end_with_parent()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    if threads:
        torch.set_num_threads(threads)
    import transformers.models.auto  # noqa: F401

    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(found: Answer) -> None:
        out.write(msgspec.json.encode(found) + b"\n")
        out.flush()

    answer(Answer(stage="ready", fraction=0.0))
    for line in sys.stdin.buffer:
        try:
            answer(run(msgspec.json.decode(line, type=Job | PlanJob | RankJob), answer))
        except BrokenPipeError:
            return 0
        except (PolymoeError, OSError) as error:
            answer(
                Answer(stage="failed", fraction=0.0, error=explain(error) if isinstance(error, OSError) else str(error))
            )
        except Exception as error:
            answer(Answer(stage="failed", fraction=0.0, error=f"{type(error).__name__}: {error}", deliberate=False))
        _give_back_memory()
    return 0


if __name__ == "__main__":
    sys.exit(main())
