"""A thousand streams at once, readers that never read, clients that leave: nothing fails and nothing stays behind."""

import asyncio
import os
import random
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest

from drills.load import http, memory, neighbour, say, stream, streams
from process_server import ProcessServer
from servers import CONTEXT, make_bundle, wait_for

pytestmark = pytest.mark.drill
WRITE_TIMEOUT = 3.0
VARIANTS = ("base", "v1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessServer]:
    folder = tmp_path_factory.mktemp("streams")
    env = {**os.environ, "POLYMOE_WRITE_TIMEOUT": str(WRITE_TIMEOUT)}
    flags = ("--max-num-seqs", "1000", "--max-waiting", "4096")
    with ProcessServer(make_bundle(folder), folder, 5.0, *flags, kv_cache="64MB", env=env) as server:
        server.wait_until_ready()
        yield server


def greedy(k: int, tokens: int) -> dict[str, Any]:
    """One of sixteen requests."""
    prompt = "the fox " * (1 + k % 8)
    return {"model": VARIANTS[k // 8 % 2], "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def test_a_thousand_streams(server: ProcessServer) -> None:
    """All run at once, and each says what it says alone."""
    alone = asyncio.run(streams(server.port, [greedy(k, 60) for k in range(16)]))
    files, before = server.tree()["server"].num_fds(), memory(server)
    cpu, began = sum(server.tree()["server"].cpu_times()[:2]), time.monotonic()
    answers = asyncio.run(streams(server.port, [greedy(k, 60) for k in range(1000)]))
    took, spent = time.monotonic() - began, sum(server.tree()["server"].cpu_times()[:2]) - cpu
    wrong = [answer for answer in answers if answer.status != 200 or answer.error or not answer.done]
    assert not wrong, (len(wrong), wrong[0])
    different = [k for k, answer in enumerate(answers) if answer.text != alone[k % 16].text]
    assert not different, different
    wait_for(server.is_idle)
    wait_for(lambda: server.tree()["server"].num_fds() <= files)
    first = sorted(answer.times[0] for answer in answers)
    after = memory(server)
    say(
        "a thousand streams", seconds=took, tokens_a_second=60_000 / took, first_token_median=first[500],
        first_token_last=first[-1], longest_gap=max(answer.longest_gap for answer in answers),
        server_us_a_token=spent / 60_000 * 1e6,
        grown_mib={name: round(after[name] - before[name], 1) for name in ("server", "engine")},
    )  # fmt: skip


def test_two_hundred_clients_that_never_read(server: ProcessServer) -> None:
    """They are given up after the write timeout, and what was kept for them is free."""
    body = {**greedy(0, CONTEXT - 100), "stream": True, "n": 4, "logprobs": 20}

    def round_() -> tuple[float, float]:
        """(MiB before they are given up, seconds)."""
        socks, began = [], time.monotonic()
        for _ in range(200):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # loopback would buffer megabytes for each
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(http("/v1/completions", body))
            socks.append(sock)
        most = 0.0

        def given_up() -> bool:
            nonlocal most
            most = max(most, memory(server)["server"])
            return server.is_idle()

        time.sleep(2.0)
        wait_for(given_up, timeout=150)
        took = time.monotonic() - began
        for sock in socks:
            sock.close()
        return most, took

    before = memory(server)["server"]
    rounds = [(*round_(), memory(server)["server"]) for _ in range(4)]
    say(
        "two hundred that never read, four times", before_mib=before,
        most_mib=[round(most, 1) for most, _, _ in rounds],
        after_mib=[round(after, 1) for _, _, after in rounds], seconds=[round(took, 1) for _, took, _ in rounds],
    )  # fmt: skip
    assert rounds[3][2] < rounds[1][2] * 1.03, "what one round holds is what the next one takes"


def test_three_hundred_aborted_streams(server: ProcessServer) -> None:
    """Before the answer, in the first token, in the middle: blocks, requests and memory are free again."""
    rng = random.Random(0)

    async def leave(k: int) -> None:
        if k % 4 == 0:  # before there is any answer
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(http("/v1/completions", {**greedy(k, 500), "stream": k % 8 == 0}))
            await asyncio.sleep(rng.random() * 0.1)
            writer.transport.abort()
            del reader
        else:
            await stream(server.port, greedy(k, 900), leave_after=rng.randint(1, 40))

    async def three_hundred() -> None:
        async with neighbour(server, 200):
            for start in range(0, 300, 50):
                await asyncio.gather(*(leave(k) for k in range(start, start + 50)))

    taken = []
    for _ in range(3):
        asyncio.run(three_hundred())
        wait_for(server.is_idle)
        taken.append(memory(server))
    say("three rounds of three hundred aborts", **{name: [round(t[name], 1) for t in taken] for name in taken[0]})
    for name in ("server", "engine"):
        assert statistics.fmean([taken[1][name], taken[2][name]]) < taken[0][name] * 1.03 + 2, taken
