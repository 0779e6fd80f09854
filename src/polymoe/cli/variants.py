"""`polymoe variants`: the set of variants of a running server."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from polymoe.config import format_bytes
from polymoe.console import Console
from polymoe.errors import ConfigError, PolymoeError
from polymoe.progress import stage_progress

app = typer.Typer(
    name="variants", help="Add, replace and remove variants of a running server.", no_args_is_help=True,
    rich_markup_mode=None,
)  # fmt: skip
console = Console()

_LOOK_EVERY = 0.2  # seconds
_ANSWER_WITHIN = 60.0  # seconds

Url = Annotated[str, typer.Option(envvar="POLYMOE_URL", help="of the server")]
KeyFile = Annotated[
    Path | None, typer.Option("--admin-key-file", help="file with the admin's key; or set POLYMOE_ADMIN_KEY")
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="until it is done, with its progress")]
Json = Annotated[bool, typer.Option("--json", help="print the server's answer")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="of the variant")]
Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="PATH, BASE+ADAPTER or BASE+PATCH below the server's --variants-root")
]
Bits = Annotated[
    str | None,
    typer.Option(metavar="1…5|auto", help="of corrections on what is there; auto: what fits; default lossless"),
]
MaxKl = Annotated[
    float | None, typer.Option(help="nats a token that may be lost, as predicted: the fewest bits that keep it")
]
Evict = Annotated[
    str | None,
    typer.Option(
        metavar="previous|unused",
        help="what makes room: versions that are kept for rollback, then added ones that nobody asked for longest",
    ),
]
_ALL = "-"  # in place of a name: the change is about all variants
_URL = "http://127.0.0.1:8000"


class _Server:
    """Requests with the admin's key."""

    def __init__(self, url: str, key_file: Path | None) -> None:
        self._url, self._key = url.rstrip("/"), _key(key_file)

    def call(self, method: str, *path: str, body: dict[str, Any] | None = None, query: str = "") -> Any:
        """`path`: what follows /v1/variants, piece by piece. Raises `PolymoeError` with what the server says."""
        url = "/".join([f"{self._url}/v1/variants", *(quote(piece, safe="@") for piece in path)]) + query
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(url, data, headers, method=method)
            with urllib.request.urlopen(request, timeout=_ANSWER_WITHIN) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise PolymoeError(_message(error)) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise PolymoeError(
                f"{self._url} does not answer as polymoe does ({reason}); is the server running?"
            ) from error

    def follow(self, name: str, change: dict[str, Any], show: bool) -> dict[str, Any]:
        """Wait for a change. Raises `PolymoeError` where it failed."""
        with stage_progress(console if show else Console(quiet=True)) as progress:
            while change["state"] not in ("done", "failed"):
                progress(change["stage"] or change["state"], change["fraction"])
                time.sleep(_LOOK_EVERY)
                change = self.call("GET", name)
        if change["error"] is not None:
            raise PolymoeError(change["error"]["message"])
        return change


def _bits(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if text not in ("1", "2", "3", "4", "5"):
        raise ConfigError(f"--bits {text[:40]}: give 1, 2, 3, 4, 5 or auto.")
    return int(text)


def _key(file: Path | None) -> str:
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{file}: the key cannot be read ({reason}).") from error
    else:
        key = os.environ.get("POLYMOE_ADMIN_KEY", "")
    if not key:
        raise ConfigError("give the admin's key: --admin-key-file FILE, or set POLYMOE_ADMIN_KEY.")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("the admin's key has characters that no HTTP header can carry; is it the right file?")
    return key


def _message(error: urllib.error.HTTPError) -> str:
    """What an error of the server says."""
    try:
        message: str = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answered {error.code}; is it polymoe?"
    return message


def _done(server: _Server, name: str, change: dict[str, Any], wait: bool, as_json: bool, said: str) -> None:
    if wait:
        change = server.follow(name, change, not as_json)
    name = _about(change)
    if as_json:
        print(json.dumps(change))
        return
    for note in change["notes"]:
        console.print(note, soft_wrap=True, highlight=False)
    if wait:
        version = f" (version {change['version'][:8]})" if change["version"] else ""
        console.print(f"{name} {said}{version}.")
    else:
        console.print(f"{name}: {change['state']}; `polymoe variants list` shows how far it is.")


@app.command(name="list")
def list_variants(url: Url = _URL, admin_key_file: KeyFile = None, as_json: Json = False) -> None:
    """Versions that are held, what names mean, and changes that are going on."""
    found = _Server(url, admin_key_file).call("GET")
    if as_json:
        print(json.dumps(found))
        return
    table = Table("names", "version", "state", "own bytes", "in flight", "source")
    for card in found["data"]:
        names = ", ".join(card["names"]) or f"({card['name']})"
        state = card["state"] + (", pinned" if card["pinned"] else "")
        table.add_row(
            names, card["version"][:8], state, format_bytes(card["bytes"]) if card["bytes"] else "planned",
            str(card["in_flight"]), card["source"],
        )  # fmt: skip
    console.print(table)
    for change in found["changes"]:
        if change["state"] == "failed":
            console.print(f"{_about(change)}: {change['kind']} failed: {change['error']['message']}", soft_wrap=True)
        elif change["state"] != "done":
            console.print(f"{_about(change)}: {change['stage'] or change['state']}, {change['fraction']:.0%}")
    room = "what is free" if found["headroom"] is None else format_bytes(found["headroom"])
    console.print(f"{len(found['data'])} of {found['max_variants']} versions; headroom {room}.")


def _about(change: dict[str, Any]) -> str:
    """The name of a variant, or what "-" stands for."""
    return "the bundle" if change["name"] == _ALL else str(change["name"])


@app.command()
def add(
    name: Name, source: Source, url: Url = _URL, admin_key_file: KeyFile = None, bits: Bits = None,
    max_kl: MaxKl = None, evict: Evict = None, wait: Wait = True, as_json: Json = False,
) -> None:  # fmt: skip
    """Serve one more variant."""
    server = _Server(url, admin_key_file)
    body = {"name": name, "source": source, "bits": _bits(bits), "max_kl": max_kl, "evict": evict}
    _done(server, name, server.call("POST", body=body), wait, as_json, "is served")


@app.command()
def replace(
    name: Name, source: Source, url: Url = _URL, admin_key_file: KeyFile = None, bits: Bits = None,
    max_kl: MaxKl = None, evict: Evict = None, wait: Wait = True, as_json: Json = False,
) -> None:  # fmt: skip
    """Let a name mean a new version, in one step, once that is there."""
    server = _Server(url, admin_key_file)
    body = {"source": source, "bits": _bits(bits), "max_kl": max_kl, "evict": evict}
    _done(server, name, server.call("PUT", name, body=body), wait, as_json, "is replaced")


@app.command()
def patch(
    name: Name,
    file: Annotated[str, typer.Argument(metavar="PATCH", help="changed values: docs/checkpoints.md")],
    url: Url = _URL, admin_key_file: KeyFile = None, evict: Evict = None, wait: Wait = True, as_json: Json = False,
) -> None:  # fmt: skip
    """Replace a variant by itself with the values of a patch."""
    server = _Server(url, admin_key_file)
    body = {"source": f"{name}+{file}", "evict": evict}
    _done(server, name, server.call("PUT", name, body=body), wait, as_json, "is patched")


@app.command()
def remove(
    name: Name, url: Url = _URL, admin_key_file: KeyFile = None,
    force: Annotated[bool, typer.Option(help="end its requests; else they finish first")] = False,
    wait: Wait = True, as_json: Json = False,
) -> None:  # fmt: skip
    """Serve a variant no longer."""
    server = _Server(url, admin_key_file)
    change = server.call("DELETE", name, query=f"?force={str(force).lower()}")
    _done(server, name, change, wait, as_json, "is removed")


@app.command()
def alias(
    name: Name,
    to: Annotated[str, typer.Argument(help="a variant, or name@version")],
    url: Url = _URL, admin_key_file: KeyFile = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Let a name, old or new, mean what another one means."""
    _pointed(_Server(url, admin_key_file).call("POST", name, "alias", body={"to": to}), name, as_json)


@app.command()
def rollback(name: Name, url: Url = _URL, admin_key_file: KeyFile = None, as_json: Json = False) -> None:
    """Let a name mean the version before."""
    _pointed(_Server(url, admin_key_file).call("POST", name, "rollback"), name, as_json)


@app.command()
def pin(
    model: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="what to keep")],
    url: Url = _URL, admin_key_file: KeyFile = None,
    off: Annotated[bool, typer.Option("--off", help="no longer")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Keep a version whatever names mean."""
    card = _Server(url, admin_key_file).call("POST", model, "pin", body={"pinned": not off})
    if as_json:
        print(json.dumps(card))
    else:
        console.print(f"{card['name']}@{card['version'][:8]} is {'not pinned any more' if off else 'pinned'}.")


@app.command()
def replan(
    url: Url = _URL, admin_key_file: KeyFile = None,
    policy: Annotated[str | None, typer.Option(help="as of `polymoe plan`; default that of the bundle")] = None,
    memory: Annotated[str | None, typer.Option(help="as of `polymoe plan`; default that of the bundle")] = None,
    wait: Wait = True, as_json: Json = False,
) -> None:  # fmt: skip
    """Plan what is served now as a new bundle, from the sources, and switch to it."""
    server = _Server(url, admin_key_file)
    change = server.call("POST", _ALL, "replan", body={"policy": policy, "memory": memory})
    _done(server, _ALL, change, wait, as_json, "is planned anew and served")


def _pointed(card: dict[str, Any], name: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(card))
    else:
        console.print(f"{name} means {card['name']}@{card['version'][:8]} now.")
