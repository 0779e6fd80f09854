"""Packing, formats and codecs: exact round trips, byte counts, and errors against what theory promises."""

import math

import pytest
import torch

from polymoe.errors import PlanError
from polymoe.quant import formats
from polymoe.quant.codec import Coded, Levels, decode, encode
from polymoe.quant.exact import (
    changed,
    changes_before_rows,
    decode_exact,
    decode_exact_torch,
    encode_exact,
    encode_exact_torch,
    exact_bytes,
    same_bits,
)
from polymoe.quant.formats import (
    BASE_FORMATS,
    DELTA_FORMATS,
    PLANES,
    get_format,
    group_size,
    num_bytes,
    parts,
    register,
)
from polymoe.quant.packing import pack, unpack

PACKED = [fmt for fmt in (*BASE_FORMATS, *DELTA_FORMATS) if isinstance(fmt, Coded)]
WITH_TABLE = [fmt for fmt in PACKED if fmt.levels]


def gaussian(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def left(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    """Share of the energy that is left as error."""
    return float((weight - decoded).square().sum() / weight.square().sum())


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("inputs", [1, 7, 24, 31, 63, 64, 65, 100, 127, 192, 256, 300, 384, 520])
def test_packing_is_exact_for_any_width(bits: int, inputs: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, inputs), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, sum(math.ceil(inputs * width / 8) for width in PLANES[bits]))
    assert torch.equal(unpack(packed, bits, inputs), codes)


def test_layout_of_a_whole_block_and_of_a_short_one() -> None:
    """Kernels rely on it: byte j of 32 has value j in its low bits and value j + 32 above; a short last block of n
    bytes has stride n."""
    codes = torch.zeros(1, 96, dtype=torch.uint8)
    codes[0, 5], codes[0, 37], codes[0, 64 + 3], codes[0, 64 + 16 + 3] = 1, 2, 3, 4
    packed = pack(codes, 4)[0]
    assert packed[5] == 1 + (2 << 4)
    assert packed[32 + 3] == 3 + (4 << 4)
    assert int((packed != 0).sum()) == 2


def test_three_bits_are_a_plane_of_two_and_one_of_one() -> None:
    codes = torch.tensor([[7, 3, 4, 0] * 32], dtype=torch.uint8)  # 128 values: one block of the 2-bit plane
    packed = pack(codes, 3)[0]
    assert len(packed) == 32 + 16
    assert torch.equal(packed[:32], pack(codes & 3, 2)[0])
    assert torch.equal(packed[32:], pack(codes >> 2, 1)[0])


@pytest.mark.parametrize(
    ("inputs", "size"), [(24, 64), (64, 64), (192, 192), (256, 256), (384, 192), (300, 192), (4096, 256), (2880, 256)]
)
def test_groups_are_few_and_even(inputs: int, size: int) -> None:
    assert group_size(get_format("int4"), inputs) == size


@pytest.mark.parametrize("fmt", PACKED, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", [(5, 24), (3, 192), (4, 300), (2, 512)])
def test_parts_and_bytes_are_what_encode_makes(fmt, shape) -> None:
    tensors = encode(gaussian(*shape), fmt)
    declared = parts(fmt, shape, torch.bfloat16)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == declared
    assert sum(t.nbytes for t in tensors.values()) == num_bytes(fmt, shape, torch.bfloat16)
    assert decode(tensors, fmt, shape, torch.bfloat16).dtype == torch.bfloat16


def test_bytes_a_value() -> None:
    """4 bits and a bfloat16 scale for 256 values; without padding where rows are no multiple of a block."""
    assert num_bytes(get_format("int4"), (8, 4096), torch.bfloat16) == 8 * (2048 + 2 * 16)
    assert num_bytes(get_format("d1"), (8, 192), torch.bfloat16) == 8 * (24 + 2)
    assert num_bytes(get_format("stored"), (8, 192), torch.bfloat16) == 8 * 192 * 2
    assert num_bytes(get_format("d1"), (8,), torch.bfloat16) == 8 * 4  # a bias: the difference in float32


# What the least-squares quantiser of a Gaussian leaves (Max 1960), and what 8 bits leave with the largest value as end.
IDEAL = {"d1": 0.363, "d2": 0.1175, "d3": 0.0345, "d4": 0.0095, "d5": 0.0025, "int3": 0.0345, "int4": 0.0095}
IDEAL |= {"int5": 0.0025, "int6": 0.00064, "int8": 5e-5, "fp8": 7e-4}


@pytest.mark.parametrize("fmt", PACKED, ids=lambda fmt: fmt.name)
def test_error_on_gaussian_rows_is_the_ideal_quantisers(fmt) -> None:
    weight = gaussian(64, 1024) * torch.linspace(0.1, 10, 64)[:, None]  # rows of very different size
    assert left(weight, decode(encode(weight, fmt), fmt, (64, 1024), torch.float32)) < 1.1 * IDEAL[fmt.name]


@pytest.mark.parametrize("fmt", PACKED, ids=lambda fmt: fmt.name)
def test_zero_rows_and_single_outliers_survive(fmt) -> None:
    weight = gaussian(3, 256)
    weight[0] = 0
    weight[1, 7] = 1.0  # 50 times the others
    decoded = decode(encode(weight, fmt), fmt, (3, 256), torch.float32)
    assert torch.isfinite(decoded).all()
    assert (decoded[0] == 0).all()
    assert left(weight[1], decoded[1]) < 0.9


@pytest.mark.parametrize("fmt", WITH_TABLE, ids=lambda fmt: fmt.name)
def test_nearest_is_nearest(fmt) -> None:
    levels = torch.tensor(fmt.levels)
    assert torch.equal(levels, levels.sort().values)
    ratio = torch.linspace(-1.2, 1.2, 5001) * levels.abs().max()
    if fmt.name == "int8":
        levels = levels[1:]  # −128 is not used
    best = (ratio[:, None] - levels).abs().amin(dim=1)
    found = (ratio - torch.tensor(fmt.levels)[fmt.nearest(ratio).int()]).abs()
    assert (found - best).max() < 1 / 128  # the search table's step


@pytest.mark.parametrize("name", ["d1", "d2", "int3", "int4"])
def test_error_feedback_makes_the_outputs_error_smaller(name: str) -> None:
    """Inputs of low rank and noise: feedback moves the error into directions that inputs hardly have."""
    fmt, generator = get_format(name), torch.Generator().manual_seed(1)
    mixing = torch.randn(40, 192, generator=generator)
    inputs = torch.randn(2000, 40, generator=generator) @ mixing + 0.3 * torch.randn(2000, 192, generator=generator)
    moment = inputs.T @ inputs / 2000
    weight = gaussian(96, 192)

    def output_error(tensors: dict[str, torch.Tensor]) -> float:
        error = weight - decode(tensors, fmt, (96, 192), torch.float32)
        return float(((error @ moment) * error).sum())

    plain, fitted = output_error(encode(weight, fmt)), output_error(encode(weight, fmt, moment))
    assert fitted < 0.5 * plain


def test_moments_of_dead_and_single_inputs_do_no_harm() -> None:
    fmt, weight = get_format("d2"), gaussian(8, 192)
    moment = torch.zeros(192, 192)
    moment[3, 3] = 5.0
    decoded = decode(encode(weight, fmt, moment), fmt, (8, 192), torch.float32)
    assert torch.isfinite(decoded).all()
    assert left(weight, decoded) < 0.6
    assert (weight[:, 3] - decoded[:, 3]).abs().max() < 0.02


def test_leading_axes_decode_together() -> None:
    fmt, stack = get_format("int4"), [gaussian(4, 192, seed) for seed in range(3)]
    tensors = [encode(weight, fmt) for weight in stack]
    together = {part: torch.stack([one[part] for one in tensors]) for part in tensors[0]}
    want = torch.stack([decode(one, fmt, (4, 192), torch.float32) for one in tensors])
    assert torch.equal(decode(together, fmt, (3, 4, 192), torch.float32), want)


def test_biases_are_kept() -> None:
    bias = torch.randn(7)
    for name in ("int4", "d1"):
        tensors = encode(bias, get_format(name))
        assert torch.equal(decode(tensors, get_format(name), (7,), torch.float32), bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(6, 31), (4, 64), (9,)])
def test_exact_deltas_are_lossless(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).to(dtype)
    weight = base.clone()
    flips = torch.rand(shape, generator=generator) < 0.3
    weight[flips] *= 1.5
    weight.view(-1)[0], base.view(-1)[0] = -0.0, 0.0  # equal as numbers, not as bits
    tensors = encode_exact(weight, base)
    restored = decode_exact(tensors, base)
    assert not bool(changed(decode_exact_torch(tensors, base), restored).any())
    assert not bool(changed(restored, weight).any())
    count = int(changed(weight, base).sum())
    assert 0 < count < weight.numel()
    assert sum(t.nbytes for t in tensors.values()) == exact_bytes(shape, count, dtype)


def test_a_format_from_outside_is_planned_and_packed_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry is all that it takes; the lossless delta stays the last, as bundles number them."""
    monkeypatch.setattr(formats, "BASE_FORMATS", list(BASE_FORMATS))
    monkeypatch.setattr(formats, "DELTA_FORMATS", list(DELTA_FORMATS))
    ternary = (-1.2240, -0.0001, 0.0001, 1.2240)  # two codes for zero
    for fmt in (Levels("t2", 2, 128, ternary, 0.19), Levels("dt2", 2, 128, ternary, 0.19, is_delta=True)):
        register(fmt)
        assert get_format(fmt.name) is fmt
        weight = gaussian(64, 1024)
        decoded = fmt.decode(fmt.encode(weight), (64, 1024), torch.float32)
        assert left(weight, decoded) == pytest.approx(fmt.distortion, rel=0.1)
    assert formats.BASE_FORMATS[-1].name == "t2"
    assert [fmt.name for fmt in formats.DELTA_FORMATS[-2:]] == ["dt2", "exact"]
    with pytest.raises(PlanError, match="there is a format 't2' already"):
        register(fmt=get_format("t2"))
    get_format.cache_clear()


def test_unknown_formats_are_named() -> None:
    with pytest.raises(PlanError, match=r"unknown format 'int7'; bases are stored, fp8, int8, .* deltas d1"):
        get_format("int7")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 64), (7, 33), (3, 8), (1, 1), (40,), (9, 0)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_exact_deltas_are_those_of_the_reference(dtype: torch.dtype, shape: tuple[int, ...], share: float) -> None:
    """The compiled encoder, at every width, where it can run."""
    base = torch.randn(shape).to(dtype)
    weight = torch.where(torch.rand(shape) < share, -base - 0.5, base)
    if weight.numel():
        weight.view(-1)[0], base.view(-1)[0] = -0.0, 0.0  # differ, though they are equal
    found, reference = encode_exact(weight, base), encode_exact_torch(weight, base)
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[part], reference[part]) for part in reference)
    assert same_bits(decode_exact(found, base), weight)
    assert same_bits(weight, base) == (weight.numel() == 0)
    if weight.ndim == 2:
        counts = changed(weight, base).sum(-1)
        assert torch.equal(changes_before_rows(found["bitmap"][None])[0], counts.cumsum(-1) - counts)
