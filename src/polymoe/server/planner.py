"""The planner's process beside the server: started with it, so that a change need not wait for imports, and started
again where it was killed."""

import asyncio
import os
import sys
from collections.abc import Callable

import msgspec

from polymoe.bundle.live import Addition
from polymoe.bundle.manifest import FileRecord
from polymoe.errors import ChangeRefusedError, PolymoeError
from polymoe.protocol.planning import Answer, Job, PlanJob, RankJob

# The planner makes and drops hundreds of megabytes for every layer. glibc would give them back to the system each time,
# and to get pages takes longer than all that is computed: it keeps them until the job is done, in large pages.
_MALLOC = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4611686018427387904:glibc.malloc.arena_max=1"
_TUNABLES = {"GLIBC_TUNABLES": f"{_MALLOC}:glibc.malloc.hugetlb=1"}
MODULE = "polymoe.offline.addition.process"
LONGEST_LINE = 64 << 20  # bytes of an answer: the records of all files of a variant


class Planner:
    """One process, one job at a time. All methods belong to one event loop."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Have a process that is importing what it needs."""
        if self._process is None or self._process.returncode is not None:
            self._process = await start_process("--threads", str(self._threads or 0))

    async def plan(
        self, job: Job, progress: Callable[[str, float], None]
    ) -> tuple[Addition, list[FileRecord], list[str]]:
        """(what was planned, its files, notes). Raises `ChangeRefusedError`; cancelled, the process is ended."""
        answer = await self._run(job, job.name, progress)
        assert answer.addition is not None
        return answer.addition, answer.files, answer.notes

    async def plan_bundle(self, job: PlanJob, progress: Callable[[str, float], None]) -> None:
        """Raises as `plan` does."""
        await self._run(job, "the bundle", progress)

    async def rank(self, job: RankJob, progress: Callable[[str, float], None]) -> Answer:
        """With distances and refusals. Raises as `plan` does."""
        return await self._run(job, job.name, progress)

    async def _run(self, job: Job | PlanJob | RankJob, name: str, progress: Callable[[str, float], None]) -> Answer:
        async with self._turn:
            await self.start()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(msgspec.json.encode(job) + b"\n")
                await process.stdin.drain()
                async for line in process.stdout:
                    answer = msgspec.json.decode(line, type=Answer)
                    if answer.error is not None:
                        if answer.deliberate:
                            raise ChangeRefusedError(answer.error)
                        raise PolymoeError(f"planning {name} failed: {answer.error}")
                    if answer.done:
                        return answer
                    if answer.stage != "ready":
                        progress(answer.stage, answer.fraction)
            except (ConnectionError, msgspec.DecodeError):
                pass
            except asyncio.CancelledError:
                await self._end()
                raise
            await self._end()
            raise ChangeRefusedError(
                f"the process that planned {name} ended unexpectedly; all is as before. Try again.", status=503
            )

    async def close(self) -> None:
        """End the process."""
        await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


async def start_process(*arguments: str) -> asyncio.subprocess.Process:
    """A new Python that plans what it is told on its standard input."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", MODULE, *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LONGEST_LINE,
        env=_TUNABLES | os.environ,
    )  # fmt: skip
