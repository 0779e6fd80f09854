"""One sequence as the engine sees it while it lives. Progress is one number: `num_computed_tokens`."""

import itertools
import sys
import time
from dataclasses import dataclass, field

import torch

from polymoe.engine.request import EngineRequest, TokenLogprobs

Rank = tuple[int, float, float, float, int]

# The deadline of a request without a target, in seconds after its arrival: whoever has a target comes first, but only
# for so long.
_PATIENCE = 60.0
PENDING = -1  # in place of a token that was drawn on the device and is not known on the host yet
NO_TOKEN = -2  # in place of a token that cannot be drawn: logits are NaN, or minus infinity for the whole vocabulary
_numbers = itertools.count()


@dataclass(eq=False)
class Sequence:
    """Mutable state of one `EngineRequest`.

    |---- prompt ----|-- output --|
    |-- computed --|-- to do -----|     keys and values exist for the first `num_computed_tokens`

    The last output token may be `PENDING`.
    """

    request: EngineRequest
    salt: bytes  # root of the prefix-cache hash chain
    ttft_target: float | None = None  # seconds, of the request's SLO class
    max_len: int = sys.maxsize  # tokens at most, prompt and output; set when it is queued
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full computed blocks
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    generator: torch.Generator | None = None
    ended: bool = False  # finished or aborted: what is still drawn for it is of no use
    first_scheduled_time: float = 0.0  # time.monotonic(), as the two below
    first_token_time: float = 0.0
    added_time: float = field(default_factory=time.monotonic)
    number: int = field(default_factory=lambda: next(_numbers))  # tells apart what is equal otherwise

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        if self.request.sampling.seed is not None and not self.request.sampling.greedy:
            self.generator = torch.Generator().manual_seed(self.request.sampling.seed)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def variant(self) -> int:
        return self.request.variant

    @property
    def flow(self) -> tuple[int, str]:
        """Whose share it uses: (variant, tenant)."""
        return self.request.variant, self.request.qos.tenant

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute; the last one that it can have needs no keys and values."""
        return min(len(self.token_ids), self.max_len - 1) - self.num_computed_tokens

    @property
    def is_pending(self) -> bool:
        """Whether its last token is not known yet."""
        return self.token_ids[-1] == PENDING

    @property
    def arrival(self) -> tuple[float, float]:
        """Older sorts first."""
        return (self.request.arrival_time or self.added_time, self.added_time)

    @property
    def deadline(self) -> float:
        """When the first token is due."""
        return self.arrival[0] + (_PATIENCE if self.ttft_target is None else self.ttft_target)

    @property
    def rank(self) -> Rank:
        """The more urgent sorts first, among the requests of one tenant for one variant."""
        return (self.request.qos.priority, self.deadline, *self.arrival, self.number)
