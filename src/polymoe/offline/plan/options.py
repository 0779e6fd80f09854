"""What a user may ask of a policy beside its budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polymoe.errors import PlanError
from polymoe.quant.formats import BASE_FORMATS, STORED

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


@dataclass(frozen=True)
class PlanOptions:
    """Options of `polymoe plan`; None is the policy's default.

    base: format of the bases. delta_bits: bits a value of policy `delta`. clusters: groups of policy `cluster`.
    min_top1: share of tokens on which every variant must agree with its original, policy `auto`.
    caution: `min_top1` is to hold for so many times the predicted error.
    host_share: of what is routed, the share that may be fetched from the host tier, policy `auto`.
    calibrate: variant -> text files. distill: steps of distillation on them after the plan.
    accept_unrelated: merge variants that plainly have another ancestor all the same.
    """

    base: str = STORED.name
    delta_bits: int | None = None
    clusters: int | None = None
    min_top1: float | None = None
    caution: float = 1.0
    host_share: float | None = None
    calibrate: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    distill: int | None = None
    accept_unrelated: bool = False

    @property
    def bits(self) -> int:
        return self.delta_bits or _DEFAULT_BITS

    def check(self, policy: str) -> None:
        """Raise `PlanError` for an unknown policy, a value out of range, or an option that the policy does not have."""
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
