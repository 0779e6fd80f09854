"""Options of the HTTP server (those of the engine are `polymoe.config.EngineConfig`)."""

import ipaddress
import re
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, cast

import msgspec

from polymoe.config import read_path
from polymoe.errors import ConfigError
from polymoe.options import Option, check_options
from polymoe.server.logs import FORMATS, LEVELS
from polymoe.text.tools.choose import TOOL_PARSERS

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]*]+)(?::(\d{1,5}))?")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_LONGEST_KEY = 4096
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
    if key is not None and len(key.encode()) > _LONGEST_KEY:
        raise ConfigError(f"the API key has more than {_LONGEST_KEY} bytes, which not all clients can send.")


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


def _check_aliases(aliases: tuple[str, ...]) -> None:
    names = []
    for given in aliases:
        name, equals, variant = given.partition("=")
        if not (name and equals and variant):
            raise ConfigError(f"--alias {given[:200]} is not complete; write --alias NAME=VARIANT.")
        names.append(name)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--alias {twice[:200]} is given twice.")


def _check_root_path(path: str) -> None:
    if path and not _ROOT_PATH.fullmatch(path):
        raise ConfigError(f"--root-path {path[:200]!r} is not a path; write one like /llm, without a slash at its end.")


def _one_of(words: tuple[str, ...], option: str) -> Callable[[str], None]:
    def check(word: str) -> None:
        if word not in words:
            raise ConfigError(f"{option} {word[:200]!r} is none of {', '.join(words)}.")

    return check


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes are bytes, times are seconds. Raises `ConfigError` for a value out of range."""

    host: Annotated[str, Option("address to listen on; another than 127.0.0.1 needs a key")] = "127.0.0.1"
    port: Annotated[int, Option("0: any free one", at_least=0, at_most=65535, ranged=True)] = 8000
    # No flag: everybody on a machine sees what is typed.
    api_key: Annotated[str | None, Option("clients must send this key", flag=False, secret=True, check=_check_key)] = (
        None  # as a bearer token
    )
    api_key_file: Annotated[
        Path | None, Option("file with the key that clients must send; or set POLYMOE_API_KEY", read=read_path)
    ] = None
    keys: Annotated[
        Path | None, Option("file of keys with limits of their own: see `polymoe keys --help`", read=read_path)
    ] = None
    admin_key: Annotated[str | None, Option("of the administrator", flag=False, secret=True, check=_check_key)] = None
    admin_key_file: Annotated[
        Path | None, Option("file with the key of /v1/variants; or set POLYMOE_ADMIN_KEY", read=read_path)
    ] = None
    ssl_certfile: Annotated[Path | None, Option("certificates in PEM: the server speaks HTTPS", read=read_path)] = None
    ssl_keyfile: Annotated[Path | None, Option("their private key; default: in the same file", read=read_path)] = None
    open_metrics: Annotated[
        bool, Option("/metrics without a key, for scrapers and endpoint pickers that have none")
    ] = False
    variants_root: Annotated[
        Path | None, Option("folder that variants may be added from while others are served", read=read_path)
    ] = None
    plan_threads: Annotated[
        int | None, Option("CPU threads that plan what is added, beside the traffic; default torch's", at_least=1)
    ] = None
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
    aliases: Annotated[  # NAME=VARIANT
        tuple[str, ...],
        Option(
            "another name of a variant, for clients that ask for a fixed one; may be repeated", name="alias",
            metavar="NAME=VARIANT", check=_check_aliases,
        ),
    ] = ()  # fmt: skip
    root_path: Annotated[
        str, Option("path of the server behind a proxy, like /llm", metavar="PATH", check=_check_root_path)
    ] = ""
    log_format: Annotated[
        str, Option("of the log on stderr: human, or json", check=_one_of(FORMATS, "--log-format"))
    ] = "human"
    log_level: Annotated[str, Option("debug, info, warning or error", check=_one_of(LEVELS, "--log-level"))] = "info"
    log_requests: Annotated[bool, Option("a line for each request that has ended, without its text")] = False
    max_body_bytes: Annotated[int, Option("of a request", flag=False, at_least=1)] = 4 << 20
    max_body_bytes_together: Annotated[
        int, Option("of large requests that are arriving or being read", flag=False, at_least=1)
    ] = 64 << 20
    max_connections: Annotated[
        int, Option("connections at once; as many as open files are allowed, at most", flag=False, at_least=1)
    ] = 4096
    header_timeout: Annotated[
        float, Option("seconds for a new connection to send the head of a request", flag=False, more_than=0)
    ] = 15.0
    write_timeout: Annotated[
        float, Option("seconds after which a client that reads nothing is given up", flag=False, more_than=0)
    ] = 60.0
    keep_alive: Annotated[  # longer than clients keep them, so that they do not write into one that is being closed
        int, Option("seconds that a connection may idle between requests", flag=False, at_least=1)
    ] = 75
    body_timeout: Annotated[float, Option("seconds for a request to arrive completely", flag=False, more_than=0)] = 60.0
    heartbeat_timeout: Annotated[
        float, Option("seconds without progress after which /health reports a dead engine", flag=False, more_than=0)
    ] = 120.0
    restart_engine: Annotated[
        bool, Option("start the engine again when it has died or hangs, at most three times in ten minutes")
    ] = False
    grace: Annotated[
        float, Option("seconds to finish running requests after SIGTERM or SIGHUP", at_least=0, ranged=True)
    ] = 30.0

    def tool_parser_of(self, variant: str) -> str | None:
        """The format that the operator chose for a variant."""
        return dict(given.rsplit("=", 1) for given in self.tool_parsers).get(variant)

    def variant_of(self, name: str) -> str:
        """The variant that clients mean by a name."""
        return self.targets.get(name, name)

    @property
    def targets(self) -> dict[str, str]:
        """Alias -> variant."""
        return dict(cast(tuple[str, str], tuple(given.split("=", 1))) for given in self.aliases)

    def check_variants(self, names: Sequence[str]) -> None:
        """Raises `ConfigError` for a variant that is not served."""
        for given in self.tool_parsers:
            if (name := given.rpartition("=")[0]) not in names:
                raise ConfigError(
                    f"--tool-parser {given[:200]}: there is no variant {name[:200]}; there are {', '.join(names)}."
                )

        for alias, variant in self.targets.items():
            if variant not in names:
                raise ConfigError(
                    f"--alias {alias[:100]}={variant[:100]}: there is no variant {variant[:100]}; there are "
                    f"{', '.join(names)}."
                )
            if alias in names:
                raise ConfigError(f"--alias {alias[:100]}: this is the name of a variant itself.")

    def __post_init__(self) -> None:
        check_options(self)
        origins = tuple(check_origin(origin) for origin in self.allowed_origins)
        msgspec.structs.force_setattr(self, "allowed_origins", origins)
        for name in ("api_key", "admin_key"):
            msgspec.structs.force_setattr(self, name, _key_of(getattr(self, name), getattr(self, f"{name}_file"), name))
        if self.admin_key is not None and self.admin_key == self.api_key:
            raise ConfigError("the admin key is that of all clients; choose another.")
        if self.admin_key is not None and not self.needs_key:
            raise ConfigError("an admin key without a key for clients protects nothing; give --api-key-file or --keys.")
        if not self.needs_key and not _is_loopback(self.host):
            raise ConfigError(
                f"Listening on {self.host} without a key would let anybody in the network use this server; "
                "give one with --api-key-file, POLYMOE_API_KEY or --keys, or listen on 127.0.0.1."
            )
        self._check_tls()

    @property
    def needs_key(self) -> bool:
        return self.api_key is not None or self.keys is not None

    def _check_tls(self) -> None:
        if self.ssl_certfile is None:
            if self.ssl_keyfile is not None:
                raise ConfigError("--ssl-keyfile needs --ssl-certfile.")
            return
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self.ssl_certfile, self.ssl_keyfile, password=_no_password
            )
        except (OSError, ValueError) as error:  # SSLError is an OSError
            files = f"{self.ssl_certfile}" + ("" if self.ssl_keyfile is None else f" with {self.ssl_keyfile}")
            raise ConfigError(f"{files}: no certificate and private key in PEM can be read ({error}).") from error


def _no_password() -> str:
    """Instead of asking at the terminal."""
    raise ValueError("the private key is encrypted; store it without a password, readable by its owner only")


def _key_of(key: str | None, file: Path | None, name: str) -> str | None:
    """The key, of a file where one is named: all of it but a line break at its end."""
    if file is None:
        return key
    if key is not None:
        raise ConfigError(f"both {name} and {name}_file are given; give one.")
    try:
        found = file.read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the key cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    try:
        _check_key(found)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
