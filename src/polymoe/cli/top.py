"""`polymoe top`: a running server in the terminal, second by second."""

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table

from polymoe.config import format_bytes
from polymoe.console import Console
from polymoe.errors import PolymoeError

_TIMEOUT = 10.0  # seconds without a word of the server
Snapshot = dict[str, Any]


def top(
    url: Annotated[str, typer.Option(help="of the running server")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="show the next second and end")] = False,
) -> None:
    """Watch a running server: requests, tokens a second and latencies of each variant, every second. The server's key,
    if it has one, comes from $POLYMOE_API_KEY: command lines are seen by everybody."""
    run_top(url, os.environ.get("POLYMOE_API_KEY"), once, Console())


def run_top(url: str, api_key: str | None, once: bool, console: Console) -> None:
    """Show one snapshot a second until Ctrl-C: a table that changes in place, or in a pipe a line each.

    Raises `PolymoeError` when there is no server, or it wants another key.
    """
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(snapshots(url, api_key)) as found:
        if once:
            console.print(snapshot_table(next(found)) if console.is_terminal else snapshot_line(next(found)))
        elif console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                for snapshot in found:
                    live.update(snapshot_table(snapshot), refresh=True)
        else:
            for snapshot in found:
                console.print(snapshot_line(snapshot), soft_wrap=True, highlight=False)


def snapshots(url: str, api_key: str | None) -> Generator[Snapshot, None, None]:
    """The server's, as they come."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        request = urllib.request.Request(url.rstrip("/") + "/ui/events", headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            name = ""
            for line in response:
                text = line.decode().rstrip("\n")
                if text.startswith("event: "):
                    name = text.removeprefix("event: ")
                elif text.startswith("data: ") and name == "snapshot":
                    yield json.loads(text.removeprefix("data: "))
        raise PolymoeError(f"the server at {url} has stopped.")
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise PolymoeError("the server wants a key: give it in $POLYMOE_API_KEY.") from error
        raise PolymoeError(f"{url} answers {error.code}; is it a polymoe server of this version?") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PolymoeError(
            f"there is no server at {url} ({getattr(error, 'reason', error)}); start one with polymoe serve, or name "
            "it with --url."
        ) from error


def snapshot_table(snapshot: Snapshot) -> Table:
    """A row a variant; fits 80 columns."""
    table = Table(
        title=_headline(snapshot), title_justify="left", caption=_caption(snapshot), caption_justify="left",
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("variant", overflow="ellipsis", no_wrap=True)
    for name in ("run", "wait", "tok/s", "in/s", "TTFT p50", "p95", "next p50", "p95", "err/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for v, variant in enumerate(snapshot["variants"]):
        ttft, itl = (snapshot[kind][v] or (None,) * 3 for kind in ("ttft", "itl"))
        counts = [str(snapshot[kind][v]) if snapshot[kind] else "–" for kind in ("running", "waiting")]
        rates = [f"{snapshot[kind][v]:.0f}" for kind in ("tokens", "prompt_tokens")]
        latencies = [_seconds(value) for value in (*ttft[:2], *itl[:2])]
        table.add_row(variant, *counts, *rates, *latencies, f"{snapshot['errors'][v]:.0f}")
    return table


def snapshot_line(snapshot: Snapshot) -> str:
    """The same in a line, for logs."""
    if not snapshot["variants"]:
        return _headline(snapshot)
    worst = [max((p[1] for p in snapshot[kind] if p), default=None) for kind in ("ttft", "itl")]
    return (
        f"{_headline(snapshot)}  running {sum(snapshot['running'])}  waiting {sum(snapshot['waiting'])}  "
        f"tok/s {sum(snapshot['tokens']):.0f}  TTFT p95 {_seconds(worst[0])}  next p95 {_seconds(worst[1])}  "
        f"KV {snapshot['kv_usage']:.0%}"
    )


def _headline(snapshot: Snapshot) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(snapshot["time"]))
    loading = f" {snapshot['stage']} {snapshot['fraction']:.0%}" if snapshot["status"] == "loading" else ""
    return f"{clock}  {snapshot['status']}{loading}"


def _caption(snapshot: Snapshot) -> str:
    asked = snapshot["prefix_queries"]
    hits = f"{snapshot['prefix_hits'] / asked:.0%}" if asked else "–"
    return (
        f"KV {snapshot['kv_usage']:.0%}, prefix hits {hits}, reconfigurations {snapshot['reconfigurations']:.1f}/s, "
        f"host {format_bytes(snapshot['host_bytes'])}/s"
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms" if value >= 0.01 else f"{1e3 * value:.1f} ms"
