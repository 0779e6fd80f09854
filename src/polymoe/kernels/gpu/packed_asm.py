"""Codes to bfloat16 by byte permutation: PTX for the inner loop of `packed_product`.

`prmt` looks four nibbles up in a table of eight bytes. A register of codes holds four bytes, and each byte two codes
that are four bits apart, so `(w >> shift) & mask` is eight selectors, and two look-ups a table (high and low byte of
each level) and one permutation to put the bytes together give two tiles of weights:

    byte of w (2 bits):   |c₃ c₃|c₂ c₂|c₁ c₁|c₀ c₀|   shift 0: tiles 0 and 2, shift 2: tiles 1 and 3
    (w >> 0) & 0x33333333 = selectors  c₂ c₀ c₂ c₀ c₂ c₀ c₂ c₀  of bytes 3 … 0

Levels are mirrored, so 4 bits are 8 sizes and a sign; 5 bits are 16 sizes, two tables of 8 and a choice between them.
Decoding with conversions or a table in memory takes about twice the instructions (counted in code for sm_90), and at
3 TB/s of 2-bit codes instructions are what limits. 6 bits and other dtypes use that way (`packed_product._values`); so
does Triton's interpreter, which knows no PTX. The test runs these very lines in an emulator of their instructions.
"""

import torch

from polymoe.quant.formats import PLANES, Format, Kind


def assembly(fmt: Format) -> tuple[str, ...]:
    """PTX of each step that decodes `fmt` to bfloat16; empty where there is none.

    8 bits: one step, operands $0 $1 (four values) from $2 (four codes). Fewer: step q · d + p with d = 4 / bits of the
    wide plane gives tiles q · 2d + p ($0 $1) and q · 2d + p + d ($2 $3) of 32 inputs a block from $4, the q-th load of
    the wide plane, and $5, the narrow plane.
    """
    if fmt.kind is Kind.FLOAT8:
        return (_fp8(),)
    if fmt.kind is Kind.CENTRED:
        return (_int8(),)
    planes = PLANES[fmt.bits]
    if planes not in ((1,), (2,), (4,), (2, 1), (4, 1)):
        return ()
    apart = 4 // planes[0]
    loads = planes[0] // planes[-1]
    return tuple(_pair(fmt, q * 2 * apart + p, p * planes[0], apart) for q in range(loads) for p in range(apart))


def _block(lines: list[str], registers: str) -> str:
    """Operands that are read must not be read again after an output was written: the two may be one register."""
    return "{\n.reg .b32 " + registers + ";\n" + "\n".join(f"{line};" for line in lines) + "\n}"


def _int8() -> str:
    """code − 128: 0x43cc is 128 + cc for cc < 128; the bit that doubles 128 is the inverse of the code's highest."""
    lines = []
    for out, places in (("$0", "0x4140"), ("$1", "0x4342")):
        lines += [
            f"prmt.b32 a, w, 0, {places}",
            "and.b32 b, a, 0x007f007f",
            "or.b32 b, b, 0x43004300",
            "not.b32 a, a",
            "and.b32 a, a, 0x00800080",
            "or.b32 a, a, 0xc300c300",
            f"fma.rn.bf16x2 {out}, b, one, a",
        ]
    return _block(["mov.b32 w, $2", "mov.b32 one, 0x3f803f80", *lines], "a, b, w, one")


def _fp8() -> str:
    """e4m3 in the upper bits of a bfloat16 is the value · 2⁻¹²⁰, subnormals too."""
    lines = []
    for out, places in (("$0", "0x1404"), ("$1", "0x3424")):
        lines += [
            f"prmt.b32 a, w, 0, {places}",
            "shr.u32 b, a, 4",
            "and.b32 b, b, 0x07f007f0",
            "and.b32 a, a, 0x80008000",
            "or.b32 a, a, b",
            f"fma.rn.bf16x2 {out}, a, big, zero",
        ]
    return _block(
        ["mov.b32 w, $2", "mov.b32 big, 0x7b807b80", "mov.b32 zero, 0x80008000", *lines], "a, b, w, big, zero"
    )


def _pair(fmt: Format, tile: int, shift: int, apart: int) -> str:
    """Tiles `tile` and `tile + apart` from the codes at `shift` and `shift + 4` of each byte."""
    wide = PLANES[fmt.bits][0]
    lines = [_shifted("a", "$4", shift), f"and.b32 a, a, {_repeated(2**wide - 1)}"]
    levels = list(fmt.levels)
    if fmt.bits <= 2:
        lines.append("or.b32 a, a, 0x44444444")
    if fmt.bits == 3:  # the third bit of each selector
        lines += [
            _shifted("b", "$5", tile - 2), "and.b32 b, b, 0x04040404", "or.b32 a, a, b",
            _shifted("b", "$5", tile + apart - 6), "and.b32 b, b, 0x40404040", "or.b32 a, a, b",
        ]  # fmt: skip
    # n: 1 in each selector's place where the level is negative; there sizes count down
    if fmt.bits == 4:
        levels = levels[8:]
        lines += ["not.b32 n, a", "shr.u32 n, n, 3", "and.b32 n, n, 0x11111111", "and.b32 a, a, 0x77777777"]
        lines += ["mul.lo.u32 b, n, 7", "xor.b32 a, a, b", "or.b32 n, n, 0x44444444"]
    if fmt.bits == 5:
        levels = levels[16:]
        lines += [
            "not.b32 b, $5",
            _shifted("n", "b", tile), "and.b32 n, n, 0x01010101",
            _shifted("b", "b", tile + apart - 4), "and.b32 b, b, 0x10101010", "or.b32 n, n, b",
            "mul.lo.u32 b, n, 15", "xor.b32 a, a, b", "or.b32 n, n, 0x44444444",
            # c chooses between the two halves of the table
            "shr.u32 c, a, 1", "and.b32 c, c, 0x44444444", "or.b32 c, c, 0x32103210", "and.b32 a, a, 0x77777777",
        ]  # fmt: skip
    table = [int(bits) & 0xFFFF for bits in torch.tensor(levels, dtype=torch.bfloat16).view(torch.int16).tolist()]
    high, low = [bits >> 8 for bits in table], [bits & 0xFF for bits in table]
    for half in "01":
        lines += [*_look_up(f"h{half}", high), *_look_up(f"l{half}", low)]
        if fmt.bits >= 4:
            lines += ["prmt.b32 d, 0, 0x8000, n", f"or.b32 h{half}, h{half}, d"]
        if half == "0":
            lines += [f"shr.u32 {name}, {name}, 16" for name in {4: "an", 5: "anc"}.get(fmt.bits, "a")]
    for half in "01":
        lines += [
            f"prmt.b32 ${half}, l{half}, h{half}, 0x6240",
            f"prmt.b32 ${int(half) + 2}, l{half}, h{half}, 0x7351",
        ]
    return _block(lines, "a, b, c, d, n, h0, h1, l0, l1")


def _look_up(out: str, table: list[int]) -> list[str]:
    """Four bytes of `table` by the selectors in the lower half of `a` (16 entries: and `c`).

    The second word may be a constant of the instruction, the first needs a register: small tables use the second.
    """
    words = [sum(byte << (8 * i) for i, byte in enumerate(table[start : start + 4])) for start in range(0, 16, 4)]
    if len(table) <= 4:
        return [f"prmt.b32 {out}, 0, {words[0]:#x}, a"]
    first = f"prmt.b32 {out}, {words[0]:#x}, {words[1]:#x}, a"
    if len(table) <= 8:
        return [first]
    return [first, f"prmt.b32 d, {words[2]:#x}, {words[3]:#x}, a", f"prmt.b32 {out}, {out}, d, c"]


def _shifted(out: str, source: str, right: int) -> str:
    return f"shr.u32 {out}, {source}, {right}" if right >= 0 else f"shl.b32 {out}, {source}, {-right}"


def _repeated(nibble: int) -> str:
    return f"{nibble * 0x11111111:#010x}"
