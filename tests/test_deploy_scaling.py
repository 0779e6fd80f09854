"""What decides without Ray: how many replicas a pool has, and what keys may use at several ingresses."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polymoe.deploy.scaling import PoolPolicy, wanted_replicas
from polymoe.deploy.shared_limits import Ledger, report_of, take
from polymoe.errors import OverloadedError
from polymoe.server.keys import Key, add_key
from polymoe.server.tenants import Keyring


@pytest.mark.parametrize(
    ("replicas", "work", "first_token", "wanted"),
    [
        (2, 32, 0.1, 2),
        (2, 33, 0.1, 3),
        (3, 4, 0.1, 1),
        (3, 4, 0.6, 3),  # as quick as it has to be, and hardly more: none is taken away
        (2, 4, 1.4, 3),
        (2, 4, 60.0, 4),  # twice as many at most
        (2, 200, 60.0, 13),
    ],
)
def test_replicas_for_work_and_for_first_tokens(replicas: int, work: float, first_token: float, wanted: int) -> None:
    assert wanted_replicas(replicas, work, first_token, ongoing=16, most_first_token=1.0) == wanted


def test_without_a_goal_first_tokens_do_not_matter() -> None:
    assert wanted_replicas(3, 4, 60.0, ongoing=16, most_first_token=0.0) == 1


def test_the_policy_reads_what_replicas_record() -> None:
    policy = PoolPolicy(ongoing=4, most_first_token=1.0)
    context = SimpleNamespace(
        aggregated_metrics={"work": {"a": 5.0, "b": 4.0}, "first_token": {"a": 0.1, "b": 0.2}},
        current_num_replicas=2, target_num_replicas=2,
    )  # fmt: skip
    assert policy(context) == (3, {})
    context.aggregated_metrics = {}
    assert policy(context) == (2, {})


def keyrings(folder: Path, count: int, **limits: Any) -> list[Keyring]:
    """Of ingresses that read one file."""
    file = folder / "keys.json"
    add_key(file, Key(name="k", sha256="0" * 64, **limits))
    return [Keyring(None, file) for _ in range(count)]


def exchange(ledger: Ledger, keys: Sequence[Keyring]) -> None:
    for number, each in enumerate(keys):
        take(each, ledger.exchange(str(number), report_of(each)))


def admitted(keys: Keyring, most: int) -> int:
    """Requests of one token that are let in."""
    (tenant,) = keys.tenants.values()
    for count in range(most):
        try:
            tenant.begin(1)
        except OverloadedError:
            return count
        tenant.end()
    return most


def test_a_limit_is_one_limit_for_all_ingresses(tmp_path: Path) -> None:
    """What two ingresses let in together is what one of them would have, but for what falls between two messages."""
    ledger, keys = Ledger(), keyrings(tmp_path, 2, requests_per_minute=60)
    exchange(ledger, keys)
    total = 0
    for _ in range(30):
        total += sum(admitted(each, 2) for each in keys)
        exchange(ledger, keys)
        exchange(ledger, keys)
    assert 60 <= total <= 60 + 2 * 2 + 1, "more than one limit and what two ingresses let in between two messages"


def test_running_requests_are_counted_everywhere(tmp_path: Path) -> None:
    ledger, keys = Ledger(), keyrings(tmp_path, 3, concurrency=2)
    exchange(ledger, keys)
    (tenant,) = keys[0].tenants.values()
    for _ in range(2):
        tenant.begin(1)
    exchange(ledger, keys)
    assert [admitted(each, 1) for each in keys[1:]] == [0, 0]
    tenant.end()
    exchange(ledger, keys)
    assert admitted(keys[2], 1) == 1


def test_an_ingress_that_comes_late_is_not_charged_for_the_past(tmp_path: Path) -> None:
    ledger, (first, second) = Ledger(), keyrings(tmp_path, 2, tokens_per_minute=1000)
    (tenant,) = first.tenants.values()
    tenant.begin(900)
    exchange(ledger, [first])
    exchange(ledger, [first, second])
    assert ledger.exchange("1", report_of(second)) == {next(iter(first.tenants)): (0, 0, 1)}
