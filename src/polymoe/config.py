"""Options of the engine and the units they are given in."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from polymoe.errors import ConfigError
from polymoe.field_types import wrong_field

DEFAULT_KV_BYTES = 1 << 30  # of the KV cache where nothing is said and it does not fill a device

_CLASS_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# A letter alone is a power of 1024, as for docker, systemd and Java; only an explicit KB, MB, GB, TB is decimal.
_UNITS = {"": 1, "B": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("I", 1024), ("IB", 1024), ("B", 1000))
}
_MOST_BYTES = 1 << 62


def parse_bytes(text: str) -> int:
    """`24GiB`, `24G`, `1.5GB`, `4096` -> bytes; the case does not matter. K, M, G and T, with or without iB, are powers
    of 1024, KB, MB, GB and TB powers of 1000.

    Raises `ConfigError` for anything else, and for a fraction of a byte.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write for example 24GiB, 24G (the same), 500MB or 4096 (bytes).")
    count = float(match[1]) * _UNITS[match[2].upper()]
    if count > _MOST_BYTES:
        raise ConfigError(f"{text[:40]!r} is more than any machine has; write for example 24GiB.")
    if match[2].upper() in ("", "B") and count != int(count):
        raise ConfigError(f"{text!r} has no unit, and there are no fractions of a byte; write for example {text}GiB.")
    return int(count)


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def parse_numbers(values: Sequence[str], option: str, meaning: str) -> dict[str, float]:
    """`["math=2", "code=0.5"]` -> `{"math": 2.0, "code": 0.5}`. Raises `ConfigError` for anything else.

    Args:
        option: as typed, for the message; `meaning`: of its number.
    """
    found: dict[str, float] = {}
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            parsed = float(number)
        except ValueError:
            parsed = math.nan
        if not name or math.isnan(parsed):
            raise ConfigError(f"{option} {value!r}: write NAME={meaning}, for example {option} a=2.")
        if name in found:
            raise ConfigError(f"{option} names {name} twice; give it once.")
        found[name] = parsed
    return found


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine serves one bundle.

    Sizes are bytes, lengths are tokens. Raises `ConfigError` for a value out of range.
    """

    bundle: str
    verify: bool = False  # compare every file of the bundle with its hash before it is served
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "cuda:N"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the bundle stores it
    # Bits of activations that meet packed experts on a CPU: 8, 8 and 16, or 16; auto: what costs little beside the plan
    activations: Literal["auto", "int8", "mixed", "int16"] = "auto"
    slots: int | None = None  # None: one a variant, so no switch ever happens
    max_variants_per_step: int | None = None  # None: as many as there are slots; 1: no mixing in a batch
    prefetch: bool = True  # with fewer slots than variants: one staging row more, for the variant that runs next
    async_scheduling: bool | None = None  # launch a step before the last one's tokens are read; None: with CUDA graphs
    block_size: int = 16
    num_kv_blocks: int | None = None  # None: from kv_cache_bytes
    kv_cache_bytes: int | None = None  # None: what remains of a GPU; DEFAULT_KV_BYTES on a CPU
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None  # None: what the variants were configured for
    enable_prefix_caching: bool = True
    expert_cache_bytes: int = 256 << 20  # room for absent experts that were fetched; 0: drop after use
    max_waiting: int = 1024  # requests waiting beyond this are refused with 429
    weights: dict[str, float] = {}  # variant -> its share of the tokens when all want some; 1 where nothing is said
    slo: dict[str, float] = {}  # class of requests -> seconds to the first token; "default": those that name none
    admission_factor: float | None = 1.5  # refuse what would take this many times its class; None: never
    target_itl: float | None = None  # seconds; prompts are cut smaller so that no sequence waits longer for a token
    num_threads: int | None = None  # CPU threads for torch; None: torch's default, one for a very small model
    seed: int = 0

    def __post_init__(self) -> None:
        if (wrong := wrong_field(self)) is not None:
            raise ConfigError(f"{wrong[0]} must be {wrong[1]}.")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("slots", "max_variants_per_step", "num_kv_blocks", "max_model_len", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        for name in ("kv_cache_bytes", "expert_cache_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        for variant, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"the weight of {variant} must be more than 0, got {weight:g}; 1 is an equal share.")
        for name, seconds in self.slo.items():
            if _CLASS_NAME.fullmatch(name) is None:
                raise ConfigError(f"{name[:64]!r} is no name of an SLO class; use letters, digits, '.', '_' and '-'.")
            if not 0 < seconds < math.inf:
                raise ConfigError(f"SLO class {name} must be more than 0 seconds, got {seconds:g}.")
        for name in ("admission_factor", "target_itl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be more than 0, got {value:g}; leave it out to switch it off.")

    @property
    def cache_bytes(self) -> int:
        """What a device holds beside the weights: keys and values, and experts that were fetched."""
        return (DEFAULT_KV_BYTES if self.kv_cache_bytes is None else self.kv_cache_bytes) + self.expert_cache_bytes

    @classmethod
    def of(cls, bundle: str | Path, options: Mapping[str, Any]) -> Self:
        """From `options` by name. Raises `ConfigError` for one that does not exist; it names one that is like it."""
        for name in options:
            if name not in cls.__struct_fields__ or name == "bundle":
                near = difflib.get_close_matches(name, cls.__struct_fields__, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(cls.__struct_fields__[1:])}."
                raise ConfigError(f"there is no option {name!r}; {hint}")
        return cls(bundle=str(bundle), **options)

    def weights_of(self, variants: Sequence[str]) -> list[float]:
        """One weight for each of `variants`. Raises `ConfigError` if weights are given to others."""
        unknown = [name for name in self.weights if name not in variants]
        if unknown:
            raise ConfigError(
                f"a weight is given to {', '.join(unknown)}, which is not served; the variants are "
                f"{', '.join(variants)}."
            )
        return [self.weights.get(name, 1.0) for name in variants]
