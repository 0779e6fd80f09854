"""In how many bits a new variant's corrections are stored: as many as there is room for, or as few as a KL allows."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polymoe.bundle.live import Addition
from polymoe.bundle.manifest import FileRecord
from polymoe.bundle.reader import Bundle
from polymoe.offline.addition.layer_plan import LayerPlanner
from polymoe.offline.addition.new_variant import NewVariant
from polymoe.offline.addition.nonexpert_plan import NonexpertPlanner
from polymoe.offline.addition.write_addition import NoRoomError, Progress, write_addition
from polymoe.offline.plan.nonexperts import nats_by_place
from polymoe.offline.plan.quantisation_error import CAUTION, NATS_PER_ERROR, RELEVANCE, layer_weights
from polymoe.thread_pool import thread_pool

BITS = (1, 2, 3, 4, 5)
_SAMPLED_LAYERS = 5


def write_fitting(
    bundle: Bundle,
    new: NewVariant,
    folder: Path,
    free_bytes: int | None,
    bits: int | None,
    max_kl: float | None,
    progress: Progress,
) -> tuple[Addition, list[FileRecord]]:
    """`write_addition` with the bits that were asked for: a number, None (lossless), 0 (the most that fits, lossless
    first), or with `max_kl` the fewest that keep the predicted KL. Raises as `write_addition` does."""
    tries: Sequence[int | None] = (None, *reversed(BITS)) if bits == 0 else (bits,)
    if max_kl is not None:
        progress("choosing bits", 0.0)
        enough = fewest_bits(bundle, new, max_kl)
        # With both: what fits, and at least what the KL asks for.
        tries = tries[: tries.index(enough) + 1] if bits == 0 else (enough,)
    for attempt in tries:
        try:
            return write_addition(bundle, new, folder, free_bytes, attempt, progress)
        except NoRoomError:
            if attempt == tries[-1]:
                raise
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    raise AssertionError("there is one try at least")


def fewest_bits(bundle: Bundle, new: NewVariant, max_kl: float) -> int | None:
    """None where no corrections keep `max_kl` (nats a token): lossless then."""
    return next((bits for bits in BITS if CAUTION * predicted_kl(bundle, new, bits) <= max_kl), None)


def predicted_kl(bundle: Bundle, new: NewVariant, bits: int) -> float:
    """Nats a token that corrections of so many bits cost, from the weights alone, as `QuantisationErrors.of_weights`
    predicts it; experts' errors are those of a few layers, encoded, those of packed matrices beside them of all."""
    info = new.checkpoint.architecture
    planner = LayerPlanner(bundle, new.checkpoint, bits)
    sampled = np.unique(np.linspace(0, info.num_layers - 1, _SAMPLED_LAYERS).round().astype(int))
    with thread_pool() as pool:
        errors = dict(zip(sampled.tolist(), pool.map(planner.relative_error, sampled.tolist()), strict=True))
        beside = NonexpertPlanner(bundle, new.checkpoint, bits)
        packed = list(bundle.manifest.packed_nonexperts)
        others = dict(zip(packed, pool.map(beside.relative_error, packed), strict=True))
    nearest = [errors[int(sampled[np.abs(sampled - layer).argmin()])] for layer in range(info.num_layers)]
    of_experts = NATS_PER_ERROR * np.average(nearest, weights=layer_weights(info.num_layers))
    nats = nats_by_place(packed, new.checkpoint, tuple(info.expert_modules))
    return float(RELEVANCE * (of_experts + sum(nats[name] * others[name] for name in packed)))
