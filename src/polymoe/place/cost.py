"""What sharing a pool costs, predicted from distances alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from polymoe.place.problem import Family


def delta_bits(distance: NDArray[np.float32], error: float, stored_bits: int) -> NDArray[np.float32]:
    """Bits a weight that a variant needs beside a base at `distance`, to be within `error` of its original.

    bits = log2(distance / error), between 0 and `stored_bits`: the rate of a Gaussian source at that distortion (Cover
    and Thomas, Elements of Information Theory, theorem 10.3.2). Codes in use need about half a bit more, alike for
    everybody, so that it ranks placements; a bundle's own planner measures.
    """
    with np.errstate(divide="ignore"):
        bits = np.log2(distance / np.float32(error))
    clipped: NDArray[np.float32] = np.clip(bits, 0.0, stored_bits).astype(np.float32)
    return clipped


def variant_bytes(family: Family, error: float) -> NDArray[np.float32]:
    """[V, V]: bytes that variant v adds to a pool whose base is variant b: its non-experts and its deltas. The base's
    own experts are not in it: `family.expert_bytes` a pool."""
    bits = delta_bits(family.distance, error, family.stored_bits)
    added: NDArray[np.float32] = family.nonexpert_bytes + np.float32(family.expert_bytes / family.stored_bits) * bits
    return added
