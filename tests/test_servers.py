"""The servers that tests start end with them, whatever happens."""

import subprocess
import threading
from pathlib import Path

import psutil
import pytest

from polymoe.client import connection
from servers import ThreadServer, engine_config


def test_a_start_that_takes_too_long_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread kept pytest from ending, hours after the last test."""

    def silent(_module: str, fd: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "600"], pass_fds=[fd])

    monkeypatch.setattr(connection, "start_process", silent)
    server = ThreadServer(engine_config(tmp_path), start_limit=1.0)
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
