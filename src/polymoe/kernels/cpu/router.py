"""The router of a layer: which experts a token goes to, and with which weights.

    l_t = x_t W_v(t),   the experts of the K largest; scores in float32, of three kinds (`Scoring`)

Letters: T tokens, H hidden, E experts, K chosen ones, R versions of the weight, G groups of tokens that use one.
"""

from enum import IntEnum

import torch
from torch import Tensor

from polymoe.native.library import cpu_kernels, kernel_threads, why_no_kernels

Choice = tuple[Tensor, Tensor, Tensor]  # logits [T, E] as x, scores [T, K] float32, experts [T, K] int64

_LANES = 32


class Scoring(IntEnum):
    """What a token's K scores are: their share of the softmax over all experts, that share divided by the sum of the K,
    or a softmax over the K alone. As in router.cpp."""

    OF_ALL = 0
    NORMALISED = 1
    OF_CHOSEN = 2


def choose(logits: Tensor, top_k: int, scoring: Scoring) -> Choice:
    """The reference, from the logits on."""
    if scoring == Scoring.OF_CHOSEN:
        best, experts = torch.topk(logits.float(), top_k, dim=-1)
        return logits, torch.softmax(best, dim=-1), experts
    scores, experts = torch.topk(torch.softmax(logits.float(), dim=-1), top_k, dim=-1)
    return logits, scores / scores.sum(dim=-1, keepdim=True) if scoring == Scoring.NORMALISED else scores, experts


def why_not_fast_router(dtype: torch.dtype, width: int) -> str:
    """Why the compiled kernel does not route tokens of this width on a CPU; empty where it does."""
    if dtype != torch.bfloat16:
        return str(dtype).removeprefix("torch.")
    return why_no_kernels() or (f"{width} values, no multiple of {_LANES}" if width % _LANES else "")


def fast_router(x: Tensor, stack: Tensor, ids: Tensor, starts: Tensor, top_k: int, scoring: Scoring) -> Choice:
    """The compiled kernel (router.cpp), for what `why_not_fast_router` has no reason against.

    Of equal scores it takes the expert with the lower index.

    Args:
        x: `[T, H]`, contiguous. stack: `[R, E, H]`, contiguous.
        ids, starts: `[G]` and `[G + 1]` int64: group g is rows `starts[g] : starts[g + 1]` and uses `stack[ids[g]]`.
    """
    kernels = cpu_kernels()
    assert kernels is not None
    assert x.dtype == stack.dtype == torch.bfloat16
    assert x.is_contiguous()
    assert stack.is_contiguous()
    assert x.shape[1] % _LANES == 0
    experts = stack.shape[1]
    logits = x.new_empty(len(x), experts)
    scores, chosen = torch.empty(len(x), top_k), torch.empty(len(x), top_k, dtype=torch.int64)
    kernels.polymoe_router_bf16(
        x.data_ptr(), x.shape[1], experts, len(ids), ids.data_ptr(), starts.data_ptr(), stack.data_ptr(), top_k,
        scoring, logits.data_ptr(), scores.data_ptr(), chosen.data_ptr(), kernel_threads(),
    )  # fmt: skip
    return logits, scores, chosen
