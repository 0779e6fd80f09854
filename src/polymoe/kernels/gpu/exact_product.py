"""A tile of rows times what a lossless delta changes of one matrix: the inner loop of the experts' kernel for `exact`.

    acc[m, n] += Σ_k x[m, k] · (W[n, k] − B[n, k]) where bit (n, k) is set       W: the new values, B: the stored base

New values lie row after row, in the order of the bits, so the place of one is where its row's begin plus the set bits
before it. Within a tile those are counted by a running sum:

    bits of row n:  |0 1 1 0 … 0 1|0 0 1 0 … |        values:  … |a b … c|d …| …
                    |-- step k0 --|- step k1 -          first of row n ↑   ↑ first + the bits of step k0

A difference of two neighbouring bfloat16 numbers is one itself, so the sum is as good as the variant's own product.
Bytes moved: I / 8 a row, the new values, and the base at the set bits, which the cache still holds.
"""

import triton
import triton.language as tl


@triton.jit
def exact_product(
    acc, x_rows, row_ok, bit_rows, first, values_ptr, base_rows, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """acc `[BM, BN]` + x (W − B)ᵀ.

    Args:
        x_rows: `[BM]` pointers at the rows of x; row_ok `[BM]`: others count as zero.
        bit_rows, base_rows: `[BN]` pointers at each row's first byte of bits, and first value of the base.
        first: int64 `[BN]`, where each row's new values begin in `values_ptr`.
    """
    dtype: tl.constexpr = x_rows.dtype.element_ty
    lane = tl.arange(0, BLOCK_K)
    for k0 in range(0, INPUTS, BLOCK_K):
        k = k0 + lane
        inside = k < INPUTS
        byte = tl.load(bit_rows[None, :] + (k // 8)[:, None], mask=inside[:, None], other=0).to(tl.int32)
        bit = (byte >> (k % 8)[:, None]) & 1
        bit = tl.where(inside[:, None], bit, 0)
        is_set = bit != 0
        place = first[None, :] + (tl.cumsum(bit, 0) - bit)
        new = tl.load(values_ptr + place, mask=is_set, other=0.0).to(tl.float32)
        old = tl.load(base_rows[None, :] + k[:, None], mask=is_set, other=0.0).to(tl.float32)
        x = tl.load(x_rows[:, None] + k[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(x, (new - old).to(dtype), acc, input_precision="ieee")
        first += tl.sum(bit, 0)
    return acc
