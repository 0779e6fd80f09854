"""What is sent and when: closed-loop work, Poisson arrivals, recorded traces, random prompts. Pure, seeded."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from polymoe.errors import PolymoeError


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a workload: `at` seconds after the start, lengths in tokens."""

    at: float
    variant: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens in and out of every request, as `--lengths 20:25` says."""

    input_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.input_tokens}:{self.output_tokens}"

    def __post_init__(self) -> None:
        if self.input_tokens < 1 or self.output_tokens < 1:
            raise PolymoeError(f"lengths {self}: a request has at least one token in and one out.")


def saturating_arrivals(variants: Sequence[str], count: int, lengths: Lengths) -> list[Arrival]:
    """`count` requests in turn over the variants, all due now; a closed loop sends them as earlier ones end."""
    return [Arrival(0.0, variants[i % len(variants)], *_pair(lengths)) for i in range(count)]


def zipf_arrivals(variants: Sequence[str], count: int, lengths: Lengths, seed: int) -> list[Arrival]:
    """`count` requests, all due now, each of variant n (from 1) with a probability in proportion to 1/n."""
    weights = [1 / n for n in range(1, len(variants) + 1)]
    return [Arrival(0.0, v, *_pair(lengths)) for v in random.Random(seed).choices(variants, weights, k=count)]


def poisson_arrivals(
    rates: dict[str, float], duration: float, lengths: Lengths, seed: int, burst: dict[str, float] | None = None
) -> list[Arrival]:
    """Independent Poisson processes, one a variant, in order of time.

    Args:
        rates: requests a second of each variant.
        duration: seconds; no request arrives later.
        burst: factors on some variants' rates. The arrivals of the other variants stay exactly what they were.

    Raises: `PolymoeError` for a rate, factor or duration that is not positive.
    """
    if not duration > 0:
        raise PolymoeError(f"--duration must be positive, got {duration:g}.")
    found = []
    for variant, rate in rates.items():
        factor = (burst or {}).get(variant, 1.0)
        for name, value in (("rate", rate), ("flood factor", factor)):
            if not 0 < value < float("inf"):
                raise PolymoeError(f"the {name} of {variant} must be a positive number, got {value:g}.")
        generator = random.Random(f"{seed}/{variant}")
        at = generator.expovariate(rate * factor)
        while at < duration:
            found.append(Arrival(at, variant, *_pair(lengths)))
            at += generator.expovariate(rate * factor)
    return sorted(found, key=lambda arrival: arrival.at)


class _TraceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    at: float
    variant: str
    input_tokens: int
    output_tokens: int


def read_trace(path: Path, variants: Sequence[str]) -> list[Arrival]:
    """Arrivals from JSON lines `{"at": seconds, "variant": …, "input_tokens": …, "output_tokens": …}`, by time.

    Raises `PolymoeError`, naming the line, for one that cannot be used, and for a trace without any.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PolymoeError(f"the trace {path} cannot be read: {error}") from error
    arrivals = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=_TraceLine)
        except msgspec.MsgspecError as error:
            raise PolymoeError(f"{path}, line {number}: {error}.") from error
        if not 0 <= line.at < float("inf"):
            raise PolymoeError(f"{path}, line {number}: `at` must be seconds from the start, got {line.at:g}.")
        if line.input_tokens < 1 or line.output_tokens < 1:
            raise PolymoeError(f"{path}, line {number}: a request has at least one token in and one out.")
        if line.variant not in variants:
            raise PolymoeError(
                f"{path}, line {number}: there is no variant {line.variant!r}, only {', '.join(variants)}."
            )
        arrivals.append(Arrival(line.at, line.variant, line.input_tokens, line.output_tokens))
    if not arrivals:
        raise PolymoeError(f"the trace {path} is empty.")
    return sorted(arrivals, key=lambda arrival: arrival.at)


def random_prompts(arrivals: Sequence[Arrival], vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids for each arrival. Another seed gives other prompts, so that no prefix cache helps a repeat."""
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(arrival.input_tokens)] for arrival in arrivals]


def check_context(arrivals: Sequence[Arrival], context: int) -> None:
    """Raises `PolymoeError` for a request that is longer than the variants' context, in tokens."""
    for arrival in arrivals:
        if arrival.input_tokens + arrival.output_tokens > context:
            raise PolymoeError(
                f"{arrival.input_tokens} tokens in and {arrival.output_tokens} out are more than the context of "
                f"{context} tokens."
            )


def _pair(lengths: Lengths) -> tuple[int, int]:
    return lengths.input_tokens, lengths.output_tokens
