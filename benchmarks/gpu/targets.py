"""What was to be reached beside what was measured: every row of the table has a figure, or says that it has none."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One target. `value` None: its part did not get that far. `at_most`: smaller is better."""

    name: str
    target: float
    value: float | None
    at_most: bool = False
    ceiling: str = ""  # what bounds it, in words and figures

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def rows(parts: Mapping[str, Any]) -> list[Row]:
    """From the parts' figures."""

    def get(*path: str) -> Any:
        value: Any = parts
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    found = []
    for part in ("mixtral_two", "mixtral_four", "qwen3_shared", "qwen3_delta"):
        for batch in ("decode_1", "decode_64"):
            found.append(Row(f"{part} {batch}: share of the bandwidth ceiling", 0.70, get(part, batch, "share"),
                             ceiling=_decode_ceiling(get(part, batch))))  # fmt: skip
    mixed, single, delta = (
        get("qwen3_shared", "decode_64"), get("qwen3_shared", "decode_64_single"), get("qwen3_delta", "decode_64")
    )  # fmt: skip
    found.append(Row("qwen3: mixed over 4 variants / single, saturated", 0.95,
                     get("qwen3_shared", "mixed_over_single"), ceiling=_byte_ratio(single, mixed)))  # fmt: skip
    found.append(Row("reconfiguration: share of the bus's bandwidth", 0.85,
                     get("mixtral_switch", "reconfiguration", "share"),
                     ceiling=_rate(get("mixtral_switch", "limits", "bus_bytes_per_s"))))  # fmt: skip
    added, beyond = (get("mixtral_switch", "ttft", name) for name in ("added", "transfer_beyond_compute"))
    # Where compute could hide all of the transfer, what is added is held against a tenth of the transfer.
    transfer = get("mixtral_switch", "ttft", "transfer")
    least = None if added is None else max(beyond, 0.1 * transfer)
    found.append(Row("TTFT added by a switch / transfer that compute cannot hide", 1.2,
                     None if added is None else max(added, 0.0) / least, at_most=True))  # fmt: skip
    for name, target in (("turnaround_s", 0.4), ("ttft_s", 0.1)):
        rates = get("scenario", "systems", "mixed") or {}
        figures = next(iter(rates.values()), None)  # the lowest rate, the paper's
        value = figures[name]["mean"] if isinstance(figures, Mapping) else None
        found.append(Row(f"the paper's scenario, mixed: mean {name}", target, value, at_most=True))
    for part, count in (("mixtral_two", 2), ("mixtral_four", 4)):
        absent = get(part, "experts_absent")
        served = None if get(part, "decode_64", "tokens_per_s") is None else float(absent == 0)
        found.append(Row(f"{count} Mixtral variants resident and served mixed (1: yes)", 1.0, served))
    found.append(Row("qwen3, batch 64: int4 + 2-bit deltas of 4 variants / one bf16 model", 1.0,
                     delta["tokens_per_s"] / single["tokens_per_s"] if delta and single else None,
                     ceiling=_byte_ratio(single, delta)))  # fmt: skip
    for part in ("qwen3_shared", "mixtral_two", "mixtral_four", "qwen3_delta"):
        tokens = get(part, "prefill", "tokens") or 4096
        name = f"{part} prefill of {tokens} tokens: share of the matmul rate"
        ceiling = _flops(get(part, "limits", "matmul_flops"))
        found.append(Row(name, 0.45, get(part, "prefill", "share"), ceiling=ceiling))
    return found


def table(found: list[Row]) -> str:
    """Markdown."""
    lines = ["| | target | measured | met | ceiling |", "|---|--:|--:|---|---|"]
    for row in found:
        sign = "≤" if row.at_most else "≥"
        value = "no figure" if row.value is None else f"{row.value:.3g}"
        met = {None: "–", True: "yes", False: "no"}[row.met]
        lines.append(f"| {row.name} | {sign} {row.target:g} | {value} | {met} | {row.ceiling} |")
    return "\n".join(lines)


def _decode_ceiling(figures: Mapping[str, Any] | None) -> str:
    if not figures:
        return ""
    return (
        f"{figures['bytes'] / 1e9:.1f} GB, {1e3 * figures['ceiling_seconds']:.2f} ms of {1e3 * figures['seconds']:.2f}"
    )


def _byte_ratio(less: Mapping[str, Any] | None, more: Mapping[str, Any] | None) -> str:
    return f"{less['bytes'] / more['bytes']:.2f} by bytes" if less and more else ""


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f} GB/s"


def _flops(value: float | None) -> str:
    return "" if value is None else f"{value / 1e12:.0f} TFLOP/s"
