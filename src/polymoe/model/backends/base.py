"""What computes: the interface that a model's parts call, whatever it runs on.

A backend is chosen once, when a model is loaded (`choose.py`). What it cannot do of one call it gives to torch itself;
which operations these are it says beforehand (`why_not_…`, `PreparedExperts.path`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from polymoe.kernels.cpu.compressed_layer import CompressedLayer, Weights
from polymoe.kernels.cpu.decoder import Turns
from polymoe.kernels.cpu.packed_rows import PackedRows
from polymoe.kernels.cpu.router import Choice, Scoring
from polymoe.model.batch.batch import AttentionBatch, ForwardBatch, RowMap, Segments
from polymoe.protocol.fast_path import FastPath

Cache = tuple[torch.Tensor, torch.Tensor]  # key and value of one layer, [blocks, block_size, Hk, D / Dv]


@dataclass(frozen=True)
class ScoreOptions:
    """What becomes of q kᵀ before the softmax.

    window: only the last `window` tokens are seen. softcap: scores become `softcap · tanh(score / softcap)`.
    sinks: `[T, Hq]`, of one more key that takes probability and gives nothing.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class TokenSpans:
    """What each of T tokens sees: tokens `start : visible` of its own sequence, which is a row of the block table.

    start: None: from the first. bias: `[T, Hq, L]` float32, added to the scores from `start` on; with it only.
    """

    block_table: torch.Tensor  # [B, M]
    sequence: torch.Tensor  # [T]
    visible: torch.Tensor  # [T]
    start: torch.Tensor | None = None  # [T]
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class CachedLayer:
    """What one layer attends to: its cache, of which one sees the last `window` tokens (None: all)."""

    cache: Cache
    window: int | None


class AbsentExperts(Protocol):
    """A layer's experts that are not on the device. `physical`: −1 − h for expert h of the host's."""

    def announce(self, physical: torch.Tensor) -> None:
        """The layer needs those of these ids that are absent, soon."""

    def weights_of(self, physical: int) -> Weights:
        """The tensors of one expert, absent or not, on the device, as the stock module has them."""

    def on_host(self, physical: torch.Tensor) -> torch.Tensor:
        """`[n]` absent ids, one a (token, expert) pair -> `[n]` bool: which the host computes."""

    def host_weights_of(self, physical: int) -> Weights:
        """The tensors of one absent expert, on the host."""


@dataclass(frozen=True)
class Routed:
    """Where T tokens of a step go."""

    token_variant: torch.Tensor  # [T]
    experts: torch.Tensor  # [T, K], of E
    gate: torch.Tensor  # [T, K]


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One layer's physical experts as a backend is told of them.

    table, delta, sign: `[V, E]`, the layer's; table −1 − h for absent expert h. Changed in place, if at all.
    weights: by name `[P, …]`, or packed pools. transposed: whether stored experts are `[in, out]`.
    dtype: what is computed in. num_absent: how many different absent experts the table names at most.
    """

    table: torch.Tensor
    delta: torch.Tensor | None
    sign: torch.Tensor | None
    weights: Weights | CompressedLayer
    transposed: bool
    dtype: torch.dtype
    num_absent: int
    absent: AbsentExperts


class PreparedExperts(Protocol):
    """One layer's experts, with all that is made once for them.

    path: what the resident ones run on. follows_tables: whether only the device looks at the tables, so that they may
    change between two replays of a captured step.
    """

    @property
    def path(self) -> FastPath: ...

    @property
    def follows_tables(self) -> bool: ...

    def __call__(self, hidden: torch.Tensor, routed: Routed) -> torch.Tensor:
        """`hidden [T, H]` -> `[T, H]` in its dtype."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A stock module's weight: its versions `[R, …]`, stored or packed, and which variant has which.

    row_map: None where all have the one there is.
    """

    rows: torch.Tensor | PackedRows
    row_map: RowMap | None


@dataclass(frozen=True, eq=False)
class AttentionParts:
    """A stock attention module whose forward is known to be: projections, perhaps norms, rotary embedding of whole
    halves, attention with `scaling`, projection.

    query, key, value, output: (weight, bias) of its linear maps. query_norm, key_norm: (weight, epsilon), of each head
    or of a token's all heads at once, as wide as the weight is.
    """

    query: tuple[Weight, Weight | None]
    key: tuple[Weight, Weight | None]
    value: tuple[Weight, Weight | None]
    output: tuple[Weight, Weight | None]
    query_norm: tuple[Weight, float] | None
    key_norm: tuple[Weight, float] | None
    head_dim: int
    scaling: float


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """A stock decoder layer whose forward is known to be: `h = x + c attention(norm(x))`, `h + c experts(norm(h))`.

    attention: what `Backend.prepare_attention` made. first, second: (weight, epsilon) of the norms before it and before
    the router. router: its weight, how many experts it chooses, its scores and their dtype. multiplier: c.
    """

    attention: "PreparedAttention"
    first: tuple[Weight, float]
    second: tuple[Weight, float]
    router: tuple[Weight, int, Scoring, torch.dtype]
    experts: PreparedExperts
    multiplier: float


class PreparedAttention(Protocol):
    """An attention layer from hidden states to hidden states."""

    def __call__(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], batch: ForwardBatch, layer: CachedLayer
    ) -> torch.Tensor:
        """`hidden [T, H]` with cosines and sines `[T, R]` -> `[T, H]`."""


class PreparedDecoderLayer(Protocol):
    """One decoder layer from hidden states to hidden states."""

    def __call__(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], batch: ForwardBatch, layer: CachedLayer
    ) -> torch.Tensor:
        """As a `PreparedAttention`."""


@dataclass(frozen=True, eq=False)
class PassParts:
    """A stock model whose forward is known to be: embeddings times `multiplier`, layers, a norm, a linear map.

    layers: what `Backend.prepare_decoder_layer` made. norm: (weight, epsilon).
    """

    layers: Sequence[PreparedDecoderLayer]
    embedding: Weight
    multiplier: float
    norm: tuple[Weight, float]
    head: Weight


class PreparedPass(Protocol):
    """A whole pass from tokens to logits. looks_up: whether it is given ids, else hidden states before layer 0.
    has_head: whether it gives logits, else what the last linear map is to be given."""

    looks_up: bool
    has_head: bool

    def __call__(
        self,
        tokens: torch.Tensor,
        turns: Turns,
        kept: torch.Tensor,
        batch: ForwardBatch,
        caches: tuple[CachedLayer, ...],
    ) -> torch.Tensor:
        """Ids `[T]` or hidden states `[T, H]` -> of rows `kept [R]` logits `[R, O]` or states `[R, H]`; `caches`: one a
        layer, the same object for as long as these are."""


class Backend(ABC):
    """See the module docstring.

    runs_on: what `FastPath` calls its own way. pads_steps: whether decode steps are padded to few sizes and prompts to
    none, so that a step can be captured; there is a KV block for what the padding writes. keeps_tables_on_device:
    whether operations read row maps, lengths and tables on the device, where they are changed in place, and nothing
    waits for it. holds_outputs_first: whether stored experts are turned over to `[out, in]` when they are loaded.
    takes_one_exact_pool: whether a layer's lossless deltas have to be in one pool. has_own_threads: whether large
    products run on threads that torch does not know of.
    """

    runs_on: ClassVar[str]
    pads_steps: ClassVar[bool] = False
    keeps_tables_on_device: ClassVar[bool] = False
    holds_outputs_first: ClassVar[bool] = True
    takes_one_exact_pool: ClassVar[bool] = False
    has_own_threads: bool = False

    @property
    def multiplies_on(self) -> str:
        """What `FastPath` calls its way of products with weights."""
        return self.runs_on

    @abstractmethod
    def linear(self, x: torch.Tensor, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """`x [T, I]` times each token's own row of `stack [R, O, I]` -> `[T, O]`."""

    @abstractmethod
    def packed_linear(self, x: torch.Tensor, rows: PackedRows, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """The same with packed rows."""

    @abstractmethod
    def rows_of_tokens(self, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """Each token's own row of `stack [R, …]` -> `[T, …]`, perhaps a view."""

    @abstractmethod
    def rms_norm(
        self, x: torch.Tensor, weights: torch.Tensor, stacked: tuple[Segments, RowMap] | None, eps: float
    ) -> torch.Tensor:
        """The norm of each row of `x [..., H]`, of which each token has the same number, with its row of
        `weights [R, H]` in x's dtype; stacked None: with the first."""

    @abstractmethod
    def attention(self, query: torch.Tensor, cache: Cache, batch: AttentionBatch, scores: ScoreOptions) -> torch.Tensor:
        """`query [T, Hq, D]` over one layer's cache, each token sees what is before it -> `[T, Hq, Dv]`."""

    @abstractmethod
    def span_attention(self, query: torch.Tensor, cache: Cache, spans: TokenSpans) -> torch.Tensor:
        """softmax(q kᵀ + bias) v of each of `query [T, Hq, D]` over its span -> `[T, Hq, Dv]`."""

    def prepare_attention(self, _parts: AttentionParts) -> PreparedAttention | None:
        """A whole attention layer in one call; None: the stock module calls the operations above one by one."""
        return None

    def prepare_decoder_layer(self, _parts: DecoderParts) -> PreparedDecoderLayer | None:
        """A whole decoder layer in one call; None: the stock module calls its parts one by one."""
        return None

    def prepare_pass(self, _parts: PassParts) -> PreparedPass | None:
        """A whole pass in one call; None: the stock model calls its layers one by one."""
        return None

    def route(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        stacked: tuple[Segments, RowMap] | None,
        top_k: int,
        scoring: Scoring,
    ) -> Choice:
        """The experts of each row of `x [T, H]` by its row of `weights [R, E, H]`; stacked None: by the first.

        Only where `why_not_route` has no reason against it.
        """
        raise NotImplementedError

    def why_not_route(self, _dtype: torch.dtype, _width: int) -> str:
        """Why the stock module routes tokens of this width; empty where it does not."""
        return "the stock module's operations"

    def laid_out(self, _module: Any, weights: CompressedLayer, _dtype: torch.dtype) -> CompressedLayer:
        """`weights` of the stock experts `module` as this backend reads them, in place: asked once, when a layer is
        loaded, before `prepare_experts`."""
        return weights

    def laid_out_rows(self, rows: PackedRows, whole: bool) -> PackedRows:  # noqa: ARG002
        """The same of a matrix beside the experts that is multiplied by and not looked up in. whole: False where rows
        come and go."""
        return rows

    @abstractmethod
    def prepare_experts(self, module: Any, layer: ExpertLayer) -> PreparedExperts:
        """One layer's experts, which the stock experts `module` stands for."""

    @abstractmethod
    def why_not_linear(self, dtype: torch.dtype, inputs: int) -> str:
        """Why torch multiplies by stacks with so many inputs; empty where it does not."""

    @abstractmethod
    def why_not_packed_linear(self, dtype: torch.dtype, rows: PackedRows) -> str:
        """The same of packed rows."""

    @abstractmethod
    def why_not_norm(self, dtype: torch.dtype, width: int) -> str:
        """Why torch computes norms of this width; empty where it does not."""

    @abstractmethod
    def why_not_attention(self, dtype: torch.dtype, key_dim: int, value_dim: int, extras: Sequence[str]) -> str:
        """Why torch attends, with heads of these sizes and "sinks" or "softcap"; empty where it does not."""
