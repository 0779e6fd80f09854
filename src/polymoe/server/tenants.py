"""Whose request it is, and whether they may make it now: the keys of a server while it runs."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from starlette.types import Scope

from polymoe.errors import ConfigError, OverloadedError, UnknownVariantError
from polymoe.protocol.request import QoS
from polymoe.server.keys import Key, digest, read_keys

logger = logging.getLogger(__name__)
_LOOK_EVERY = 1.0  # seconds between looks at the file
_SCOPE = "polymoe.tenant"
_MINUTE = 60.0


class Bucket:
    """A rate: `level` grows by `per_minute` a minute, up to that. What is taken may make a debt, which delays what
    comes next; so nothing is ever too large to be let in at all."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level, self._at = float(per_minute), now

    def wait(self, now: float, least: float) -> float:
        """Seconds until `least` is there; 0: it is."""
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / _MINUTE)
        self._at = now
        return max(0.0, (least - self._level) * _MINUTE / self.per_minute)

    def take(self, amount: int) -> None:
        self._level -= amount


class Used(NamedTuple):
    """What a key has used."""

    requests: int = 0
    tokens: int = 0

    def plus(self, requests: int, tokens: int) -> Used:
        return Used(self.requests + requests, self.tokens + tokens)


class Tenant:
    """One key's requests. Without a key, or with the server's only one, a request has none of this."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.key, self.running = key, 0
        self.used = Used()  # since the start
        self.running_elsewhere = 0  # at other servers that share this key's limits
        self._clock, now = clock, clock()
        self._requests = None if key.requests_per_minute is None else Bucket(key.requests_per_minute, now)
        self._tokens = None if key.tokens_per_minute is None else Bucket(key.tokens_per_minute, now)

    def allows(self, variant: str) -> bool:
        return self.key.variants is None or variant in self.key.variants

    def require(self, variant: str) -> None:
        """Raises `UnknownVariantError`: what a key may not use does not exist for it."""
        if not self.allows(variant):
            raise UnknownVariantError(variant, list(self.key.variants or ()))

    def begin(self, num_prompt_tokens: int) -> None:
        """A request begins; `end` must follow. Raises `OverloadedError` beyond a limit."""
        key, now = self.key, self._clock()
        running = self.running + self.running_elsewhere
        if key.concurrency is not None and running >= key.concurrency:
            raise OverloadedError(f"This key has {running} requests running, as many as it may.", 1.0)
        for bucket, least, what in ((self._requests, 1.0, "requests"), (self._tokens, 0.0, "tokens")):
            if bucket is not None and (wait := bucket.wait(now, least)) > 0:
                raise OverloadedError(f"This key has used its {bucket.per_minute} {what} a minute.", wait)
        if self._requests is not None:
            self._requests.take(1)
        self.used = self.used.plus(1, 0)
        self.charge(num_prompt_tokens)
        self.running += 1

    def charge(self, tokens: int) -> None:
        self.used = self.used.plus(0, tokens)
        if self._tokens is not None:
            self._tokens.take(tokens)

    def charge_elsewhere(self, used: Used, running: int) -> None:
        """What the key has used at other servers since they last said so; what makes a debt here delays it here."""
        self.running_elsewhere = running
        if self._requests is not None:
            self._requests.take(used.requests)
        if self._tokens is not None:
            self._tokens.take(used.tokens)

    def end(self) -> None:
        self.running -= 1

    def qos(self, qos: QoS) -> QoS:
        """The key is the tenant, whatever the client says: nobody gets more by taking many names."""
        return QoS(
            tenant=f"key:{self.key.name}", weight=self.key.weight, priority=qos.priority, slo_class=qos.slo_class
        )

    def salt(self, salt: str) -> str:
        """Of the prefix cache: what was computed for one key is never found with another."""
        return f"{len(self.key.name)}:{self.key.name}{salt}"


class Keyring:
    """The keys of a server: its own one, and those of a file, which is read again when it changes.

    Raises `ConfigError` for a file that cannot be read at the start; later it goes on with what it knew.
    """

    def __init__(self, api_key: str | None, path: Path | None) -> None:
        self._api_key = None if api_key is None else api_key.encode()
        self._path = path
        self._tenants: dict[str, Tenant] = {}  # by the hash of the key
        self._looked = time.monotonic()
        self._version = None if path is None else _version(path)
        self._take([] if path is None else read_keys(path))

    @property
    def is_needed(self) -> bool:
        return self._api_key is not None or self._path is not None

    @property
    def tenants(self) -> dict[str, Tenant]:
        """By the hash of their key."""
        return self._tenants

    def admits(self, scope: Scope, key: bytes) -> bool:
        """Whether this key may enter; notes in `scope` whose it is."""
        if self._api_key is not None and hmac.compare_digest(key, self._api_key):
            return True
        if self._path is not None:
            self._look()
            tenant = self._tenants.get(digest(key))
            if tenant is not None:
                scope[_SCOPE] = tenant
                return True
        return False

    def _look(self) -> None:
        assert self._path is not None
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._take(read_keys(self._path))
        except ConfigError as error:
            logger.error("The keys stay as they were: %s", error)

    def _take(self, keys: Sequence[Key]) -> None:
        """Keys that have not changed keep what they have used."""
        before = {tenant.key: tenant for tenant in self._tenants.values()}
        self._tenants = {key.sha256: before.get(key) or Tenant(key) for key in keys}


def tenant_of(scope: Scope) -> Tenant | None:
    tenant: Tenant | None = scope.get(_SCOPE)
    return tenant


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
