"""A server in a process of its own, as an operator starts it."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil

from servers import CONTEXT, events, free_port, wait_for
from zygote import ENGINE, ENGINE_NAME, RUN_COMMAND, Forked, zygote

BODY = {"model": "base", "prompt": "the fox", "stream": True, "ignore_eos": True}


class ProcessServer:
    """A server in its own process, with its output in a file."""

    def __init__(
        self, bundle: Path, folder: Path, grace: float, *flags: str, kv_cache: str = "16MB", fresh: bool = True,
        **popen: Any,
    ) -> None:  # fmt: skip
        """flags: of `polymoe serve`. popen: of the process, where its output goes for example. Not fresh: it and its
        engine are forked from a process that has imported what they need, see zygote.py."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        command = ["serve", str(bundle), "--port", str(self.port), "--grace", str(grace), "--threads", "1", *flags]
        command += ["--device", "cpu", "--kv-cache", kv_cache]
        self.process: subprocess.Popen[bytes] | Forked
        with self.log.open("wb") as log:
            if fresh or sys.platform != "linux":
                self.process = subprocess.Popen(
                    [sys.executable, "-c", RUN_COMMAND, *command],
                    **{"stdout": log, "stderr": subprocess.STDOUT, **popen},
                )
            else:
                out, error = (popen.get(name, log.fileno()) for name in ("stdout", "stderr"))
                self.process = zygote.fork(
                    RUN_COMMAND, *command, out=out, error=error, read=popen.get("stdin", 0), engines=2
                )

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return httpx.get(f"{self.url}/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, timeout=120)

    def engine(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        running = (c for c in children if c.status() != psutil.STATUS_ZOMBIE)
        (engine,) = (c for c in running if c.name() == ENGINE_NAME or ENGINE in c.cmdline())
        return engine

    def stream(self, seen: list[Any], running: threading.Event, max_tokens: int) -> None:
        """Read a stream to its end, in a thread."""
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json={**BODY, "max_tokens": max_tokens}, timeout=60
        ) as r:
            for event in events(r):
                seen.append(event)
                if len(seen) == 5:
                    running.set()

    def during_a_stream(self, action: Any, max_tokens: int = CONTEXT - 50) -> tuple[list[Any], int]:
        """(what a client receives, the exit code) when `action` happens while it streams."""
        self.wait_until_ready()
        engine = self.engine()
        seen: list[Any] = []
        running = threading.Event()
        reader = threading.Thread(target=self.stream, args=(seen, running, max_tokens))
        reader.start()
        assert running.wait(30)
        action(engine)
        code = self.process.wait(30)
        reader.join(10)
        assert not reader.is_alive(), "the client hangs"
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
        return seen, code

    def stop(self, _: psutil.Process) -> None:
        self.process.send_signal(signal.SIGTERM)

    def tree(self) -> dict[str, psutil.Process]:
        """The server's process and those that it started, by what they are for."""
        found = {"server": psutil.Process(self.process.pid), "engine": self.engine()}
        others = (c for c in found["server"].children(recursive=True) if c.pid != found["engine"].pid)
        return found | {f"renderer {k}": child for k, child in enumerate(sorted(others, key=lambda c: c.pid))}

    def metric(self, name: str, prefix: str = "vllm") -> float:
        """The metric of that name, added up over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        found = [line for line in lines if line.startswith((f"{prefix}:{name}{{", f"{prefix}:{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def is_idle(self) -> bool:
        """Nothing runs or waits, no block is held, and nobody waits for an answer."""
        held = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(map(self.metric, held)) and httpx.get(f"{self.url}/load").json() == {"server_load": 0}

    def __enter__(self) -> "ProcessServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
