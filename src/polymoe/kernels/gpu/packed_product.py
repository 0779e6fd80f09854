"""A tile of rows times one packed matrix, decoded in registers: the inner loops of the experts' kernel.

    acc[m, n] += f_m · Σ_groups scale[n, g] · Σ_{k in g} x[m, k] · level(code[n, k])

A 32-byte block of a plane gives 32 neighbouring values a shift (`polymoe.quant.format`), so a tile of codes
`[lanes, BN]` gives, shift by shift, tiles of weights whose inputs are columns of x that a strided load finds. Nothing
is shuffled between registers. Scales multiply partial sums, not values.

    lanes:      |--- block 0: 32 bytes ---|--- block 1 ---|    shift t of block b is inputs b · unit + 32 t … + 31
    two planes: the wide one's blocks are loaded when the narrow one's shift reaches them (3 bits: 2 + 1)

Levels: in bfloat16 by `packed_asm`. Elsewhere int8 and fp8 by arithmetic, one and two bits by selection, others from
the format's table in x's dtype, a few lines that stay in the first cache. In bfloat16 a level of a table has 8
significant bits, a relative error of at most 2⁻⁹.
"""

import triton
import triton.language as tl

STORED = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
ONE_BIT = tl.constexpr(3)
TWO_BITS = tl.constexpr(4)
TABLE = tl.constexpr(5)
EXACT = tl.constexpr(6)


@triton.jit
def stored_product(
    acc, x_rows, row_ok, weight_rows, INPUTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """acc `[BM, BN]` + x wᵀ; `x_rows` `[BM]` and `weight_rows` `[BN]` point at the first value of each row."""
    lane = tl.arange(0, BLOCK_K)
    for k0 in range(0, INPUTS, BLOCK_K):
        k = k0 + lane
        if INPUTS % BLOCK_K == 0:
            if BLOCK_M >= 64:  # the last row's values stand in for those beyond it: no mask in the fast loop
                x = tl.load(x_rows[:, None] + k[None, :])
            else:
                x = tl.load(x_rows[:, None] + k[None, :], mask=row_ok[:, None], other=0.0)
            weight = tl.load(weight_rows[None, :] + k[:, None])
        else:
            inside = k < INPUTS
            x = tl.load(x_rows[:, None] + k[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weight_rows[None, :] + k[:, None], mask=inside[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    return acc


@triton.jit
def _values(codes, levels_ptr, dtype: tl.constexpr, KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The codes' levels."""
    if KIND == FP8:
        # e4m3 in the upper bits of a float16 is the value / 256, exactly, subnormals too
        half = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
        return (half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)
    elif KIND == INT8:  # noqa: RET505  (what follows a return would be compiled too)
        # 2^23 + code is the float32 with the code as its last bits: cheaper than a conversion
        return ((codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0).to(dtype)
    elif KIND == ONE_BIT:
        return tl.where(codes != 0, HIGH, LOW).to(dtype)
    elif KIND == TWO_BITS:
        odd = (codes & 1) != 0
        upper = (codes & 2) != 0
        return tl.where(upper, tl.where(odd, HIGH, LOW), tl.where(odd, -LOW, -HIGH)).to(dtype)
    else:
        return tl.load(levels_ptr + codes.to(tl.int32))


@triton.jit
def _plane_codes(code_rows, k, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr):
    """uint8 `[K, BN]`: one plane's bits of any inputs `k`, a short last block's among them."""
    PER_BLOCK: tl.constexpr = 256 // WIDTH
    WHOLE: tl.constexpr = INPUTS // PER_BLOCK
    LAST: tl.constexpr = ((INPUTS % PER_BLOCK) * WIDTH + 7) // 8
    block = k // PER_BLOCK
    within = k % PER_BLOCK
    size = tl.where(block < WHOLE, 32, LAST if LAST > 0 else 32)
    byte = FIRST + block * 32 + within % size
    shift = (within // size * WIDTH).to(tl.uint8)
    found = tl.load(code_rows[None, :] + byte[:, None], mask=inside[:, None], other=0)
    return (found >> shift[:, None]) & (2**WIDTH - 1)


@triton.jit
def _codes(wide, narrow, SHIFT: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr):
    """One tile's codes from its planes' bytes."""
    codes = (wide >> SHIFT) & (2**WIDE - 1)
    if NARROW > 0:
        codes = codes | (((narrow >> (TILE * NARROW)) & (2**NARROW - 1)) << WIDE)
    return codes


@triton.jit
def _pair(
    wide, narrow, levels_ptr, dtype: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, LOAD: tl.constexpr, PLACE: tl.constexpr, STEP0: tl.constexpr,
    STEP1: tl.constexpr, STEP2: tl.constexpr, STEP3: tl.constexpr,
):  # fmt: skip
    """The weights of tiles LOAD · 2 d + PLACE and d later, d = 4 / WIDE: their codes are four bits apart in `wide`."""
    APART: tl.constexpr = 4 // WIDE
    TILE: tl.constexpr = LOAD * 2 * APART + PLACE
    STEP: tl.constexpr = LOAD * APART + PLACE
    LINES: tl.constexpr = STEP0 if STEP == 0 else STEP1 if STEP == 1 else STEP2 if STEP == 2 else STEP3
    if LINES == "":
        codes = _codes(wide, narrow, PLACE * WIDE, TILE, WIDE, NARROW)
        first = _values(codes, levels_ptr, dtype, KIND, LOW, HIGH)
        codes = _codes(wide, narrow, PLACE * WIDE + 4, TILE + APART, WIDE, NARROW)
        second = _values(codes, levels_ptr, dtype, KIND, LOW, HIGH)
    elif NARROW == 0:
        first, second = tl.inline_asm_elementwise(LINES, "=r,=r,=r,=r,r", [wide], (tl.bfloat16, tl.bfloat16), True, 4)
    else:
        first, second = tl.inline_asm_elementwise(
            LINES, "=r,=r,=r,=r,r,r", [wide, narrow], (tl.bfloat16, tl.bfloat16), True, 4
        )
    return first, second


@triton.jit
def packed_product(
    acc, x_rows, row_ok, factor, code_rows, scale_rows, levels_ptr,
    INPUTS: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, GROUP: tl.constexpr,
    LANES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, STEP0: tl.constexpr, STEP1: tl.constexpr,
    STEP2: tl.constexpr, STEP3: tl.constexpr, HAS_FACTOR: tl.constexpr,
):  # fmt: skip
    """acc `[BM, BN]` + factor · x wᵀ.

    Args:
        x_rows: `[BM]` pointers at the rows of x; row_ok `[BM]`: others count as zero. factor: float32 `[BM]`.
        code_rows, scale_rows: `[BN]` pointers at each row's first code and scale.
        WIDE, NARROW: bits of the planes, NARROW 0 where there is one. GROUP: inputs that share a scale.
        LANES: bytes of the narrowest plane loaded at once, a multiple of 32; 32 where a chunk would span groups.
        STEP0 …: `packed_asm.assembly` of the format, or "": then the levels are `_values`.
    """
    LEAST: tl.constexpr = NARROW if NARROW > 0 else WIDE
    UNIT: tl.constexpr = 256 // LEAST
    CHUNK: tl.constexpr = LANES // 32 * UNIT
    LOADS: tl.constexpr = WIDE // LEAST
    APART: tl.constexpr = 4 // WIDE if WIDE < 8 else 1  # tiles between two whose codes are four bits apart
    SECOND: tl.constexpr = (INPUTS * WIDE + 7) // 8
    ONE_SCALE: tl.constexpr = GROUP % CHUNK == 0 or GROUP >= INPUTS
    tl.static_assert(ONE_SCALE or LANES == 32, "a chunk that spans groups needs 32 lanes")
    dtype: tl.constexpr = x_rows.dtype.element_ty
    lane = tl.arange(0, LANES)
    x_lane = lane // 32 * UNIT + lane % 32
    wide_lane = lane // 32 * (32 * LOADS) + lane % 32

    for k0 in range(0, INPUTS // CHUNK * CHUNK, CHUNK):
        part = tl.zeros(acc.shape, tl.float32)
        narrow = tl.zeros((1, 1), tl.uint8)
        if NARROW > 0:
            narrow = tl.load(code_rows[None, :] + (SECOND + k0 * NARROW // 8 + lane)[:, None])
        for q in tl.static_range(LOADS):
            wide = tl.load(code_rows[None, :] + (k0 * WIDE // 8 + q * 32 + wide_lane)[:, None])
            if WIDE == 8:
                if STEP0 != "":
                    weight = tl.inline_asm_elementwise(STEP0, "=r,=r,r", [wide], tl.bfloat16, True, 4)
                else:
                    weight = _values(wide, levels_ptr, dtype, KIND, LOW, HIGH)
                part = _add_tile(part, x_rows, row_ok, k0, x_lane, weight, scale_rows, GROUP, ONE_SCALE)
            else:
                for p in tl.static_range(APART):
                    first, second = _pair(
                        wide, narrow, levels_ptr, dtype, KIND, WIDE, NARROW, LOW, HIGH, q, p,
                        STEP0, STEP1, STEP2, STEP3,
                    )  # fmt: skip
                    column = k0 + 32 * (q * 2 * APART + p)
                    part = _add_tile(part, x_rows, row_ok, column, x_lane, first, scale_rows, GROUP, ONE_SCALE)
                    column += 32 * APART
                    part = _add_tile(part, x_rows, row_ok, column, x_lane, second, scale_rows, GROUP, ONE_SCALE)
        if ONE_SCALE:
            scale = tl.load(scale_rows + k0 // GROUP).to(tl.float32)
            part = part * scale[None, :]
        if HAS_FACTOR:
            part = part * factor[:, None]
        acc += part

    if INPUTS % CHUNK != 0:  # what is left of a row: each value by itself; 32 inputs never span groups
        for k0 in range(INPUTS // CHUNK * CHUNK, INPUTS, 32):
            k = k0 + tl.arange(0, 32)
            inside = k < INPUTS
            codes = _plane_codes(code_rows, k, inside, 0, WIDE, INPUTS)
            if NARROW > 0:
                codes = codes | (_plane_codes(code_rows, k, inside, SECOND, NARROW, INPUTS) << WIDE)
            x = tl.load(x_rows[:, None] + k[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
            weight = _values(codes, levels_ptr, dtype, KIND, LOW, HIGH)
            scale = tl.load(scale_rows + k0 // GROUP).to(tl.float32)
            part = tl.dot(x, weight, input_precision="ieee") * scale[None, :]
            if HAS_FACTOR:
                part = part * factor[:, None]
            acc += part
    return acc


@triton.jit
def _add_tile(
    part, x_rows, row_ok, column, x_lane, weight, scale_rows,
    GROUP: tl.constexpr, ONE_SCALE: tl.constexpr,
):  # fmt: skip
    """part + x wᵀ for the inputs `column + x_lane`; scaled here unless the whole chunk has one scale."""
    x = tl.load(x_rows[:, None] + (column + x_lane)[None, :], mask=row_ok[:, None], other=0.0)
    if ONE_SCALE:
        part = tl.dot(x, weight, part, input_precision="ieee")
    else:
        scale = tl.load(scale_rows + column // GROUP).to(tl.float32)
        part += tl.dot(x, weight, input_precision="ieee") * scale[None, :]
    return part
