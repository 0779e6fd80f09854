"""The servers that tests start end with them, whatever happens."""

import threading
from pathlib import Path

import psutil
import pytest

from servers import ThreadServer, engine_config


def test_a_start_that_takes_too_long_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its thread kept pytest from ending, hours after the last test."""
    server = ThreadServer(engine_config(tmp_path), start_limit=0.05)  # no Python starts in that time
    with pytest.raises(TimeoutError):
        server.__enter__()
    engine = server.client.pid
    assert engine is not None
    assert not psutil.pid_exists(engine)
    assert not [thread for thread in threading.enumerate() if thread.name == f"server {server.port}"]


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    server = ThreadServer(engine_config(tmp_path / "none"))
    with pytest.raises(Exception, match="none"):
        server.__enter__()
    assert not [thread for thread in threading.enumerate() if thread.name == f"server {server.port}"]
