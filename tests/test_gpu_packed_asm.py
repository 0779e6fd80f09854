"""The PTX that decodes packed codes, run in an emulator of its instructions, against the codec's levels."""

import re

import pytest
import torch

from polymoe.kernels.gpu.packed_asm import assembly
from polymoe.quant.formats import BLOCK_BYTES, PLANES, get_format
from polymoe.quant.packing import pack

MASK = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, `prmt.b32` in its default mode: a selector's highest bit copies the byte's sign."""
    both = [(a >> 8 * i) & 0xFF for i in range(4)] + [(b >> 8 * i) & 0xFF for i in range(4)]
    out = 0
    for i in range(4):
        nibble = (selector >> 4 * i) & 0xF
        byte = both[nibble & 7]
        out |= (byte if nibble < 8 else 0xFF * (byte >> 7)) << 8 * i
    return out


def halves(word: int) -> torch.Tensor:
    signed = [(word >> at & 0xFFFF) - ((word >> at & 0x8000) << 1) for at in (0, 16)]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16)


def fma(a: int, b: int, c: int) -> int:
    exact = halves(a).double() * halves(b).double() + halves(c).double()
    bits = [int(v) & 0xFFFF for v in exact.to(torch.bfloat16).view(torch.int16)]
    return bits[0] | bits[1] << 16


def run(text: str, inputs: dict[str, int]) -> dict[str, int]:
    values = dict(inputs)
    for line in re.findall(r"^(\S+ .*);$", text, re.MULTILINE):
        name, rest = line.split(" ", 1)
        if name == ".reg":
            continue
        out, *operands = (part.strip() for part in rest.split(","))
        x = [values[o] if o in values else int(o, 0) for o in operands]
        values[out] = {
            "mov.b32": lambda x=x: x[0],
            "not.b32": lambda x=x: ~x[0] & MASK,
            "and.b32": lambda x=x: x[0] & x[1],
            "or.b32": lambda x=x: x[0] | x[1],
            "xor.b32": lambda x=x: x[0] ^ x[1],
            "shr.u32": lambda x=x: x[0] >> x[1],
            "shl.b32": lambda x=x: x[0] << x[1] & MASK,
            "mul.lo.u32": lambda x=x: x[0] * x[1] & MASK,
            "prmt.b32": lambda x=x: prmt(*x),
            "fma.rn.bf16x2": lambda x=x: fma(*x),
        }[name]()
    return values


def words(packed: torch.Tensor) -> list[int]:
    return [int.from_bytes(bytes(packed[i : i + 4].tolist()), "little") for i in range(0, len(packed), 4)]


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_bytes(name: str) -> None:
    (text,) = assembly(get_format(name))
    codes = torch.arange(256, dtype=torch.uint8)
    if name == "fp8":
        expected = codes.view(torch.float8_e4m3fn).float()
        codes[expected.isnan()], expected[expected.isnan()] = 0, 0
    else:
        expected = codes.float() - 128
    for i, word in enumerate(words(codes)):
        found = run(text, {"$2": word})
        values = torch.cat([halves(found["$0"]), halves(found["$1"])]).float()
        assert torch.equal(values, expected[4 * i : 4 * i + 4]), i


@pytest.mark.parametrize("name", ["d1", "d2", "d3", "d4", "d5", "int3", "int4", "int5"])
def test_planes(name: str) -> None:
    """Every tile of 32 inputs of random codes in the packed layout."""
    fmt = get_format(name)
    wide, narrow = (*PLANES[fmt.bits], 0)[:2]
    unit = 256 // (narrow or wide)
    codes = torch.randint(0, 2**fmt.bits, (unit,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes[None], fmt.bits)[0]
    expected = torch.tensor(fmt.levels).to(torch.bfloat16)[codes.long()].view(-1, BLOCK_BYTES)
    loads, apart = (wide // narrow if narrow else 1), 4 // wide
    steps = assembly(fmt)
    assert len(steps) == loads * apart
    found = torch.zeros_like(expected)
    for q in range(loads):
        for p in range(apart):
            for lane, word in enumerate(words(packed[q * 32 : q * 32 + 32])):
                inputs = {"$4": word}
                if narrow:
                    inputs["$5"] = words(packed[loads * 32 :])[lane]
                out = run(steps[q * apart + p], inputs)
                tile = q * 2 * apart + p
                found[tile, 4 * lane : 4 * lane + 4] = torch.cat([halves(out["$0"]), halves(out["$1"])])
                found[tile + apart, 4 * lane : 4 * lane + 4] = torch.cat([halves(out["$2"]), halves(out["$3"])])
    assert torch.equal(found, expected)


def test_formats_without_assembly() -> None:
    assert assembly(get_format("int6")) == ()
