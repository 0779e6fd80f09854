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
from polymoe.quant.format import SCALE_DTYPE, Format, Kind, Parts, group_size, num_groups, row_bytes
from polymoe.quant.packing import pack, unpack

_FP8_MAX = 448.0
_CANDIDATES = (0.70, 0.80, 0.90, 1.0, 1.10, 1.20)  # of the first scale, tried when inputs are known
_STEPS = 2  # alternations of nearest level and least-squares scale, where inputs are known
_PIECE = 1 << 18  # values encoded at once
_RIDGE = 0.01  # of the mean diagonal of G
_RESOLUTION = 256  # steps of the search table for one unit of weight / scale
_COLUMN_BLOCK = 64  # columns whose error feedback is applied at once


def encode(weight: Tensor, fmt: Format, second_moment: Tensor | None = None) -> dict[str, Tensor]:
    """`Format.encode`."""
    return fmt.encode(weight, second_moment)


def decode(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`Format.decode`."""
    return fmt.decode(tensors, shape, dtype)


class Coded(Format):
    """Codes, and a scale for each group. A kind says how scales are fitted and what the nearest code is."""

    def parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> Parts:
        if len(shape) == 1:  # a bias; a delta's is the difference in float32
            return {"": (torch.float32 if self.is_delta else dtype, shape)}
        *lead, inputs = shape
        return {
            "codes": (self.code_dtype, (*lead, row_bytes(self, inputs))),
            "scales": (SCALE_DTYPE, (*lead, num_groups(self, inputs))),
        }

    def encode(self, weight: Tensor, second_moment: Tensor | None = None) -> dict[str, Tensor]:
        if weight.ndim == 1:
            return {"": weight}
        if second_moment is not None:
            return self.encode_with_feedback(weight, second_moment)
        if (fast := self.encode_fast(weight)) is not None:
            return fast
        # Rows in pieces that stay in the cache of a core.
        rows = max(1, _PIECE // weight.shape[1])
        pieces = [self.encode_plain(piece) for piece in torch.split(weight, rows)]
        return {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}

    def encode_plain(self, weight: Tensor) -> dict[str, Tensor]:
        """[O, I] to the nearest codes, every input alike."""
        scales = self.fit_scales(weight)
        ratio = _ratio(weight, _spread(scales, self, weight.shape[-1]))
        return {"codes": self.packed(ratio), "scales": scales}

    def encode_fast(self, weight: Tensor) -> dict[str, Tensor] | None:
        """`encode_plain` by the compiled kernel; None where there is none."""
        search, limit = self.search_table(weight.device)
        return fast_encode(weight, self, _levels(self, weight.device), search.int(), limit, _RESOLUTION)

    def encode_with_feedback(self, weight: Tensor, second_moment: Tensor) -> dict[str, Tensor]:
        """[O, I] so that the error of the outputs is small; arguments as in `encode`."""
        scales = self.fit_scales(weight, second_moment.diagonal().clamp_min(0))
        codes = _with_feedback(weight, self, scales, second_moment)
        scales = refit_scales(weight, codes, self, second_moment, scales)
        return {"codes": pack(codes, self.bits), "scales": scales}

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if "" in tensors:
            return tensors[""].to(dtype)
        spread = _spread(tensors["scales"], self, shape[-1])
        return self.unpacked(tensors["codes"], shape[-1]).mul_(spread).view(shape).to(dtype)

    def packed(self, ratio: Tensor) -> Tensor:
        """The codes nearest to `ratio` [O, I] (weight / scale, may be overwritten), as they are stored."""
        return pack(self.nearest(ratio), self.bits)

    def unpacked(self, codes: Tensor, inputs: int) -> Tensor:
        """float32 [..., O, I]: what stored codes stand for before the scale."""
        return _level_values(unpack(codes, self.bits, inputs), self)

    def fit_scales(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """Scales [O, groups] (bfloat16) for nearest rounding that make Σ importance · error² of each group small.

        Args:
            importance: [I], the weight of each input's error; None: all 1.
        """
        raise NotImplementedError

    def nearest(self, ratio: Tensor) -> Tensor:
        """uint8 codes of the levels nearest to `ratio` (weight / scale)."""
        raise NotImplementedError

    def search_table(self, device: torch.device) -> tuple[Tensor, float]:
        """(the code of the level nearest to each 1 / `_RESOLUTION` step of [−limit, limit], limit); a limit of 0:
        nothing is searched for."""
        return torch.zeros(1, dtype=torch.int32), 0.0


class Float8(Coded):
    """float8_e4m3fn; the largest value of a group is the format's largest. Text changes nothing."""

    kind = Kind.FLOAT8
    code_dtype = torch.float8_e4m3fn

    @property
    def lookup(self) -> tuple[float, ...]:
        """Of codes without their sign."""
        return tuple(torch.arange(128, dtype=torch.uint8).view(self.code_dtype).float().tolist())

    def encode_with_feedback(self, weight: Tensor, second_moment: Tensor) -> dict[str, Tensor]:
        return self.encode(weight)

    def encode_fast(self, weight: Tensor) -> dict[str, Tensor] | None:
        return None

    def fit_scales(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        return (_grouped(weight, self).abs().amax(-1) / _FP8_MAX).to(SCALE_DTYPE)

    def packed(self, ratio: Tensor) -> Tensor:
        return ratio.clamp_(-_FP8_MAX, _FP8_MAX).to(self.code_dtype)

    def unpacked(self, codes: Tensor, inputs: int) -> Tensor:
        return codes.float()


class Centred(Coded):
    """8 bits, even steps: code 128 is zero; 0 is not used, so that the levels are symmetric."""

    kind = Kind.CENTRED

    def fit_scales(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        return (_grouped(weight, self).abs().amax(-1) / 127).to(SCALE_DTYPE)

    def nearest(self, ratio: Tensor) -> Tensor:
        return ratio.round().clamp_(-127, 127).add_(128).to(torch.uint8)


class Levels(Coded):
    """A table of mirrored, ascending levels, those of a variance of 1."""

    kind = Kind.LEVELS

    def fit_scales(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        rows = _grouped(weight, self)  # [O, groups, group size], zero beyond the row's end
        size = group_size(self, weight.shape[-1])
        counts = torch.full((rows.shape[1],), size, dtype=weight.dtype, device=weight.device)
        counts[-1] = weight.shape[-1] - size * (rows.shape[1] - 1)
        first = (rows.square().sum(-1) / counts).sqrt_()
        if self.bits == 1 and importance is None:
            return (rows.abs().sum(-1) / counts / self.levels[1]).to(SCALE_DTYPE)
        if importance is None:
            return _refined(rows, first, self, None, 1).to(SCALE_DTYPE)
        each = _grouped(importance[None], self)
        best, least = first, torch.full_like(first, torch.inf)
        for factor in _CANDIDATES:
            scale = _refined(rows, first * factor, self, each, _STEPS)
            error = (rows - _rounded(rows, scale, self) * scale[..., None]).square_()
            loss = error.mul_(each).sum(-1)
            best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
        return best.to(SCALE_DTYPE)

    def nearest(self, ratio: Tensor) -> Tensor:
        if self.bits == 1:
            return (ratio > 0).to(torch.uint8)
        table, limit = self.search_table(ratio.device)
        # Truncation is floor here: everything is above zero.
        index = ratio.clamp(-limit, limit).add_(limit).mul_(_RESOLUTION).to(torch.int32)
        return table.index_select(0, index.reshape(-1)).view(index.shape)

    def search_table(self, device: torch.device) -> tuple[Tensor, float]:
        return super().search_table(device) if self.bits == 1 else _search_table(self, device)


def _refined(rows: Tensor, scale: Tensor, fmt: Coded, each: Tensor | None, steps: int) -> Tensor:
    """Scales [O, groups] after `steps` alternations of nearest levels and least squares, weighted by `each`."""
    for _ in range(steps):
        values = _rounded(rows, scale, fmt)
        weighted = values if each is None else values * each
        scale = _quotient((rows * weighted).sum(-1), (values * weighted).sum(-1))
    return scale


def _rounded(rows: Tensor, scale: Tensor, fmt: Coded) -> Tensor:
    """The nearest levels of [O, groups, group size], before the scale."""
    return _level_values(fmt.nearest(_ratio(rows, scale[..., None])), fmt)


@cache
def _search_table(fmt: Coded, device: torch.device) -> tuple[Tensor, float]:
    """(uint8 code of the level nearest to each 1 / `_RESOLUTION` step of [−limit, limit], limit)."""
    levels = torch.tensor(fmt.levels, dtype=torch.float64)
    limit = float(int(levels[-1]) + 1)
    steps = int(2 * limit * _RESOLUTION)
    middles = (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / _RESOLUTION - limit
    return torch.bucketize(middles, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).to(device), limit


def _level_values(codes: Tensor, fmt: Coded) -> Tensor:
    """float32 levels of uint8 codes."""
    return _levels(fmt, codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


@cache
def _levels(fmt: Coded, device: torch.device) -> Tensor:
    return torch.tensor(fmt.levels, dtype=torch.float32, device=device)


def _grouped(weight: Tensor, fmt: Coded) -> Tensor:
    """[O, I] -> [O, groups, group size], padded with zeros."""
    size = group_size(fmt, weight.shape[-1])
    padding = -weight.shape[-1] % size
    padded = torch.nn.functional.pad(weight, (0, padding)) if padding else weight
    return padded.reshape(*weight.shape[:-1], -1, size)


def _spread(scales: Tensor, fmt: Coded, inputs: int) -> Tensor:
    """Scales [..., O, groups] -> float32 [..., O, I]."""
    assert scales.shape[-1] == num_groups(fmt, inputs)
    return scales.float().repeat_interleave(group_size(fmt, inputs), dim=-1)[..., :inputs]


def _ratio(weight: Tensor, scale: Tensor) -> Tensor:
    """weight / scale; 0 where the scale is 0 (a group of zeros)."""
    return (weight / scale).nan_to_num_(0.0, 0.0, 0.0)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0)


def _with_feedback(weight: Tensor, fmt: Coded, scales: Tensor, moment: Tensor) -> Tensor:
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
            code = fmt.nearest(_ratio(column, scale))
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


def refit_scales(weight: Tensor, codes: Tensor, fmt: Coded, moment: Tensor, scales: Tensor) -> Tensor:
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
