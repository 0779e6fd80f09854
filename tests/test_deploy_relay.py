"""A replica's relay over a real engine, and ingresses that use it, without Ray."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from polymoe.client.request_stream import RequestStream
from polymoe.deploy.link import Asked, ReplicaLink, RetriedStream
from polymoe.deploy.relay import Relay, drain
from polymoe.deploy.wire import Address
from polymoe.errors import EngineDeadError, RequestError, UnknownVariantError
from polymoe.protocol.request import QoS, SamplingParams
from servers import LIMIT, engine_config, make_bundle

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("relay"))


@asynccontextmanager
async def relay_of(bundle: Path) -> AsyncIterator[Relay]:
    relay = Relay(engine_config(bundle))
    try:
        await relay.start()
        yield relay
    finally:
        await relay.close()


async def linked(relay: Relay, address: Address, name: str = "one") -> ReplicaLink:
    link = ReplicaLink(name, address, relay.config, None)
    await link.start()
    return link


async def text_of(stream: RequestStream) -> str:
    return "".join([chunk.text for chunk in [c async for chunks in stream for c in chunks]])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.01)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), LIMIT))


def test_ingresses_share_an_engine(bundle: Path) -> None:
    """Each gets what it asked for, by a socket's path or by TCP; the one that goes takes its requests with it."""

    async def work() -> None:
        async with relay_of(bundle) as relay:
            here, there = await relay.listen(), await relay.listen("127.0.0.1")
            assert Path(here.path).parent.stat().st_mode & 0o077 == 0
            one, two = await linked(relay, here), await linked(relay, there, "two")
            short = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            streams = [
                await link.submit(f"together {name}", name, [(None, [5, 6, 7])], short)
                for link, name in ((one, "base"), (two, "v1"))
            ]
            together = await asyncio.gather(*map(text_of, streams))
            alone = [await text_of(await two.submit(name, name, [(None, [5, 6, 7])], short)) for name in ("base", "v1")]
            assert together == alone
            assert together[0] != together[1]
            with pytest.raises(UnknownVariantError):
                await one.submit("a", "nobody", [(None, [5])], short)
            most = [(None, [5])] * relay.config.max_waiting
            await one.submit("many", "base", most, LONG)
            with pytest.raises(RequestError, match="1024 requests are waiting"):
                await one.submit("more", "base", most, LONG)
            one.abort(one.open_streams)
            await until(lambda: relay.num_sequences == 0)

            kept = await one.submit("kept", "base", [(None, [8])], LONG)
            await two.submit("lost", "base", [(None, [8])], LONG)
            with pytest.raises(RequestError, match="in use"):
                await two.submit("kept", "base", [(None, [8])], LONG)
            await two.shutdown()
            await until(lambda: relay.num_sequences == 1)
            await text_of(kept)
            assert kept.results[0].outputs[0].finish_reason == "length"
            await drain(relay, LIMIT, idle=0.0)

    run(work)


def test_who_has_no_token_is_not_heard(bundle: Path) -> None:
    async def work() -> None:
        async with relay_of(bundle) as relay:
            address = await relay.listen("127.0.0.1")
            with pytest.raises(EngineDeadError):
                await linked(relay, Address(host=address.host, port=address.port, token="guess"))
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            assert (await (await linked(relay, address)).stats()).running == [0, 0]

    run(work)


def test_a_request_begins_anew_where_its_engine_is_killed(bundle: Path) -> None:
    """At another replica, with the same tokens, as long as nobody has seen a part of the answer."""

    async def work() -> None:
        async with relay_of(bundle) as first, relay_of(bundle) as second:
            links = [await linked(relay, await relay.listen(), name) for relay, name in ((first, "1"), (second, "2"))]
            lost: asyncio.Queue[RetriedStream] = asyncio.Queue()
            closed: list[RetriedStream] = []

            def stream(name: str) -> RetriedStream:
                asked = Asked(links[0].processor.variant("v1"), [(None, [5, 6])], LONG, "", QoS())
                return RetriedStream(name, asked, lost.put_nowait, closed.append)

            unseen, seen = stream("unseen"), stream("seen")
            for each in (unseen, seen):
                await each.submit_to(links[0])
            await anext(seen)
            assert first.pid is not None
            os.kill(first.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError):
                await text_of(seen)
            assert await lost.get() is unseen
            with pytest.raises(EngineDeadError):
                await unseen.submit_to(links[0])
            await unseen.submit_to(links[1])
            expected = await text_of(await links[1].submit("alone", "v1", [(None, [5, 6])], LONG))
            assert await text_of(unseen) == expected
            assert lost.empty()
            unseen.close()
            unseen.close()
            assert closed == [unseen]
            assert first.dead.is_set()

    run(work)
