"""torch's `varlen_attn` in place of our attention: what it is told, and that anything wrong means our own kernel.

It runs on CUDA only. Here a plain function with its documented meaning stands in for it, 256 tokens a page.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton, here for its interpreter")

from torch._subclasses.fake_tensor import FakeTensorMode

from polymoe.kernels.gpu import varlen_attention as module
from polymoe.kernels.gpu.paged_attention import paged_attention_torch
from polymoe.kernels.gpu.varlen_attention import ChosenAttention, expressible, torch_varlen, varlen_attention

PAGE = 256
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # the interpreter cannot multiply in bfloat16


def documented(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool, seqused_k: torch.Tensor,
    block_table: torch.Tensor, num_splits: int | None,
) -> torch.Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn, from its documentation and the checks of its C++."""
    assert block_table.dtype == cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == torch.int32
    assert cu_seq_k.is_contiguous()
    assert seqused_k.is_contiguous()
    assert key.shape[1] % PAGE == 0
    assert enable_gqa or query.shape[1] == key.shape[2]
    assert cu_seq_k.diff().tolist() == seqused_k.tolist()
    assert max_k == block_table.shape[1] * key.shape[1]
    out = torch.zeros_like(query)
    left, right = window_size
    # Heads become queries where one query is alone, unbounded and grouped; splits are only right there.
    assert num_splits == 1 or (max_q == 1 and left < 0 and right < 0 and enable_gqa)
    for i, length in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seq_q[i]), int(cu_seq_q[i + 1]))
        count = rows.stop - rows.start
        assert count <= max_q
        if length == 0 or count == 0:
            continue
        keys, values = (t[block_table[i].long()].flatten(0, 1)[:length].float() for t in (key, value))
        keys, values = (t.repeat_interleave(query.shape[1] // key.shape[2], 1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[rows].float(), keys) * scale
        here = torch.arange(count)[:, None] + length - count  # aligned at the end
        distance = here - torch.arange(length)
        seen = torch.ones(count, length, dtype=torch.bool)
        if left >= 0:
            seen &= distance <= left
        if right >= 0:
            seen &= -distance <= right
        scores = scores.masked_fill(~seen.to(scores.device), float("-inf"))
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(query.dtype)
    return out


def batch(queries: list[int], lens: list[int], heads: tuple[int, int] = (4, 2), width: int = 3) -> tuple[Any, ...]:
    """Query as the model gives it, a cache with NaN where nobody owns, a table of int64."""
    generator = torch.Generator().manual_seed(sum(lens))
    pages = torch.randperm(len(lens) * width, generator=generator).view(len(lens), width)
    cache = torch.randn(2, len(lens) * width, PAGE, heads[1], 16, generator=generator)
    for own, length in zip(pages, lens, strict=True):
        for place, page in enumerate(own.tolist()):
            cache[:, page, max(0, length - place * PAGE) :] = float("nan")
    query = torch.randn(heads[0], sum(queries), 16, generator=generator).transpose(0, 1)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    tensors = (query.to(HALF), *cache.to(HALF), pages, starts, torch.tensor(lens, dtype=torch.int32))
    return tuple(t.to(DEVICE) for t in tensors)


MIXED = ([5, 1, 40, 1], [5, 300, 512, 700])
DECODE = ([1, 1, 1, 1], [1, 256, 700, 0])


@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 20, 300])
@pytest.mark.parametrize("lengths", [MIXED, DECODE])
def test_arguments_say_what_ours_do(lengths: Any, window: int | None, heads: tuple[int, int]) -> None:
    args = batch(lengths[0], lengths[1], heads)
    options = {"max_query_len": max(lengths[0]), "scaling": 0.3, "window": window}
    found = varlen_attention(documented, *args, **options)
    torch.testing.assert_close(found, paged_attention_torch(*args, **options), atol=2e-2, rtol=2e-2)


class Library:
    """Stands for torch's function: counts its calls, and is wrong in one way."""

    def __init__(self, mistake: str = "") -> None:
        self.calls, self.mistake = 0, mistake

    def __call__(self, *args: Any, window_size: tuple[int, int], **options: Any) -> torch.Tensor:
        self.calls += 1
        if self.mistake == "raises" or (self.mistake == "raises later" and self.calls > 1):
            raise RuntimeError("page size must be something else")
        if self.mistake == "is not causal":
            window_size = (window_size[0], -1)
            options["num_splits"] = 1
        return documented(*args, window_size=window_size, **options)


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Timing without a GPU: the second candidate wins. The shapes that it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def choose(kind: str, shape: Any, candidates: Any, launch: Any) -> Any:
        asked.append((kind, *shape))
        launch(candidates[0])
        launch(candidates[1])
        return candidates[1]

    monkeypatch.setattr(module, "choose", choose)
    return asked


@pytest.mark.parametrize("lengths", [MIXED, DECODE])
def test_a_right_and_faster_library_is_used(lengths: Any, fastest: list[Any]) -> None:
    library = Library()
    attend = ChosenAttention(library, DEVICE)
    args: Any = batch(*lengths)
    options: dict[str, Any] = {"max_query_len": max(lengths[0]), "scaling": 0.3, "window": 30}
    for calls in (3, 5):  # tried, timed and used; later timed and used: the real choice remembers
        found = attend(*args, **options)
        assert library.calls == calls
        torch.testing.assert_close(found, paged_attention_torch(*args, **options), atol=2e-2, rtol=2e-2)
    assert len(set(fastest)) == 1


@pytest.mark.usefixtures("fastest")
@pytest.mark.parametrize(("mistake", "calls"), [("is not causal", 1), ("raises", 1), ("raises later", 2)])
def test_a_wrong_library_is_not_asked_again(mistake: str, calls: int, caplog: pytest.LogCaptureFixture) -> None:
    library = Library(mistake)
    attend = ChosenAttention(library, DEVICE)
    args: Any = batch(*MIXED)
    options: dict[str, Any] = {"max_query_len": 40, "scaling": 0.3}
    caplog.set_level("INFO")
    for _ in range(3):
        found = attend(*args, **options)
        torch.testing.assert_close(found, paged_attention_torch(*args, **options), atol=2e-2, rtol=2e-2)
    assert library.calls == calls
    assert len([record for record in caplog.records if "varlen_attn" in record.message]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the two are timed")
def test_ours_serves_where_nothing_is_timed() -> None:
    library = Library()
    ChosenAttention(library, DEVICE)(*batch(*MIXED), max_query_len=40, scaling=0.3)
    assert library.calls == 1  # tried, and not used


def test_what_it_cannot_say_is_not_tried() -> None:
    library = Library("raises")
    attend = ChosenAttention(library, DEVICE)
    query, key, value, *rest = batch(*DECODE)
    options: dict[str, Any] = {"max_query_len": 1, "scaling": 0.3}
    assert expressible(query, key, value, None, None)
    assert not expressible(query[..., :12], key[..., :12], value[..., :12], None, None)
    attend(query, key, value, *rest, **options, softcap=3.0)
    attend(query, key, value, *rest, **options, sinks=torch.zeros(4, device=DEVICE))
    attend(query.float(), key.float(), value.float(), *rest, **options)
    attend(query, key, value[..., :8].contiguous(), *rest, **options)
    small_key, small_value = (t.unflatten(1, (-1, 16)).flatten(0, 1) for t in (key, value))
    table = (rest[0][:, :, None] * (PAGE // 16) + torch.arange(PAGE // 16, device=DEVICE)).flatten(1)
    attend(query, small_key, small_value, table, *rest[1:], **options)
    ChosenAttention(library, "somewhere else")(query, key, value, *rest, **options)
    assert library.calls == 0


def test_torchs_own_takes_these_arguments() -> None:
    """Shapes and dtypes only, without a device: its checks and its registered fake."""
    varlen = torch_varlen()
    if varlen is None:
        pytest.skip("this torch's varlen_attn knows no block table")
    for lengths in (MIXED, DECODE):
        real = batch(*lengths)
        with FakeTensorMode() as mode:
            args = [mode.from_tensor(t) for t in real]
            found = varlen_attention(varlen, *args, max_query_len=max(lengths[0]), scaling=0.3, window=30)
            assert found.shape == args[0].shape
            assert found.dtype == HALF


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch_varlen() is None, reason="needs CUDA and torch 2.12")
@pytest.mark.parametrize("lengths", [MIXED, DECODE])
@pytest.mark.parametrize("window", [None, 20])
def test_torchs_own_is_right(lengths: Any, window: int | None) -> None:
    args, options = batch(*lengths), {"max_query_len": max(lengths[0]), "scaling": 0.3, "window": window}
    varlen = torch_varlen()
    assert varlen is not None
    found = varlen_attention(varlen, *args, **options)
    torch.testing.assert_close(found, paged_attention_torch(*args, **options), atol=2e-2, rtol=2e-2)
