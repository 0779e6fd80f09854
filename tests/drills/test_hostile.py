"""Clients that are slow on purpose, templates and schemas that cost as much as they can: neighbours do not notice."""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from drills.load import LIMIT, memory, neighbour, post, say
from families import make_family
from polymoe.offline.api import make_plan
from process_server import ProcessServer
from servers import CONTEXT, wait_for

pytestmark = pytest.mark.drill
HEADER_TIMEOUT, BODY_TIMEOUT = 3.0, 5.0
LONGEST_GAP = 2.0  # seconds that a neighbour's stream may pause while two cores are shared with the clients and a test
# A checkpoint whose template is hostile to everybody is refused when it is planned; these are to some conversations.
HOSTILE = {
    "v1": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "v2": "{{ '%500000000d'|format(messages|length) }}",
    "v3": "{% set x = ['aaaaaaaaaaaaaaaa'] %}{% for a in range(40) %}{% set _ = x.append(x[-1] ~ x[-1]) %}{% endfor %}"
    "{{ x[-1] }}",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessServer]:
    """`base` is well-behaved; the templates of the other variants are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = make_family(
        "mixtral", folder / "checkpoints", num_variants=4, perturb=None, tokenizer=True, all_bytes=True,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    for name, template in HOSTILE.items():
        choice = (
            f"{{% if 'fox' in messages[0].content %}}{template}{{% else %}}{{{{ messages[0].content }}}}{{% endif %}}"
        )
        (paths[name] / "chat_template.jinja").write_text(choice)
    make_plan(paths, "separate", None, folder / "bundle")
    env = {**os.environ, "POLYMOE_HEADER_TIMEOUT": str(HEADER_TIMEOUT), "POLYMOE_BODY_TIMEOUT": str(BODY_TIMEOUT)}
    with ProcessServer(folder / "bundle", folder, 5.0, env=env) as server:
        server.wait_until_ready()
        yield server


async def drip(server: ProcessServer, begin: bytes, piece: bytes) -> tuple[float, bytes]:
    """Send a byte now and then; (seconds until the server ended it, what it said)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    began, said = time.monotonic(), b""
    writer.write(begin)
    with contextlib.suppress(ConnectionError):
        while not reader.at_eof() and time.monotonic() - began < LIMIT:
            writer.write(piece)
            with contextlib.suppress(TimeoutError):
                said += await asyncio.wait_for(reader.read(1 << 16), 0.3)
            await writer.drain()
    writer.close()
    return time.monotonic() - began, said


def test_slow_heads_and_bodies(server: ProcessServer) -> None:
    """Three hundred heads and two hundred bodies that come byte by byte."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
    body = head + b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    files, before = server.tree()["server"].num_fds(), memory(server)["server"]

    async def drill() -> tuple[list[tuple[float, bytes]], list[tuple[float, bytes]], float]:
        async with neighbour(server, 300) as answers:
            heads = asyncio.gather(*(drip(server, head, b"x") for _ in range(300)))
            bodies = asyncio.gather(*(drip(server, body, b" ") for _ in range(200)))
            found = await heads, await bodies
        return *found, max(answer.longest_gap for answer in answers)

    heads, bodies, gap = asyncio.run(drill())
    wait_for(lambda: server.tree()["server"].num_fds() <= files)
    say(
        "slow heads and bodies", heads_ended_after_s=max(took for took, _ in heads),
        bodies_ended_after_s=max(took for took, _ in bodies), longest_gap=gap,
        grown_mib=memory(server)["server"] - before,
    )  # fmt: skip
    assert all(took < HEADER_TIMEOUT + 3 for took, _ in heads)
    assert all(took < BODY_TIMEOUT + 8 for took, _ in bodies)  # the rest of a refused body may come for a moment
    assert all(said.startswith(b"HTTP/1.1 408 ") for _, said in bodies)
    assert gap < LONGEST_GAP


def test_hostile_templates(server: ProcessServer) -> None:
    """A loop without an end, a text of half a gigabyte, a text that doubles: sixty chats of each at once."""
    before = memory(server)

    async def drill() -> tuple[list[int], list[float], float]:
        async with neighbour(server, 300) as answers:
            chats = asyncio.gather(
                *(
                    post(server, "/v1/chat/completions", chat(name))
                    for _ in range(20)
                    for name in HOSTILE
                )
            )  # fmt: skip
            times = []
            while not chats.done():
                began = time.monotonic()
                status, answer = await post(server, "/v1/chat/completions", chat("base"))
                times.append(time.monotonic() - began)
                assert status == 200, answer
                await asyncio.sleep(0.2)
            found = [status for status, _ in await chats]
        return found, times, max(answer.longest_gap for answer in answers)

    statuses, times, gap = asyncio.run(drill())
    after = memory(server)
    say(
        "hostile templates", answers={s: statuses.count(s) for s in set(statuses)}, longest_gap=gap,
        slowest_chat_of_another=max(times), server_grown_mib=after["server"] - before["server"],
    )  # fmt: skip
    assert set(statuses) <= {400, 429}
    assert 400 in statuses
    assert gap < LONGEST_GAP
    assert max(times) < 10
    assert after["server"] < before["server"] * 1.05 + 8
    assert len(after) == len(before), "the processes that render are there again, and no more of them"


def chat(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 2}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "additionalProperties": False}
        if depth > 12:
            schema = {"type": "array", "items": schema["properties"]["a"]}
    return schema


def _optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{k}": {"type": "integer"} for k in range(count)}}


HOSTILE_SCHEMAS: dict[str, dict[str, Any]] = {
    "an exponential regex": {"regex": "(a?){400}a{400}"},
    "a regex of regexes": {"regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"},
    "a long choice of letters": {"regex": "(" + "|".join("ab" * k for k in range(1, 300)) + ")*c"},
    "an intersection": {"json": {"type": "string", "pattern": "^(.*a.{0,200}){20}$", "minLength": 500}},
    "all of unicode": {"regex": r"(\p{L}|\p{N}|\p{S}){1,5000}"},
    "deep": {"json": _nested(200)},
    "wide and deep": {"json": _nested(10)},
    "many properties": {"json": _optional(1500)},
    "too many properties": {"json": _optional(5000)},
    "a large enum": {"json": {"enum": [f"value {k} of many" for k in range(5000)]}},
    "a long array": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 100000}},
    "a long string": {"json": {"type": "string", "minLength": 10_000_000, "maxLength": 20_000_000}},
    "numbers": {"json": {"type": "number", "multipleOf": 1e-300, "minimum": -1e300, "maximum": 1e300}},
    "itself": {"json": {"$ref": "#"}},
    "two that need each other": {
        "json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    },
    "all of alternatives": {
        "json": {"allOf": [{"anyOf": [{"minimum": k * j, "type": "integer"} for k in range(8)]} for j in range(8)]}
    },
    "an ambiguous grammar": {"grammar": 'start: s\ns: s s | s s s | "a" | ""'},
    "a grammar without an end": {"grammar": 'start: a\na: "x" a'},
    "no grammar": {"grammar": "(" * 10_000},
}


def test_hostile_schemas(server: ProcessServer) -> None:
    """Each is answered, with an error or without, while a neighbour's stream goes on."""
    before = memory(server)
    took: dict[str, tuple[int, float]] = {}

    async def ask(name: str, wanted: dict[str, Any]) -> None:
        began = time.monotonic()
        body = {"model": "base", "prompt": "the", "max_tokens": 30, "seed": 1, "structured_outputs": wanted}
        status, answer = await post(server, "/v1/completions", body)
        took[name] = status, time.monotonic() - began
        assert status in (200, 400, 429), answer

    async def drill() -> float:
        async with neighbour(server, 300) as answers:
            for _ in range(2):
                await asyncio.gather(*(ask(name, wanted) for name, wanted in HOSTILE_SCHEMAS.items()))
        return max(answer.longest_gap for answer in answers)

    gap = asyncio.run(drill())
    wait_for(server.is_idle)
    after = memory(server)
    slowest = max(took, key=lambda name: took[name][1])
    say(
        "hostile schemas", refused=sum(status == 400 for status, _ in took.values()), of=len(took),
        slowest=f"{took[slowest][1]:.1f} s ({slowest})", longest_gap=gap,
        grown_mib={name: round(after[name] - before[name], 1) for name in ("server", "engine")},
    )  # fmt: skip
    print({name: (status, round(seconds, 2)) for name, (status, seconds) in took.items()})
    assert all(seconds < 60 for _, seconds in took.values()), took
    assert gap < LONGEST_GAP
    assert after["server"] - before["server"] < 200
