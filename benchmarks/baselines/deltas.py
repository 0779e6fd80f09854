"""Other ways to write a variant's difference to a base than polymoe's formats do; matrices are float32 [O, I]."""

import math

import torch
from torch import Tensor

_LARGEST_GROUP, _SCALE_BYTES = 256, 2  # as polymoe's formats have them
_STEPS = torch.linspace(0.4, 1.0, 31).tolist()  # of the step at which nothing is clipped
_ALTERNATIONS = 3


def _in_groups(weight: Tensor) -> Tensor:
    """[O, I] -> [O, groups, values that share a scale]: the fewest groups of one size."""
    inputs = weight.shape[1]
    return weight.view(weight.shape[0], _num_groups(inputs), -1)


def _num_groups(inputs: int) -> int:
    return next(n for n in range(math.ceil(inputs / _LARGEST_GROUP), inputs + 1) if inputs % n == 0)


def coded_bytes(outputs: int, inputs: int, bits: int) -> int:
    """A code for each value and a scale for each group."""
    return outputs * (math.ceil(inputs * bits / 8) + _SCALE_BYTES * _num_groups(inputs))


def _best(rows: Tensor, candidates: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of (rounded [O, groups, size], scale [O, groups, 1]) the one with the least squared error, group by group."""
    best, chosen = candidates[0]
    least = torch.full_like(chosen, math.inf)
    for rounded, scale in candidates:
        error = (rounded - rows).square().sum(dim=2, keepdim=True)
        best, chosen = torch.where(error < least, rounded, best), torch.where(error < least, scale, chosen)
        least = torch.minimum(error, least)
    return best, chosen


def even_levels(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(`weight` in integers −2^(b−1)+1 … 2^(b−1)−1 times the best scale of its group, those scales [O, groups, 1])."""
    rows, high = _in_groups(weight), 2 ** (bits - 1) - 1
    largest = rows.abs().amax(dim=2, keepdim=True) / high
    scales = [(largest * step).to(torch.bfloat16).float().clamp_min(1e-30) for step in _STEPS]
    best, chosen = _best(rows, [((rows / scale).round().clamp(-high, high) * scale, scale) for scale in scales])
    return best.view(weight.shape), chosen


def nested(weight: Tensor, base: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Base and delta as one integer: the delta's levels are odd multiples of half a step, which is the scale of the
    base's group over a power of two, the best of -6 to 7 for each group."""
    rows, high = _in_groups(weight - base), 2 ** (bits - 1) - 0.5
    steps = [scales / 2.0**power for power in range(-6, 8)]
    candidates = [(((rows / step - 0.5).round() + 0.5).clamp(-high, high) * step, step) for step in steps]
    return base + _best(rows, candidates)[0].view(weight.shape)


def sign_and_rank(weight: Tensor, base: Tensor, _scales: Tensor, bits: int) -> Tensor:
    """The difference's largest singular vectors in 8 bits, and the signs of what they leave with a scale for each
    group, fitted in turn (arXiv 2604.16940): as many vectors as a code of `bits` takes bytes beyond the signs."""
    difference = weight - base
    rank, rest = num_vectors(weight.shape[0], weight.shape[1], bits), difference
    low = signs = torch.zeros_like(difference)
    for _ in range(_ALTERNATIONS):
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        root = s[:rank].sqrt()
        low = _in_8_bits((u[:, :rank] * root).T).T @ _in_8_bits(vh[:rank] * root[:, None])
        rows = _in_groups(difference - low)
        signs = (rows.sign() * rows.abs().mean(dim=2, keepdim=True)).view(weight.shape)
        rest = difference - signs
    return base + low + signs


def num_vectors(outputs: int, inputs: int, bits: int) -> int:
    """Pairs of vectors in 8 bits, with a scale each, that take the bytes of `bits` − 1 bits for each value."""
    return max(1, (bits - 1) * outputs * inputs // (8 * (outputs + inputs + 2 * _SCALE_BYTES)))


def _in_8_bits(vectors: Tensor) -> Tensor:
    """[r, n] in even steps of each vector's largest value."""
    scale = vectors.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    return (vectors / scale).round() * scale
