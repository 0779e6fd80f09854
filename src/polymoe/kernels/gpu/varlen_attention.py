"""Paged attention by torch's `varlen_attn` (FlashAttention), where that is right and faster than our own kernel.

torch's documentation, read beside the checks of its C++ (`mha_varlen_fwd`), says what it takes: 16-bit dtypes, keys and
values of one size (a multiple of 8, at most 256), pages of a multiple of 256 tokens, no sinks and no softcap. All else
goes to our kernel untried. What it does take is tried once for each kind of layer on a small random batch against the
float32 reference, then timed beside our kernel (`autotune.choose`). Whatever goes wrong means our kernel.

In a CUDA graph nothing is tried or timed: a kind that is not known yet gets our kernel. The largest number of keys is
the table's width, not the batch's, so what is captured is valid for every step.
"""

import inspect
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polymoe.kernels.gpu.autotune import choose, row_bucket, typical_decode
from polymoe.kernels.gpu.paged_attention import paged_attention, paged_attention_torch

logger = logging.getLogger(__name__)

_PAGE = 256  # tokens; FlashAttention 2 takes multiples of it
_MOST_DIM = 256
Attention = Callable[..., Any]  # -> Tensor; torch's may give more, when asked to


def torch_varlen() -> Attention | None:
    """torch's function where it takes a block table (2.12 and newer)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "block_table" in inspect.signature(varlen_attn).parameters else None


def varlen_attention(
    varlen: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    max_query_len: int,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """`paged_attention` in the words of `varlen`, torch's `varlen_attn`; the other arguments as there."""
    grouped = query.shape[1] > key.shape[2]
    # A lone query sees every key whatever the bound on its right; told so, the library puts the heads of a group into
    # one tile. Only there are splits of the keys sound: elsewhere partial results are laid out for equal query lengths
    # (flash-attention issue 1217).
    tiled = max_query_len == 1 and window is None and grouped
    out: Tensor = varlen(
        query,
        key,
        value,
        query_start_loc,
        F.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0)),
        max_query_len,
        block_table.shape[1] * key.shape[1],
        scale=scaling,
        window_size=(-1 if window is None else window - 1, -1 if tiled else 0),
        enable_gqa=grouped,
        seqused_k=seq_lens,
        block_table=block_table.int(),
        num_splits=None if tiled else 1,
    )
    return out


def expressible(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether `varlen_attn` can say this; arguments as `paged_attention`."""
    dim = query.shape[2]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and dim == value.shape[3]
        and dim % 8 == 0
        and dim <= _MOST_DIM
        and key.shape[1] % _PAGE == 0
        and all(t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in t.stride()[:-1]) for t in (query, key, value))
        and softcap is None
        and sinks is None
    )


class ChosenAttention:
    """`paged_attention`, or torch's in its place; see the module docstring.

    Args:
        varlen: what has the signature of torch's `varlen_attn`; None: torch's own, if it takes block tables.
        device_type: where it is considered at all.
    """

    def __init__(self, varlen: Attention | None = None, device_type: str = "cuda") -> None:
        self._varlen, self._device_type = varlen or torch_varlen(), device_type
        self._right: dict[tuple[object, ...], bool] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_table: Tensor,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        *,
        max_query_len: int,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Arguments and result as `paged_attention`."""
        ours = partial(
            paged_attention, query, key, value, block_table, query_start_loc, seq_lens, max_query_len=max_query_len,
            scaling=scaling, window=window, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        decode = max_query_len == 1
        if (
            self._varlen is None
            or query.device.type != self._device_type
            or not expressible(query, key, value, softcap, sinks)
            or (decode and len(query) != len(seq_lens))  # a decode step has one row a sequence
            or len(query) == 0
        ):
            return ours()
        kind = (query.dtype, *query.shape[1:], *key.shape[1:3], window, block_table.shape[1] if decode else None)
        theirs: Attention = partial(varlen_attention, self._varlen)
        candidates: tuple[Attention, ...] = (paged_attention, theirs)
        options: dict[str, Any] = {"max_query_len": max_query_len, "scaling": scaling, "window": window}
        typical = cache(partial(typical_decode, key, block_table, seq_lens))

        def launch(attend: Attention) -> None:
            table, lens = typical() if decode else (block_table, seq_lens)
            attend(query, key, value, table, query_start_loc, lens, **options)

        try:
            if kind not in self._right:
                if query.is_cuda and torch.cuda.is_current_stream_capturing():
                    return ours()
                _check_trial(theirs, query, key, block_table.shape[1], decode, window)
                self._right[kind] = True
            if self._right[kind]:
                shape = (*kind, f"torch {torch.__version__}", row_bucket(len(query)))
                attend = choose("attention", shape, candidates, launch)
                out: Tensor = attend(query, key, value, block_table, query_start_loc, seq_lens, **options)
                return out
        except Exception as problem:  # of a library that we do not know; ours is always there
            self._right[kind] = False
            reason = " ".join(str(problem).split())
            logger.info("attention %s is not computed by torch's varlen_attn: %s", kind, reason)
        return ours()


def _check_trial(theirs: Attention, query: Tensor, key: Tensor, width: int, decode: bool, window: int | None) -> None:
    """Raises where `theirs` is not right for layers of these shapes."""
    case, options = _trial(query, key, max(2, width), decode, window)
    found, wanted = (attend(*case, **options).float() for attend in (theirs, paged_attention_torch))
    tolerance = 2 * torch.finfo(query.dtype).eps
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def _trial(
    query: Tensor, key: Tensor, width: int, decode: bool, window: int | None
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """A batch like those of a layer: blocks in disorder, lengths at and around their ends, NaN where nobody owns."""
    generator = torch.Generator().manual_seed(0)
    block, heads, dim = key.shape[1:]
    lens = [1, block, 2 * block - 3, 0] if decode else [7, block + 1, 2 * block - 5]
    queries = [1] * len(lens) if decode else [7, 1, min(block, 130)]
    pages = torch.randperm(2 * len(lens), generator=generator).view(len(lens), 2)
    cache = torch.randn(2, 2 * len(lens), block, heads, dim, generator=generator)
    for own, length in zip(pages, lens, strict=True):
        for place, page in enumerate(own.tolist()):
            cache[:, page, max(0, length - place * block) :] = float("nan")
    table = torch.zeros(len(lens), width, dtype=torch.int64)
    table[:, :2] = pages
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    rows = torch.randn(query.shape[1], sum(queries), dim, generator=generator).transpose(0, 1)
    floats = (t.to(query.device, query.dtype) for t in (rows, *cache))
    whole = (t.to(query.device) for t in (table, starts, torch.tensor(lens, dtype=torch.int32)))
    near = None if window is None else min(window, block // 2)
    return (*floats, *whole), {"max_query_len": max(queries), "scaling": dim**-0.5, "window": near}
