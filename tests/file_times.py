"""Where the suite's time goes: the seconds of each file, and how long one worker waited for the other at the end."""

import time
from collections import defaultdict
from typing import Any

import pytest

SHOWN = 40
_seconds: dict[str, float] = defaultdict(float)
_last: dict[str, float] = {}  # worker -> when its last test ended


def pytest_runtest_logreport(report: Any) -> None:
    _seconds[report.nodeid.partition("::")[0]] += report.duration
    if hasattr(report, "node"):  # pytest-xdist's
        _last[report.node.gateway.id] = time.monotonic()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if sum(_seconds.values()) < 60:
        return
    terminalreporter.section("slowest files")
    for name, seconds in sorted(_seconds.items(), key=lambda item: -item[1])[:SHOWN]:
        terminalreporter.write_line(f"{seconds:6.1f} s {name}")
    terminalreporter.write_line(f"{sum(_seconds.values()):6.0f} s in all")
    if _last:
        terminalreporter.write_line(f"{max(_last.values()) - min(_last.values()):6.1f} s one worker alone at the end")
