"""Weights to packed codes and back: scales fitted by least squares, and error feedback where inputs are known.

Without a second moment each value takes its nearest level. With G = Σ x xᵀ over the inputs x that the matrix sees, the
error of the outputs, tr((W − Ŵ) G (W − Ŵ)ᵀ), is made small instead: each column's rounding error is fed back into the
columns after it (GPTQ, arXiv 2210.17323).
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from polymoe.quant.compiled import fast_encode
from polymoe.quant.formats import SCALE_DTYPE, Format, group_size, num_groups
from polymoe.quant.packing import pack, unpack

_FP8_MAX = 448.0
_CANDIDATES = (0.70, 0.80, 0.90, 1.0, 1.10, 1.20)  # of the first scale, tried when inputs are known
_STEPS = 2  # alternations of nearest level and least-squares scale, where inputs are known
_PIECE = 1 << 18  # values encoded at once
_RIDGE = 0.01  # of the mean diagonal of G
_RESOLUTION = 256  # steps of the search table for one unit of weight / scale
_COLUMN_BLOCK = 64  # columns whose error feedback is applied at once


def encode(weight: Tensor, fmt: Format, second_moment: Tensor | None = None) -> dict[str, Tensor]:
    """Pack one matrix.

    Args:
        weight: float32 [O, I] (or [O] for a bias, which is kept).
        second_moment: float32 [I, I], Σ x xᵀ over the matrix's inputs; None: every input counts alike.

    Returns: {part: tensor} as `parts(fmt, ...)` describes; "stored" and biases are returned as given, in {"": …}.
    """
    if weight.ndim == 1 or fmt.name == "stored":
        return {"": weight}
    assert fmt.name != "exact", "exact deltas are made by polymoe.quant.exact"
    if second_moment is None and (fast := _encode_fast(weight, fmt)) is not None:
        return fast
    if second_moment is None or fmt.name == "fp8":
        # Rows in pieces that stay in the cache of a core.
        rows = max(1, _PIECE // weight.shape[1])
        pieces = [_encode_plain(piece, fmt) for piece in torch.split(weight, rows)]
        return {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}
    scales = fit_scales(weight, fmt, second_moment.diagonal().clamp_min(0))
    codes = _with_feedback(weight, fmt, scales, second_moment)
    scales = refit_scales(weight, codes, fmt, second_moment, scales)
    return {"codes": pack(codes, fmt.bits), "scales": scales}


def _encode_fast(weight: Tensor, fmt: Format) -> dict[str, Tensor] | None:
    """`_encode_plain` by the compiled kernel; None where there is none."""
    if fmt.name == "fp8":
        return None
    if fmt.name == "int8" or fmt.bits == 1:  # nothing is searched for
        search, limit = torch.zeros(1, dtype=torch.int32), 0.0
    else:
        table, limit = _search_table(fmt, weight.device)
        search = table.int()
    return fast_encode(weight, fmt, _levels(fmt, weight.device), search, limit, _RESOLUTION)


def _encode_plain(weight: Tensor, fmt: Format) -> dict[str, Tensor]:
    scales = fit_scales(weight, fmt)
    ratio = _ratio(weight, _spread(scales, fmt, weight.shape[-1]))
    if fmt.name == "fp8":
        return {"codes": ratio.clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), "scales": scales}
    return {"codes": pack(nearest(ratio, fmt), fmt.bits), "scales": scales}


def decode(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The matrix [..., O, I] (or bias) that packed tensors stand for; the arithmetic is float32."""
    if "" in tensors:
        return tensors[""].to(dtype)
    inputs = shape[-1]
    spread = _spread(tensors["scales"], fmt, inputs)
    if fmt.name == "fp8":
        values = tensors["codes"].float()
    else:
        values = _level_values(unpack(tensors["codes"], fmt.bits, inputs), fmt)
    return values.mul_(spread).view(shape).to(dtype)


def fit_scales(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """Scales [O, groups] (bfloat16) for nearest rounding that make Σ importance · error² of each group small.

    Args:
        importance: [I], the weight of each input's error; None: all 1.
    """
    rows = _grouped(weight, fmt)  # [O, groups, group size], zero beyond the row's end
    if fmt.name == "fp8":
        return (rows.abs().amax(-1) / _FP8_MAX).to(SCALE_DTYPE)
    if fmt.name == "int8":
        return (rows.abs().amax(-1) / 127).to(SCALE_DTYPE)
    size = group_size(fmt, weight.shape[-1])
    counts = torch.full((rows.shape[1],), size, dtype=weight.dtype, device=weight.device)
    counts[-1] = weight.shape[-1] - size * (rows.shape[1] - 1)
    first = (rows.square().sum(-1) / counts).sqrt_()  # the levels are those of a variance of 1
    if fmt.bits == 1 and importance is None:
        return (rows.abs().sum(-1) / counts / fmt.levels[1]).to(SCALE_DTYPE)
    if importance is None:
        return _refined(rows, first, fmt, None, 1).to(SCALE_DTYPE)
    each = _grouped(importance[None], fmt)
    best, least = first, torch.full_like(first, torch.inf)
    for factor in _CANDIDATES:
        scale = _refined(rows, first * factor, fmt, each, _STEPS)
        error = (rows - _rounded(rows, scale, fmt) * scale[..., None]).square_()
        loss = error.mul_(each).sum(-1)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best.to(SCALE_DTYPE)


def _refined(rows: Tensor, scale: Tensor, fmt: Format, each: Tensor | None, steps: int) -> Tensor:
    """Scales [O, groups] after `steps` alternations of nearest levels and least squares, weighted by `each`."""
    for _ in range(steps):
        values = _rounded(rows, scale, fmt)
        weighted = values if each is None else values * each
        scale = _quotient((rows * weighted).sum(-1), (values * weighted).sum(-1))
    return scale


def _rounded(rows: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """The nearest levels of [O, groups, group size], before the scale."""
    return _level_values(nearest(_ratio(rows, scale[..., None]), fmt), fmt)


def nearest(ratio: Tensor, fmt: Format) -> Tensor:
    """uint8 codes of the levels nearest to `ratio` (weight / scale)."""
    if fmt.name == "int8":
        return ratio.round().clamp_(-127, 127).add_(128).to(torch.uint8)
    if fmt.bits == 1:
        return (ratio > 0).to(torch.uint8)
    table, limit = _search_table(fmt, ratio.device)
    # Truncation is floor here: everything is above zero.
    index = ratio.clamp(-limit, limit).add_(limit).mul_(_RESOLUTION).to(torch.int32)
    return table.index_select(0, index.reshape(-1)).view(index.shape)


@cache
def _search_table(fmt: Format, device: torch.device) -> tuple[Tensor, float]:
    """(uint8 code of the level nearest to each 1 / `_RESOLUTION` step of [−limit, limit], limit)."""
    levels = torch.tensor(fmt.levels, dtype=torch.float64)
    limit = float(int(levels[-1]) + 1)
    steps = int(2 * limit * _RESOLUTION)
    middles = (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / _RESOLUTION - limit
    return torch.bucketize(middles, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).to(device), limit


def _level_values(codes: Tensor, fmt: Format) -> Tensor:
    """float32 levels of uint8 codes."""
    return _levels(fmt, codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


@cache
def _levels(fmt: Format, device: torch.device) -> Tensor:
    return torch.tensor(fmt.levels, dtype=torch.float32, device=device)


def _grouped(weight: Tensor, fmt: Format) -> Tensor:
    """[O, I] -> [O, groups, group size], padded with zeros."""
    size = group_size(fmt, weight.shape[-1])
    padding = -weight.shape[-1] % size
    padded = torch.nn.functional.pad(weight, (0, padding)) if padding else weight
    return padded.reshape(*weight.shape[:-1], -1, size)


def _spread(scales: Tensor, fmt: Format, inputs: int) -> Tensor:
    """Scales [..., O, groups] -> float32 [..., O, I]."""
    assert scales.shape[-1] == num_groups(fmt, inputs)
    return scales.float().repeat_interleave(group_size(fmt, inputs), dim=-1)[..., :inputs]


def _ratio(weight: Tensor, scale: Tensor) -> Tensor:
    """weight / scale; 0 where the scale is 0 (a group of zeros)."""
    return (weight / scale).nan_to_num_(0.0, 0.0, 0.0)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0)


def _with_feedback(weight: Tensor, fmt: Format, scales: Tensor, moment: Tensor) -> Tensor:
    """Codes uint8 [O, I] by GPTQ: column by column, what rounding column j lost is taken over by the columns behind it.

    With U the upper Cholesky factor of G⁻¹, column j's error e_j = (w_j − ŵ_j) / U_jj moves column k by −e_j U_jk.
    """
    inputs = weight.shape[1]
    upper = inverse_factor(moment)
    spread = _spread(scales, fmt, inputs)
    work, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, inputs, _COLUMN_BLOCK):
        stop = min(start + _COLUMN_BLOCK, inputs)
        errors = torch.empty(weight.shape[0], stop - start, device=weight.device)
        for j in range(start, stop):
            column, scale = work[:, j], spread[:, j]
            code = nearest(_ratio(column, scale), fmt)
            error = (column - _level_values(code, fmt) * scale) / upper[j, j]
            work[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
            codes[:, j], errors[:, j - start] = code, error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def inverse_factor(moment: Tensor) -> Tensor:
    """U, upper triangular, with UᵀU = (G + ridge)⁻¹."""
    damped = moment.double()
    damped = damped + (_RIDGE * damped.diagonal().mean() + 1e-30) * torch.eye(
        len(damped), dtype=torch.float64, device=moment.device
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return upper


def refit_scales(weight: Tensor, codes: Tensor, fmt: Format, moment: Tensor, scales: Tensor) -> Tensor:
    """Scales [O, groups] (bfloat16) that minimise tr((W − Ŵ) G (W − Ŵ)ᵀ) for codes that stay.

    For each row the scales s of its groups solve (Cᵀ G C) s = Cᵀ G w, C the levels of each group in a column.
    """
    size, groups = group_size(fmt, weight.shape[1]), scales.shape[-1]
    values = _level_values(codes, fmt)
    columns = torch.zeros(*weight.shape, groups, device=weight.device)  # [O, I, groups]
    for g in range(groups):
        columns[:, g * size : (g + 1) * size, g] = values[:, g * size : (g + 1) * size]
    weighted = torch.einsum("ij,ojg->oig", moment, columns)
    normal = torch.einsum("oig,oih->ogh", columns, weighted).double()
    right = torch.einsum("oig,oi->og", weighted, weight).double()
    ridge = 1e-6 * normal.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-30
    solved = torch.linalg.solve(
        normal + ridge * torch.eye(groups, dtype=torch.float64, device=weight.device), right
    ).float()
    # Far from the start only where a group has next to no input: keep it.
    sane = (solved > 0.5 * scales.float()) & (solved < 2 * scales.float())
    return torch.where(sane, solved, scales.float()).to(SCALE_DTYPE).contiguous()
