"""Options of the HTTP server (those of the engine are `polymoe.config.EngineConfig`)."""

import ipaddress
from dataclasses import dataclass

from polymoe.errors import ConfigError
from polymoe.server.cors import check_origin


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Sizes are bytes, times are seconds. Raises `ConfigError` for a value out of range."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str | None = None  # clients send it as a bearer token
    allowed_origins: tuple[str, ...] = ()  # web pages that may use the server from a browser; "*": all
    max_body_bytes: int = 4 << 20
    body_timeout: float = 60.0  # for a request to arrive completely
    heartbeat_timeout: float = 120.0  # without progress for this long, /health reports a dead engine
    grace: float = 30.0  # for running requests when the server is told to stop

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}.")
        if self.api_key == "":
            raise ConfigError("the API key is empty; leave it out or give one.")
        if self.api_key is not None and (self.api_key != self.api_key.strip() or not self.api_key.isprintable()):
            raise ConfigError(
                "the API key begins or ends with white space, or holds a control character (a line break?), which no "
                "client can send; remove it."
            )
        object.__setattr__(self, "allowed_origins", tuple(check_origin(origin) for origin in self.allowed_origins))
        if self.max_body_bytes < 1:
            raise ConfigError(f"max_body_bytes must be at least 1, got {self.max_body_bytes}.")
        for name in ("body_timeout", "heartbeat_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be more than 0 seconds, got {getattr(self, name)}.")
        if self.grace < 0:
            raise ConfigError(f"grace must not be negative, got {self.grace}.")
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
