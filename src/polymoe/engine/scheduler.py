"""Which tokens run in the next step: continuous batching with chunked prefill and preemption by recomputation.

There are no phases. Every sequence has tokens whose keys and values are not computed yet; a step gives each some of
its share of the token budget, oldest first. A sequence whose last token is computed samples a new one.
"""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from polymoe.engine.block_manager import BlockManager, hash_block
from polymoe.engine.request import TokenLogprobs, TokenOutput
from polymoe.engine.sequence import Sequence
from polymoe.errors import OverloadedError


@dataclass(frozen=True)
class ScheduledSequence:
    """`num_tokens` tokens of `sequence` from its `num_computed_tokens` on run in this step."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the end of the sequence, so that a new token is drawn."""
        return self.num_tokens == self.sequence.num_uncomputed


@dataclass(frozen=True)
class SampledToken:
    """What the runner drew for one sequence."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Scheduler:
    """Owns all sequences and their blocks.

    Args:
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens a step.
        max_waiting: requests waiting beyond this are refused (`OverloadedError`).
        num_slots: variants that one step may mix.
        max_model_len: [V] longest sequence of each variant, in tokens.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting: int,
        num_slots: int,
        max_model_len: list[int],
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens, self.max_waiting = (
            max_num_seqs,
            max_num_batched_tokens,
            max_waiting,
        )
        self.num_slots, self.max_model_len = num_slots, max_model_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        # Since the start, a variant each: tokens looked up in and found in the prefix cache, sequences put back.
        self.prefix_queries = [0] * len(max_model_len)
        self.prefix_hits = [0] * len(max_model_len)
        self.preemptions = [0] * len(max_model_len)

    @property
    def sequences(self) -> Iterable[Sequence]:
        yield from self.running
        yield from self.waiting

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        if len(self.waiting) >= self.max_waiting:
            raise OverloadedError(f"{len(self.waiting)} requests are waiting; try again later.", retry_after=1.0)
        self.waiting.append(sequence)

    def abort(self, request_ids: set[str]) -> list[Sequence]:
        """Forget these sequences and free their blocks; unknown ids are finished ones and fine."""
        gone = [s for s in self.sequences if s.request_id in request_ids]
        self._drop(gone)
        return gone

    def schedule(self) -> list[ScheduledSequence]:
        """Choose this step's tokens and give their sequences the blocks for them."""
        budget = self.max_num_batched_tokens
        allowed = self._allowed_variants()
        chosen: dict[Sequence, int] = {}
        preempted = False
        self.running.sort(key=lambda s: s.arrival)
        for sequence in list(self.running):
            if budget == 0:
                break
            if sequence not in self.running or (allowed is not None and sequence.variant not in allowed):
                continue  # preempted a moment ago for an older one, or its variant's turn is later
            count = min(sequence.num_uncomputed, budget)
            missing = self.blocks.blocks_for(sequence.num_computed_tokens + count) - len(sequence.block_ids)
            while not self.blocks.can_allocate([], missing):
                victim = self.running[-1]
                budget += chosen.pop(victim, 0)
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            else:
                sequence.block_ids += self.blocks.allocate(missing)
                chosen[sequence] = count
                budget -= count
        if not preempted:  # who was just preempted would only be preempted again
            self._admit(chosen, budget, allowed)
        return [ScheduledSequence(s, n) for s, n in chosen.items()]

    def _allowed_variants(self) -> set[int] | None:
        """With fewer slots than variants: those of the oldest requests, so that nobody starves. None: all."""
        if self.num_slots >= len(self.max_model_len):
            return None
        allowed: set[int] = set()
        for sequence in sorted(self.sequences, key=lambda s: s.arrival):
            if len(allowed) == self.num_slots:
                break
            allowed.add(sequence.variant)
        return allowed

    def _admit(self, chosen: dict[Sequence, int], budget: int, allowed: set[int] | None) -> None:
        """Start waiting sequences, first come first served, while tokens, places and blocks last."""
        postponed: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.popleft()
            if allowed is not None and sequence.variant not in allowed:
                postponed.append(sequence)
                continue
            matched: list[int] = []
            if sequence.request.sampling.prompt_logprobs is None:  # those need every prompt token's logits
                matched = self.blocks.match_prefix(sequence.token_ids, sequence.salt)
            cached = len(matched) * self.blocks.block_size
            count = min(len(sequence.token_ids) - cached, budget)
            missing = self.blocks.blocks_for(cached + count) - len(matched)
            if not self._make_room(matched, missing, allowed):
                postponed.append(sequence)
                break
            self.blocks.take(matched)
            sequence.block_ids = matched + self.blocks.allocate(missing)
            sequence.block_hashes = self._hashes(sequence, [], len(matched))
            sequence.num_computed_tokens = cached
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = cached
                sequence.first_scheduled_time = time.monotonic()
                self.prefix_queries[sequence.variant] += len(sequence.token_ids)
                self.prefix_hits[sequence.variant] += cached
            self.running.append(sequence)
            chosen[sequence] = count
            budget -= count
        self.waiting.extendleft(reversed(postponed))

    def _make_room(self, matched: list[int], missing: int, allowed: set[int] | None) -> bool:
        """Whether `missing` blocks can be had; sequences whose variant has no slot now give up theirs."""
        while not self.blocks.can_allocate(matched, missing):
            paused = [s for s in self.running if allowed is not None and s.variant not in allowed]
            if not paused:
                return False
            self._preempt(paused[-1])
        return True

    def _hashes(self, sequence: Sequence, known: list[bytes], num_blocks: int) -> list[bytes]:
        size = self.blocks.block_size
        hashes = list(known)
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            hashes.append(hash_block(hashes[-1] if hashes else sequence.salt, sequence.token_ids[start : start + size]))
        return hashes

    def _preempt(self, sequence: Sequence) -> None:
        """Take back all blocks; what was computed is computed again later (or found in the prefix cache)."""
        self.running.remove(sequence)
        self.blocks.release(sequence.block_ids)
        sequence.block_ids, sequence.block_hashes, sequence.num_computed_tokens = [], [], 0
        sequence.num_preemptions += 1
        self.preemptions[sequence.variant] += 1
        self.waiting.appendleft(sequence)

    def update(self, scheduled: list[ScheduledSequence], sampled: dict[str, SampledToken]) -> list[TokenOutput]:
        """Book the step's progress, append sampled tokens, and finish what is finished."""
        outputs = []
        finished = []
        for item in scheduled:
            sequence = item.sequence
            sequence.num_computed_tokens += item.num_tokens
            self._remember_full_blocks(sequence)
            token = sampled.get(sequence.request_id)
            if token is None:
                continue
            first = sequence.num_output_tokens == 0
            sequence.token_ids.append(token.token_id)
            now = time.monotonic()
            if first:
                sequence.first_token_time = now
            reason, stop = self._finish_reason(sequence)
            if reason is not None:
                finished.append(sequence)
            wants_prompt = first and sequence.request.sampling.prompt_logprobs is not None
            outputs.append(
                TokenOutput(
                    request_id=sequence.request_id,
                    new_token_ids=[token.token_id],
                    logprobs=None if token.logprobs is None else [token.logprobs],
                    prompt_logprobs=sequence.prompt_logprobs if wants_prompt else None,
                    finish_reason=reason,
                    stop_reason=stop,
                    num_cached_tokens=sequence.num_cached_tokens,
                    queue_time=sequence.first_scheduled_time - sequence.added_time,
                    prefill_time=sequence.first_token_time - sequence.first_scheduled_time,
                    decode_time=now - sequence.first_token_time,
                )
            )
        self._drop(finished)
        return outputs

    def _remember_full_blocks(self, sequence: Sequence) -> None:
        full = sequence.num_computed_tokens // self.blocks.block_size
        if full > len(sequence.block_hashes):
            start = len(sequence.block_hashes)
            sequence.block_hashes = self._hashes(sequence, sequence.block_hashes, full)
            for block, digest in zip(sequence.block_ids[start:full], sequence.block_hashes[start:], strict=True):
                self.blocks.remember(block, digest)

    def _finish_reason(self, sequence: Sequence) -> tuple[str | None, int | None]:
        sampling = sequence.request.sampling
        last = sequence.token_ids[-1]
        if sequence.num_output_tokens >= sampling.min_tokens and last in sequence.request.stop_token_ids:
            return "stop", last
        if sequence.num_output_tokens >= sampling.max_tokens:
            return "length", None
        if len(sequence.token_ids) >= self.max_model_len[sequence.variant]:
            return "length", None
        return None, None

    def _drop(self, sequences: list[Sequence]) -> None:
        gone = set(sequences)
        if not gone:
            return
        for sequence in sequences:
            self.blocks.release(sequence.block_ids)
            sequence.block_ids = []
        self.running = [s for s in self.running if s not in gone]
        self.waiting = deque(s for s in self.waiting if s not in gone)

    def check_integrity(self) -> None:
        """Every held block belongs to a running sequence, and enough of them for what is computed."""
        self.blocks.check_integrity()
        held = [b for s in self.running for b in s.block_ids]
        assert len(set(held)) == self.blocks.num_blocks - self.blocks.num_free
        for sequence in self.running:
            assert len(sequence.block_ids) * self.blocks.block_size >= sequence.num_computed_tokens
        assert not any(s.block_ids for s in self.waiting)
