"""Options of the HTTP server (those of the engine are `polymoe.config.EngineConfig`)."""

import ipaddress
import re
from collections.abc import Sequence
from typing import Annotated

import msgspec

from polymoe.errors import ConfigError
from polymoe.options import Option, check_options
from polymoe.text.tools.choose import TOOL_PARSERS

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]*]+)(?::(\d{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def check_origin(origin: str) -> str:
    """An origin as browsers send it (lower case, without the scheme's own port), or `*`. Raises `ConfigError`."""
    if origin == "*":
        return origin
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        raise ConfigError(
            f"{origin[:200]!r} is not an origin; write --allowed-origin https://app.example.org or "
            "http://localhost:3000, without a path, or * for every web page."
        )
    scheme, host, port = match.groups()
    return f"{scheme}://{host}" if port in (None, _DEFAULT_PORTS.get(scheme)) else f"{scheme}://{host}:{port}"


def _check_key(key: str | None) -> None:
    if key == "":
        raise ConfigError("the API key is empty; leave it out or give one.")
    if key is not None and (key != key.strip() or not key.isprintable()):
        raise ConfigError(
            "the API key begins or ends with white space, or holds a control character (a line break?), which no "
            "client can send; remove it."
        )


def _check_origins(origins: tuple[str, ...]) -> None:
    for origin in origins:
        check_origin(origin)


def _check_parsers(parsers: tuple[str, ...]) -> None:
    for given in parsers:
        name, equals, parser = given.rpartition("=")
        if not (name and equals and parser in TOOL_PARSERS):
            raise ConfigError(
                f"--tool-parser {given[:200]} names no format; write NAME=FORMAT with the name of a variant and one of "
                f"{', '.join(TOOL_PARSERS)}."
            )


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes are bytes, times are seconds. Raises `ConfigError` for a value out of range."""

    host: Annotated[str, Option("address to listen on; another than 127.0.0.1 needs --api-key")] = "127.0.0.1"
    port: Annotated[int, Option("0: any free one", at_least=0, at_most=65535, ranged=True)] = 8000
    api_key: Annotated[
        str | None, Option("clients must send this key", variable=True, secret=True, check=_check_key)
    ] = None  # as a bearer token
    allowed_origins: Annotated[  # "*": all
        tuple[str, ...],
        Option(
            "whose web pages may use the server, like http://localhost:3000; may be repeated", name="allowed_origin",
            metavar="ORIGIN", check=_check_origins,
        ),
    ] = ()  # fmt: skip
    tool_parsers: Annotated[  # NAME=FORMAT
        tuple[str, ...],
        Option(
            "the format of a variant's tool calls, where its chat template does not tell; may be repeated: "
            + ", ".join(TOOL_PARSERS),
            name="tool_parser", metavar="NAME=FORMAT", check=_check_parsers,
        ),
    ] = ()  # fmt: skip
    log_prompts: Annotated[bool, Option("keep the text of the last requests' prompts for the dashboard's list")] = False
    max_body_bytes: Annotated[int, Option("of a request", flag=False, at_least=1)] = 4 << 20
    body_timeout: Annotated[float, Option("seconds for a request to arrive completely", flag=False, more_than=0)] = 60.0
    heartbeat_timeout: Annotated[
        float, Option("seconds without progress after which /health reports a dead engine", flag=False, more_than=0)
    ] = 120.0
    grace: Annotated[
        float, Option("seconds to finish running requests after SIGTERM or SIGHUP", at_least=0, ranged=True)
    ] = 30.0

    def tool_parser_of(self, variant: str) -> str | None:
        """The format that the operator chose for a variant."""
        return dict(given.rsplit("=", 1) for given in self.tool_parsers).get(variant)

    def check_variants(self, names: Sequence[str]) -> None:
        """Raises `ConfigError` for a variant that is not served."""
        for given in self.tool_parsers:
            if (name := given.rpartition("=")[0]) not in names:
                raise ConfigError(
                    f"--tool-parser {given[:200]}: there is no variant {name[:200]}; there are {', '.join(names)}."
                )

    def __post_init__(self) -> None:
        check_options(self)
        origins = tuple(check_origin(origin) for origin in self.allowed_origins)
        msgspec.structs.force_setattr(self, "allowed_origins", origins)
        if self.api_key is None and not _is_loopback(self.host):
            raise ConfigError(
                f"Listening on {self.host} without a key would let anybody in the network use this server; "
                "give one with --api-key, or listen on 127.0.0.1."
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
