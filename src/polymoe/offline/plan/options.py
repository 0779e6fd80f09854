"""What a user may ask of a policy beside its budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from polymoe.errors import PlanError, PolymoeError
from polymoe.options import Option

POLICIES = {
    "auto": "the best use of every byte, chosen position by position",
    "paper": "round-robin owners",
    "separate": "lossless, every variant its own",
    "mean": "one merged expert a position",
    "regmean": "merged by what the experts see",
    "delta": "merged, with a small correction for each variant",
    "exact-delta": "lossless, changed values only",
    "cluster": "merged in groups of variants",
}
_DEFAULT_BITS = 2


def pairs(values: Sequence[str], option: str) -> dict[str, Path]:
    """`VARIANT=FILE` options -> a dict, each once, each an existing path."""
    found: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise PolymoeError(f"{option} {value!r}: write VARIANT=PATH.")
        if name in found:
            raise PolymoeError(f"{option} names {name} twice.")
        if not Path(path).exists():
            raise PolymoeError(f"{option} {name}: {path} does not exist.")
        found[name] = Path(path)
    return found


def file_lists(values: Sequence[str], option: str) -> dict[str, list[Path]]:
    """`VARIANT=FILE` options -> variant -> its files, in order; each an existing path."""
    found: dict[str, list[Path]] = {}
    for value in values:
        for name, path in pairs([value], option).items():
            found.setdefault(name, []).append(path)
    return found


class PlanOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `polymoe plan`; None is the policy's default.

    caution: `min_top1` is to hold for so many times the predicted error.
    accept_unrelated: merge variants that plainly have another ancestor all the same.
    """

    base: Annotated[str, Option("format of the shared experts: stored, fp8, int8, int6, int5, int4 or int3")] = "stored"
    delta_bits: Annotated[int | None, Option("policy delta: bits of each variant's correction, 1 to 4; default 2")] = (
        None
    )
    clusters: Annotated[int | None, Option("policy cluster: groups of variants a position; default 2")] = None
    min_top1: Annotated[float | None, Option("policy auto: fewest bytes at which each variant agrees this often")] = (
        None
    )
    caution: float = 1.0
    host_share: Annotated[
        float | None,
        Option("policy auto: share of what is routed that may be fetched from the host tier; default 0"),
    ] = None
    calibrate: Annotated[
        Mapping[str, Sequence[Path]],
        Option(
            "text to fit merges and formats to: plain, or .jsonl of {text} or {messages} (encoder–decoder: of {input, "
            "target}); of a large file pieces spread over it are read; may be repeated, for a variant too",
            metavar="VARIANT=FILE", read=file_lists,
        ),
    ] = {}  # fmt: skip
    distill: Annotated[
        int | None,
        Option("then fit delta scales, norms and routers to the originals on the text", metavar="STEPS"),
    ] = None
    accept_unrelated: bool = False

    @property
    def bits(self) -> int:
        return self.delta_bits or _DEFAULT_BITS

    def check(self, policy: str) -> None:
        """Raise `PlanError` for an unknown policy, a value out of range, or an option that the policy does not have."""
        # Here: it loads torch, and the command line reads this file.
        from polymoe.quant.formats import BASE_FORMATS, STORED

        if policy not in POLICIES:
            names = list(POLICIES)
            raise PlanError(f"unknown policy {policy!r}; there are {', '.join(names[:-1])} and {names[-1]}.")
        bases = [fmt.name for fmt in BASE_FORMATS]
        if self.base not in bases:
            raise PlanError(f"--base {self.base} is unknown; use {', '.join(bases)}.")
        if self.base != STORED.name and policy in ("auto", "exact-delta"):
            why = "chooses the formats itself" if policy == "auto" else "needs bases as they are stored"
            raise PlanError(f"--policy {policy} {why}; leave --base out.")
        for value, option, owner in (
            (self.delta_bits, "--delta-bits", "delta"),
            (self.clusters, "--clusters", "cluster"),
            (self.min_top1, "--min-top1", "auto"),
            (self.host_share, "--host-share", "auto"),
        ):
            if value is not None and policy != owner:
                raise PlanError(f"{option} belongs to --policy {owner}, not to {policy}.")
        if self.distill is not None and not self.calibrate:
            raise PlanError("--distill learns from text; give it with --calibrate VARIANT=FILE.")
        if self.distill is not None and self.distill < 1:
            raise PlanError(f"--distill takes a number of steps, at least 1; got {self.distill}.")
        if self.delta_bits is not None and not 1 <= self.delta_bits <= 4:
            raise PlanError(f"--delta-bits must be 1, 2, 3 or 4, got {self.delta_bits}.")
        if self.clusters is not None and self.clusters < 1:
            raise PlanError(f"--clusters must be at least 1, got {self.clusters}.")
        if self.min_top1 is not None and not 0 < self.min_top1 <= 1:
            raise PlanError(f"--min-top1 is a share of tokens, above 0 and up to 1; got {self.min_top1:g}.")
        if self.host_share is not None and not 0 <= self.host_share < 1:
            raise PlanError(f"--host-share is a share of what is routed, from 0 to below 1; got {self.host_share:g}.")
