"""Questions to the engine and their answers, whoever has gone away meanwhile."""

import asyncio

import pytest

from polymoe.client.pending import Pending
from polymoe.errors import EngineDeadError


def test_answers_find_their_questions() -> None:
    async def ask() -> None:
        pending: Pending[str] = Pending()
        (a, first), (b, second), (c, third) = pending.new(), pending.new(), pending.new()
        assert len({a, b, c}) == 3
        pending.done(b, "second")
        pending.fail(c, EngineDeadError("no"))
        pending.first_done("first")
        assert (await first, await second) == ("first", "second")
        with pytest.raises(EngineDeadError):
            await third
        assert not pending
        pending.first_done("nobody asked")
        pending.done(a, "twice")
        assert await first == "first"

    asyncio.run(ask())


def test_who_has_gone_away_is_not_told_and_keeps_nobody_waiting() -> None:
    async def ask() -> None:
        pending: Pending[None] = Pending()
        (gone_number, gone), (_, waiting) = pending.new(), pending.new()
        gone.cancel()
        pending.done(gone_number, None)
        pending.fail_all(EngineDeadError("the end"))
        with pytest.raises(EngineDeadError, match="the end"):
            await waiting
        assert gone.cancelled()
        assert not pending

    asyncio.run(ask())
