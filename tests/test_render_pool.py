"""Chat templates are programs of strangers: what they cost is paid by their own requests."""

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from polymoe.client.render_pool import RenderPool
from polymoe.errors import OverloadedError, RequestError
from polymoe.text.chat_template import TemplateSource

GOOD = TemplateSource(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ bos_token }}{% endfor %}", {"bos_token": "<s>"}
)
LOOP = TemplateSource("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
USER: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def pool(runner: asyncio.Runner) -> Iterator[RenderPool]:
    pool = RenderPool(seconds=1.0, size=100 << 20)
    assert runner.run(pool.render(GOOD, USER)) == "[user]hi<s>"
    yield pool
    pid = pool.pid
    assert pid is not None
    children = psutil.Process(pid).children()
    assert len(children) == 2
    runner.run(pool.close())
    assert not psutil.pid_exists(pid)
    assert not any(psutil.pid_exists(child.pid) for child in children)


def test_a_template_that_loops_delays_only_its_own_requests(pool: RenderPool, runner: asyncio.Runner) -> None:
    """Two nested ranges and ten chats ended the service for all variants, also after the clients had left."""

    async def scenario() -> None:
        hostile = [asyncio.create_task(pool.render(LOOP, USER)) for _ in range(10)]
        await asyncio.sleep(0.05)
        begun = time.monotonic()
        for _ in range(5):
            assert await pool.render(GOOD, USER) == "[user]hi<s>"
        assert time.monotonic() - begun < 0.5
        with pytest.raises(RequestError, match="too long") as refused:
            await hostile[0]
        assert refused.value.param == "messages"
        for task in hostile[1:]:  # the clients leave
            task.cancel()
        await asyncio.gather(*hostile, return_exceptions=True)
        assert await pool.render(GOOD, USER, {"bos_token": "x"}) == "[user]hix"

    runner.run(scenario())


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ '%50000000000d' | format(messages | length) }}",
        "{{ '%500000000d' | format(messages | length) }}",
        "{{ messages[0].content * 999999999 }}",
        "{{ 'a' * 9999999999 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'ab' * 9000000 }}",
    ],
)
def test_a_template_that_multiplies_strings(pool: RenderPool, runner: asyncio.Runner, jinja: str) -> None:
    """`{{ '%50000000d' | format(…) }}` took gigabytes. Constants are multiplied when a template is compiled."""

    async def scenario() -> None:
        with pytest.raises(RequestError):
            await pool.render(TemplateSource(jinja), USER)
        assert await pool.render(GOOD, USER) == "[user]hi<s>"

    runner.run(scenario())
    assert pool.pid is not None
    for child in psutil.Process(pool.pid).children():
        assert child.memory_info().rss < 300 << 20


def test_a_template_that_nests_too_deeply_or_is_none(pool: RenderPool, runner: asyncio.Runner) -> None:
    deep = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}"
    broken = TemplateSource("{% for")
    refusing = TemplateSource("{{ raise_exception('no chats') }}")

    async def scenario() -> None:
        with pytest.raises(RequestError):
            await pool.render(TemplateSource(deep), USER)
        with pytest.raises(RequestError, match="cannot be used"):
            await pool.render(broken, USER)
        with pytest.raises(RequestError, match="no chats"):
            await pool.render(refusing, USER)
        with pytest.raises(RequestError, match="cannot set tokenize") as refused:
            await pool.render(GOOD, USER, {"tokenize": 1})
        assert refused.value.param == "chat_template_kwargs"
        assert "line 1" in (await pool.check(broken) or "")
        assert await pool.check(GOOD) is None

    runner.run(scenario())


def test_a_killed_renderer_is_replaced(pool: RenderPool, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        assert pool.pid is not None
        waiting = asyncio.create_task(pool.render(LOOP, USER))
        await asyncio.sleep(0.05)
        children = psutil.Process(pool.pid).children()
        os.kill(pool.pid, 9)
        with pytest.raises(RequestError, match="interrupted"):
            await waiting
        assert await pool.render(GOOD, USER) == "[user]hi<s>"
        psutil.wait_procs(children, 2)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)

    runner.run(scenario())


def test_too_many_chats_are_refused(pool: RenderPool, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        tasks = [asyncio.create_task(pool.render(LOOP, USER)) for _ in range(300)]
        await asyncio.sleep(0.1)
        refused = [task for task in tasks if task.done() and isinstance(task.exception(), OverloadedError)]
        assert len(refused) == 300 - 256
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await pool.render(GOOD, USER) == "[user]hi<s>"

    runner.run(scenario())
