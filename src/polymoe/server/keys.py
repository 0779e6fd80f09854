"""API keys in a file: who they belong to and what they may do. The keys themselves are not in it, only their hashes.

A key is 256 random bits, so a plain SHA-256 cannot be turned back by guessing.
"""

import hashlib
import math
import os
import re
import secrets
import time
from pathlib import Path

import msgspec

from polymoe.errors import ConfigError

_PREFIX = "pm-"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")


class Key(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One key; its name is that of a tenant. None: no limit. Raises `ConfigError` for what cannot be."""

    name: str
    sha256: str  # of the key, in hexadecimal
    created: int = 0  # seconds since 1970
    variants: tuple[str, ...] | None = None  # those that it may use
    weight: float = 1.0  # of its share of a variant's tokens, beside other keys
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers
    concurrency: int | None = None  # requests at once

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise ConfigError(f"{self.name[:64]!r} is no name of a key; use letters, digits, '.', '_' and '-'.")
        if _HASH.fullmatch(self.sha256) is None:
            raise ConfigError(f"sha256 of key {self.name} must be 64 hexadecimal digits.")
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"the weight of key {self.name} must be more than 0, got {self.weight:g}.")
        for field in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ConfigError(f"{field} of key {self.name} must be at least 1, got {value}.")


class KeyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    keys: list[Key] = []


def digest(key: str | bytes) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """Raises `ConfigError` where it cannot be read or two keys have one name."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=KeyFile)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; make the file with `polymoe keys add NAME --file {path}`."
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a file of keys: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if found.version != 1:
        raise ConfigError(f"{path} has version {found.version}; this polymoe reads version 1.")
    names = [key.name for key in found.keys]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path} has two keys of one name.")
    return found.keys


def add_key(path: Path, key: Key) -> str:
    """Make a new key with the properties of `key`, whose hash does not matter. Returns it; nobody can read it again.
    Raises `ConfigError` for a name that is taken."""
    keys = read_keys(path) if path.exists() else []
    if any(other.name == key.name for other in keys):
        raise ConfigError(f"{path} has a key {key.name}; revoke it first, or choose another name.")
    secret = _PREFIX + secrets.token_urlsafe(32)
    _write(path, [*keys, msgspec.structs.replace(key, sha256=digest(secret), created=int(time.time()))])
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Raises `ConfigError` for a name that does not exist."""
    keys = read_keys(path)
    kept = [key for key in keys if key.name != name]
    if len(kept) == len(keys):
        raise ConfigError(f"{path} has no key {name}; it has {', '.join(key.name for key in keys) or 'none'}.")
    _write(path, kept)


def _write(path: Path, keys: list[Key]) -> None:
    """Whole or not at all, and for the owner only."""
    text = msgspec.json.format(msgspec.json.encode(KeyFile(keys=keys)), indent=2) + b"\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
