"""What goes to the runner for one step and what comes back: frozen records, never the scheduler's own objects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from polymoe.engine.grammars import CompiledGrammar
from polymoe.protocol.request import EngineRequest, TokenLogprobs

PENDING = -1  # in place of a token that was drawn on the device and is not known on the host yet
# In place of a token that cannot be drawn: the logits are NaN, or minus infinity for the whole vocabulary.
NO_TOKEN, NOTHING_ALLOWED = -2, -3


class SequenceKey:
    """Tells one sequence from all others. It lives as long as its sequence, so that what the runner keeps for it from
    step to step (weakly, by this key) goes with it."""

    __slots__ = ("__weakref__",)


class ScheduledSequence(msgspec.Struct, frozen=True, eq=False):  # made in a tenth of a dataclass's time
    """The tokens of one sequence that run in a step, as it was scheduled.

    |---- computed ----|-- input_ids --|-- later steps --|
                     start
    """

    key: SequenceKey
    request: EngineRequest
    start: int  # tokens whose keys and values exist
    input_ids: list[int]  # at least one; the last one may be `PENDING`
    block_ids: list[int]  # of the KV cache, for the tokens computed and these
    samples: bool  # whether these reach the end of the sequence, so that a new token is drawn
    num_output_tokens: int = 0  # known or pending
    token_ids: Sequence[int] = ()  # the whole sequence, where its next token depends on them
    grammar: CompiledGrammar | None = None  # that its output follows
    state_key: SequenceKey | None = None  # of what it keeps beside its blocks; another one after it lost them

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def variant(self) -> int:
        return self.request.variant

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of these prompt tokens are wanted."""
        return self.request.sampling.prompt_logprobs is not None and self.num_output_tokens == 0


@dataclass(frozen=True)
class SampledToken:
    """What the runner drew for one sequence."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step found, by sequence.

    prompt_logprobs: entry i scores prompt token `start + 1 + i` of the sequence's `ScheduledSequence`.
    """

    sampled: Mapping[SequenceKey, SampledToken]
    prompt_logprobs: Mapping[SequenceKey, list[TokenLogprobs]] = field(default_factory=dict)
