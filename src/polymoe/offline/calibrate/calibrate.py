"""Calibration text: what each variant reads, tokenised with its own tokenizer, and what its experts then see."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymoe.errors import PlanError
from polymoe.model.stock.kind import kind_of
from polymoe.offline.calibrate.family_run import Routed
from polymoe.offline.calibrate.kind import calibrated
from polymoe.offline.calibrate.token_rows import TokenRows
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.family import Family

WINDOW = 256  # tokens
MAX_WINDOWS = 128  # a variant
# What `Calibration.folder` holds: layers that the encoder and the planner finished, and those they were writing.
KEPT_LAYERS = re.compile(r"((damage|errors)-)?[0-9a-f]{24}/(\d+\.(safetensors|npy)|\.\d+\.(safetensors|npy)\.part)")


@dataclass(frozen=True, eq=False)
class Calibration:
    """`windows[v]` int64 [n_v, length]: token ids of variant v's text. `folder`: where finished layers are kept, so
    that an interrupted run goes on from there; None: nowhere. `inputs[v]`: of an encoder–decoder family what the
    encoder reads for each window, which is then the decoder's; both as in `TokenRows`."""

    windows: tuple[Tensor, ...]
    folder: Path | None = None
    inputs: tuple[Tensor, ...] | None = None

    @classmethod
    def from_files(
        cls,
        family: Family,
        files: Mapping[str, Sequence[str | Path]],
        window: int = WINDOW,
        max_windows: int = MAX_WINDOWS,
        folder: Path | None = None,
    ) -> Calibration:
        """Read {variant: text files}: plain text or JSON lines, as `read_tokens` does; of an encoder–decoder family
        every file holds pairs, {"input": …, "target": …} a line. Large files and long texts are sampled evenly. A
        variant without text reads that of all the others.

        Raises `PlanError` for an unknown variant, one without a tokenizer, a file that cannot be read, and too few
        tokens.
        """
        unknown = [name for name in files if name not in family.names]
        if unknown:
            raise PlanError(
                f"--calibrate {unknown[0]}=…: there is no variant {unknown[0]!r}; there are {', '.join(family.names)}."
            )
        if not files:
            raise PlanError("calibration needs text: --calibrate VARIANT=FILE.")
        kind, longest = calibrated(family.config), _longest(family)
        rows = [kind.rows(c, _own_or_all(c, files), longest, window, max_windows) for c in family.checkpoints]
        inputs = tuple(one.inputs for one in rows if one.inputs is not None)
        return cls(tuple(one.windows for one in rows), folder, inputs or None)

    @property
    def texts(self) -> list[TokenRows]:
        """What each variant reads."""
        inputs = self.inputs or [None] * len(self.windows)
        return [TokenRows(*rows) for rows in zip(self.windows, inputs, strict=True)]

    def hash(self) -> str:
        """SHA-256 over the tokens."""
        digest = hashlib.sha256()
        for rows in (*self.windows, *(self.inputs or ())):
            digest.update(str(tuple(rows.shape)).encode() + rows.numpy().tobytes())
        return digest.hexdigest()


def second_moments(hidden: Sequence[Tensor], gates: Sequence[Tensor], num_tokens: Sequence[int]) -> dict[int, Tensor]:
    """Variant -> float32 [I, I], Σ g² x xᵀ over its routed rows `hidden[v]` [t, I] with `gates[v]` [t], per token of
    its text (`num_tokens`), so that variants with more text do not count more."""
    moments = {}
    for v, (x, g, n) in enumerate(zip(hidden, gates, num_tokens, strict=True)):
        weighted = x.float() * g[:, None]
        moments[v] = weighted.T @ weighted / n
    return moments


def first_projection(module: Any, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """What the expert's down projection sees, [t, I], for `hidden` [t, H]; `weights` are matrices [out, in]."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    out = torch.nn.functional.linear(hidden, weights[name], weights.get(f"{name}_bias"))
    activated: Tensor = module._apply_gate(out) if module.has_gate else module.act_fn(out)
    return activated


def down_projection(hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    return torch.nn.functional.linear(hidden, weights["down_proj"], weights.get("down_proj_bias"))


def weighted_sum(routed: Routed, pieces: Mapping[int, tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Expert outputs to the layer's [T, H]. `pieces`: expert -> (rows [t], gates [t], outputs [t, H])."""
    total = torch.zeros_like(routed.hidden, dtype=torch.float32)
    for rows, gates, out in pieces.values():
        total.index_add_(0, rows, out * gates[:, None])
    return total


def _longest(family: Family) -> int:
    """Tokens of a window, or of an encoder's and a decoder's text each."""
    kind = kind_of(family.config)
    return min(kind.declared_length(checkpoint.config) for checkpoint in family.checkpoints) // kind.parts


def _own_or_all(checkpoint: Checkpoint, files: Mapping[str, Sequence[str | Path]]) -> list[Path]:
    given = [files[checkpoint.name]] if checkpoint.name in files else files.values()
    return [Path(path).expanduser() for paths in given for path in paths]
