"""One sequence as the engine sees it while it lives. Progress is one number: `num_computed_tokens`."""

import itertools
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

from polymoe.engine.grammars import CompiledGrammar
from polymoe.engine.scheduling.step_record import PENDING, ScheduledSequence, SequenceKey
from polymoe.protocol.request import EngineRequest, SequenceId, TokenLogprobs

Rank = tuple[int, float, float, float, int]

# The deadline of a request without a target, in seconds after its arrival: whoever has a target comes first, but only
# for so long.
_PATIENCE = 60.0
_numbers = itertools.count()


@dataclass(eq=False)
class Sequence:
    """Mutable state of one `EngineRequest`.

    |---- prompt ----|-- output --|
    |-- computed --|-- to do -----|     keys and values exist for the first `num_computed_tokens`

    The last output token may be `PENDING`. What is asked of every sequence in every step and never changes is kept.
    """

    request: EngineRequest
    salt: bytes  # root of the prefix-cache hash chain
    ttft_target: float | None = None  # seconds, of the request's SLO class
    grammar: Future[CompiledGrammar] | None = None
    max_len: int = sys.maxsize  # tokens at most, prompt and output; set when it is queued
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full computed blocks
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    ended: bool = False  # finished or aborted: what is still drawn for it is of no use
    first_scheduled_time: float = 0.0  # time.monotonic(), as the two below
    first_token_time: float = 0.0
    added_time: float = field(default_factory=time.monotonic)
    number: int = field(default_factory=lambda: next(_numbers))  # tells apart what is equal otherwise
    key: SequenceKey = field(default_factory=SequenceKey)
    state_key: SequenceKey = field(default_factory=SequenceKey)  # of its state beside its blocks, lost with those

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def is_ready(self) -> bool:
        """Whether its grammar is compiled, if it has one."""
        return self.grammar is None or self.grammar.done()

    @property
    def request_id(self) -> SequenceId:
        return self.request.request_id

    @property
    def variant(self) -> int:
        return self.request.variant

    @cached_property
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

    def scheduled(self, num_tokens: int) -> ScheduledSequence:
        """The next `num_tokens` tokens to compute, as a record that later changes do not touch."""
        start = self.num_computed_tokens
        samples = num_tokens == self.num_uncomputed
        return ScheduledSequence(
            key=self.key,
            state_key=self.state_key,
            request=self.request,
            start=start,
            input_ids=self.token_ids[start : start + num_tokens],
            block_ids=list(self.block_ids),
            samples=samples,
            num_output_tokens=self.num_output_tokens,
            token_ids=list(self.token_ids) if samples and self.request.looks_back else (),
            grammar=None if self.grammar is None else self.grammar.result(),
        )

    @cached_property
    def arrival(self) -> tuple[float, float]:
        """Older sorts first."""
        return (self.request.arrival_time or self.added_time, self.added_time)

    @cached_property
    def deadline(self) -> float:
        """When the first token is due."""
        return self.arrival[0] + (_PATIENCE if self.ttft_target is None else self.ttft_target)

    @cached_property
    def rank(self) -> Rank:
        """The more urgent sorts first, among the requests of one tenant for one variant."""
        return (self.request.qos.priority, self.deadline, *self.arrival, self.number)
