"""Options of the engine and the units they are given in."""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec

from polymoe.errors import ConfigError
from polymoe.options import Option, check_options

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


def _size(given: Any, _where: str) -> Any:
    """`4GiB` -> bytes; a number (of a file) is bytes."""
    return parse_bytes(given) if isinstance(given, str) else given


def _size_or(word: str) -> Callable[[Any, str], Any]:
    """A size, or None for `word`."""
    return lambda given, where: None if given == word else _size(given, where)


def _numbers(meaning: str) -> Callable[[Any, str], Any]:
    """Reads `["math=2"]`; a table (of a file) is what it says."""

    def read(given: Any, where: str) -> Any:
        is_texts = isinstance(given, list) and all(isinstance(item, str) for item in given)
        return parse_numbers(given, where, meaning) if is_texts else given

    return read


def read_path(given: Any, where: str) -> Path:
    if not isinstance(given, str | Path):
        raise ConfigError(f"{where} must be a path, got {given!r}.")
    return Path(given)


def _check_weights(weights: Mapping[str, float]) -> None:
    for variant, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ConfigError(f"the weight of {variant} must be more than 0, got {weight:g}; 1 is an equal share.")


def _check_classes(slo: Mapping[str, float]) -> None:
    for name, seconds in slo.items():
        if _CLASS_NAME.fullmatch(name) is None:
            raise ConfigError(f"{name[:64]!r} is no name of an SLO class; use letters, digits, '.', '_' and '-'.")
        if not 0 < seconds < math.inf:
            raise ConfigError(f"SLO class {name} must be more than 0 seconds, got {seconds:g}.")


class PlanConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is served: a bundle, or checkpoints and how they become one."""

    sources: Annotated[
        tuple[str, ...], Option("a bundle, or checkpoints to plan now, each as NAME=PATH", flag=False)
    ] = ()
    policy: Annotated[
        str,
        Option(
            "auto: sharing and formats chosen position by position; paper, separate, mean, regmean, delta, "
            "exact-delta, cluster: one way everywhere"
        ),
    ] = "auto"
    memory: Annotated[
        str | None,
        Option(
            "1.0x: expert bytes in multiples of one model's; 1.0x-all: all weights, in multiples of one whole model; "
            "24GiB (or 24G): all weights on the device. K, M, G, T are powers of 1024, KB, MB, GB, TB of 1000"
        ),
    ] = None
    cache: Annotated[
        Path | None,
        Option("where bundles planned on the fly are kept; default ~/.cache/polymoe", variable=True, read=read_path),
    ] = None


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine serves one bundle.

    Sizes are bytes, lengths are tokens. Raises `ConfigError` for a value out of range.
    """

    bundle: str
    device: Annotated[str, Option("auto, cpu, cuda or cuda:N")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Option("auto (as stored), float32, bfloat16 or float16")
    ] = "auto"
    activations: Annotated[
        Literal["auto", "int8", "mixed", "int16"],
        Option("bits of activations that meet packed experts on a CPU: int8, mixed (8, then 16) or int16; auto: what "
               "costs little beside the plan"),
    ] = "auto"  # fmt: skip
    slots: Annotated[
        int | None, Option("variants whose non-experts are on the device at once; default all", at_least=1)
    ] = None
    max_variants_per_step: Annotated[
        int | None, Option("default: as many as there are slots; 1: no mixing in a batch", flag=False, at_least=1)
    ] = None
    prefetch: Annotated[
        bool,
        Option("with fewer slots than variants: one staging row more, for the variant that runs next", flag=False),
    ] = True
    async_scheduling: Annotated[
        bool | None,
        Option("launch a step before the last one's tokens are read; default: with CUDA graphs", flag=False),
    ] = None
    block_size: Annotated[int, Option("tokens in a block of keys and values", flag=False, at_least=1)] = 16
    num_kv_blocks: Annotated[int | None, Option("default: from kv_cache", flag=False, at_least=1)] = None
    kv_cache_bytes: Annotated[
        int | None,
        Option(
            "memory for keys and values, for example 4GiB; auto: what remains of a GPU, 1GiB on a CPU",
            name="kv_cache", shown="auto", at_least=0, read=_size_or("auto"),
        ),
    ] = None  # fmt: skip
    expert_cache_bytes: Annotated[  # 0: drop after use
        int,
        Option(
            "memory for absent experts that were fetched", name="expert_cache", shown="256MiB", at_least=0, read=_size
        ),
    ] = 256 << 20
    max_model_len: Annotated[
        int | None, Option("longest sequence in tokens; default: what the variants support", at_least=1)
    ] = None
    max_num_seqs: Annotated[int, Option("sequences that run at once", at_least=1)] = 64
    max_num_batched_tokens: Annotated[int, Option("tokens in one step", at_least=1)] = 2048
    enable_prefix_caching: Annotated[bool, Option("keep keys and values of prompts that begin alike", flag=False)] = (
        True
    )
    max_waiting: Annotated[int, Option("requests waiting beyond this are refused with 429", at_least=1)] = 1024
    weights: Annotated[
        dict[str, float],
        Option(
            "share of a variant when all are busy; default 1 each; may be repeated", name="weight",
            metavar="NAME=WEIGHT", read=_numbers("WEIGHT"), check=_check_weights,
        ),
    ] = {}  # fmt: skip
    slo: Annotated[  # "default": of requests that name none
        dict[str, float],
        Option(
            "class of requests and its time to first token; may be repeated", metavar="NAME=SECONDS",
            read=_numbers("SECONDS"), check=_check_classes,
        ),
    ] = {}  # fmt: skip
    admission_factor: Annotated[
        float | None,
        Option(
            "refuse what would take this many times its SLO class; 0: refuse nothing for that", more_than=0,
            read=lambda given, _where: given if given != 0 or given is False else None,
        ),
    ] = 1.5  # fmt: skip
    target_itl: Annotated[
        float | None,
        Option("seconds: prompts are cut smaller so that no token takes longer; default no limit", more_than=0),
    ] = None
    num_threads: Annotated[  # one for a very small model
        int | None, Option("CPU threads; default torch's", name="threads", at_least=1)
    ] = None
    max_variants: Annotated[
        int | None,
        Option("versions held at once where variants come and go (docs/variants.md); default: they stay", at_least=1),
    ] = None
    headroom: Annotated[
        int | None,
        Option(
            "memory for variants that are added, like 4GiB; free: what the machine has free then (not on a GPU)",
            shown="free", at_least=0, read=_size_or("free"),
        ),
    ] = None  # fmt: skip
    verify: Annotated[bool, Option("first compare all weights with their hashes, as `polymoe verify` does")] = False
    seed: Annotated[int, Option("of requests that name none", flag=False)] = 0

    def __post_init__(self) -> None:
        if not isinstance(self.bundle, str):
            raise ConfigError(f"bundle must be a text, got {self.bundle!r}.")
        check_options(self)

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
