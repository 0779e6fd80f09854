"""The engine in its own process: what it answers, what it leaves behind, and how it dies."""

import asyncio
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import psutil
import pytest

from polymoe.client.client import AsyncEngineClient
from polymoe.client.output import OutputProcessor
from polymoe.config import EngineConfig
from polymoe.engine.core import EngineCore
from polymoe.errors import EngineDeadError, OverloadedError, PolymoeError, RequestError
from polymoe.protocol.messages import (
    Accepted,
    Add,
    Event,
    Ready,
    Rejected,
    Start,
    body_length,
    decode_command,
    decode_event,
    frame,
)
from polymoe.protocol.request import EngineRequest, RequestOutput, SamplingParams, SequenceId
from servers import engine_config, make_bundle
from zygote import RUN_ENGINE, zygote

LONG = SamplingParams(max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return engine_config(make_bundle(tmp_path_factory.mktemp("engine")), max_num_seqs=32)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all tests: a client belongs to the loop it was started in."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def client(config: EngineConfig, runner: asyncio.Runner) -> Iterator[AsyncEngineClient]:
    stages: list[str] = []
    client = AsyncEngineClient(config)
    runner.run(client.start(lambda stage, fraction: stages.append(stage) if 0 <= fraction <= 1 else None))
    assert stages
    yield client
    runner.run(client.shutdown())
    assert client.pid is not None
    assert not psutil.pid_exists(client.pid)


async def is_idle(client: AsyncEngineClient) -> bool:
    stats = await client.stats()
    left = [*stats.running, *stats.waiting, client.processor.num_sequences, len(client.open_streams)]
    return not any(left) and stats.kv_usage == 0


def test_the_process_answers_like_the_engine_and_forgets_what_was_aborted(
    config: EngineConfig, client: AsyncEngineClient, runner: asyncio.Runner
) -> None:
    """300 streams that are left at random moments, among them some that nobody ever looked at, leave nothing behind;
    those that are read to the end get what the same engine gives in this process."""
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=1, n=2)
    prompts = [[3 + i, 5, 9 + i] for i in range(6)]
    expected = in_this_process(config, prompts, params)

    async def scenario() -> None:
        rng = random.Random(1)

        async def leave(number: int) -> None:
            with await client.submit(f"left-{number}", "v1", [(None, [7, 8, number % 100])] * 2, LONG) as stream:
                for _ in range(rng.randrange(0, 4)):
                    await anext(stream)

        async def cancelled(number: int) -> None:
            task = asyncio.create_task(leave(number))
            await asyncio.sleep(rng.random() * 0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        async def read(number: int) -> RequestOutput:
            stream = await client.submit(f"read-{number}", "base", [(None, prompts[number])], params)
            tokens: dict[int, list[int]] = {0: [], 1: []}
            async for chunks in stream:
                for chunk in chunks:
                    tokens[chunk.index] += chunk.token_ids
            result = stream.results[0]
            assert tokens == {output.index: output.token_ids for output in result.outputs}
            return result

        leaving = [leave(i) if i % 3 else cancelled(i) for i in range(300)]
        results = await asyncio.gather(*(read(i) for i in range(6)), *leaving)
        for got, wanted in zip(results, expected, strict=False):
            assert isinstance(got, RequestOutput)
            assert [o.token_ids for o in got.outputs] == [o.token_ids for o in wanted.outputs]
            assert [o.text for o in got.outputs] == [o.text for o in wanted.outputs]
            assert got.prompt_logprobs is not None
            assert [list(p or {}) for p in got.prompt_logprobs] == [list(p or {}) for p in wanted.prompt_logprobs or []]
        assert await is_idle(client)

    runner.run(scenario())


def in_this_process(config: EngineConfig, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
    core = EngineCore(config)
    processor = OutputProcessor(core.info)
    for number, prompt in enumerate(prompts):
        for request in processor.add_request(str(number), "base", prompt, params):
            core.add_request(request)
    done: dict[str, RequestOutput] = {}
    while core.has_work():
        done |= {output.request_id: output for output in processor.process(core.step()).finished}
    return [done[str(number)] for number in range(len(prompts))]


def test_wrong_requests_and_too_many(client: AsyncEngineClient, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        with pytest.raises(RequestError, match="outside the vocabulary"):
            await client.submit("a", "base", [(None, [5]), (None, [112])], LONG)
        assert await is_idle(client)
        most = client.config.max_waiting
        with await client.submit("b", "base", [(None, [5])] * (client.config.max_num_seqs + 1), LONG) as stream:
            await anext(stream)
            with pytest.raises(OverloadedError) as refused:
                await client.submit("c", "base", [(None, [5])] * most, LONG)
            assert refused.value.retry_after > 0
            assert client.processor.num_sequences == client.config.max_num_seqs + 1
        assert await is_idle(client)

    runner.run(scenario())


def test_requests_end_when_they_are_aborted_by_id(client: AsyncEngineClient, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        chunks = [
            chunk
            async for chunk in client.generate(
                "g", "base", ("the", [5, 6]), SamplingParams(max_tokens=3, ignore_eos=True)
            )
        ]
        assert sum(len(chunk.token_ids) for chunk in chunks) == 3
        stream = await client.submit("x", "base", [(None, [5])], LONG)
        await anext(stream)
        client.abort(["x"])
        reasons = [chunk.finish_reason async for chunks in stream for chunk in chunks]
        assert reasons[-1] == "abort"
        assert stream.results[0].finished
        assert await is_idle(client)

    runner.run(scenario())


def test_a_killed_engine_ends_every_wait(config: EngineConfig) -> None:
    async def scenario() -> None:
        client = AsyncEngineClient(config)
        await client.start()
        streams = [await client.submit(f"s{i}", "base", [(None, [5, i])], LONG) for i in range(5)]
        await anext(streams[0])

        async def drain(number: int) -> None:
            async for _ in streams[number]:
                pass

        waits = [asyncio.create_task(drain(i)) for i in range(5)]
        await asyncio.sleep(0)
        stats = asyncio.create_task(client.stats())
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 5)
        assert [type(result) for result in results] == [EngineDeadError] * 5
        await asyncio.gather(stats, return_exceptions=True)
        assert not client.is_alive
        assert client.dead.is_set()
        assert client.open_streams == []
        assert client.processor.num_sequences == 0
        with pytest.raises(EngineDeadError):
            await client.submit("late", "base", [(None, [5])], LONG)
        with pytest.raises(EngineDeadError):
            await client.stats()
        await client.shutdown()

    asyncio.run(scenario())


def test_the_engine_ends_with_its_server(config: EngineConfig) -> None:
    """A killed server says nothing: the kernel closes its end of the socket. No engine may stay behind, busy or not."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = zygote.fork(RUN_ENGINE, "--fd", "3", fd=theirs.fileno())
    with ours, ours.makefile("rb") as stream:
        ours.sendall(frame(Start(config)))
        while not isinstance(read(stream), Ready):
            pass
        request = EngineRequest(request_id=SequenceId("r"), variant=0, prompt_token_ids=[5], sampling=LONG)
        ours.sendall(frame(Add(1, [request])))
        assert isinstance(read(stream), Accepted)
    assert process.wait(60) == 0


def read(stream: BinaryIO) -> Event:
    return decode_event(stream.read(body_length(stream.read(4))))


def test_an_engine_that_cannot_load_says_why(tmp_path: Path) -> None:
    """The operator sees the message of the engine's own error, not that "something" went wrong."""

    async def main() -> None:
        client = AsyncEngineClient(engine_config(tmp_path))
        with pytest.raises(PolymoeError, match=tmp_path.name) as failed:
            await client.start()
        assert not isinstance(failed.value, EngineDeadError)
        assert not client.is_alive
        assert client.pid is not None
        assert not psutil.pid_exists(client.pid)

    asyncio.run(main())


def test_messages_survive_the_wire_and_nonsense_does_not() -> None:
    add = Add(3, [])
    assert decode_command(frame(add)[4:]) == add
    error = Rejected.of(1, OverloadedError("busy", 2.5)).error()
    assert isinstance(error, OverloadedError)
    assert (error.status, error.code, error.retry_after) == (429, "rate_limit_exceeded", 2.5)
    other = Rejected.of(1, RequestError("wrong", param="n")).error()
    assert (str(other), other.status, other.param) == ("wrong", 400, "n")
    for nonsense in (b"", b"\xc1", msgspec.msgpack.encode({"kind": "Outputs", "outputs": 5})):
        with pytest.raises(EngineDeadError, match="malformed"):
            decode_event(nonsense)
