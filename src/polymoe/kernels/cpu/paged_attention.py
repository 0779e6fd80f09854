"""Attention over the paged cache, each query token by itself: the compiled kernel (paged_attention.cpp)."""

import torch

from polymoe.native.library import cpu_kernels, kernel_threads, why_no_kernels


def why_not_attention(dtype: torch.dtype, key_dim: int, value_dim: int) -> str:
    """Why the compiled kernel does not compute attention of these sizes on a CPU; empty where it does."""
    if dtype != torch.bfloat16:
        return str(dtype).removeprefix("torch.")
    if key_dim % 32 or value_dim % 16:
        return f"heads of {key_dim} and {value_dim} values, no multiples of 32 and 16"
    return "" if cpu_kernels() is not None else why_no_kernels()


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    sequence: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    window: int | None,
    start: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scaling · q kᵀ + bias) v of each token over its own sequence's blocks, without gathering them.

    Args:
        query: `[T, Hq, D]`, contiguous.
        key, value: the cache of one layer, `[blocks, block_size, Hk, D]` and `[…, Dv]`.
        block_table: `[B, M]` int64, contiguous.
        sequence: `[T]` int64, the token's row of the block table.
        visible: `[T]` int64, how many tokens of the sequence it sees: its position + 1.
        window: only the last `window` of these; None: all.
        start: `[T]` int64, less than `visible`; None: without a window the sequence's first token. Not with a window.
        bias: `[T, Hq, L]` float32, contiguous, with an entry for each token that is seen, the first one's first.

    Returns: `[T, Hq, Dv]`. Only for what `why_not_attention` has no reason against; elsewhere torch, on what it has
    gathered, gives the same up to rounding.
    """
    kernels = cpu_kernels()
    assert kernels is not None
    assert query.dtype == torch.bfloat16
    assert query.shape[2] % 32 == value.shape[3] % 16 == 0
    assert query.is_contiguous()
    assert block_table.is_contiguous()
    assert start is None or window is None
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    tokens, q_heads, dim = query.shape
    out = query.new_empty(tokens, q_heads, value.shape[3])
    kernels.polymoe_paged_attention_bf16(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), block_table.data_ptr(), block_table.shape[1],
        sequence.data_ptr(), visible.data_ptr(), None if start is None else start.data_ptr(),
        None if bias is None else bias.data_ptr(), 0 if bias is None else bias.shape[2], window or 0, tokens, q_heads,
        key.shape[2], dim, value.shape[3], key.shape[1], scaling, out.data_ptr(), kernel_threads(),
    )  # fmt: skip
    return out
