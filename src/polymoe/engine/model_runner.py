"""Turns a schedule into tensors, runs the model, and samples. The only part of a step that touches the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polymoe.engine.sampler import sample, top_logprobs
from polymoe.engine.scheduler import SampledToken, ScheduledSequence
from polymoe.model.context import AttentionBatch, ForwardBatch, segments_from_variants
from polymoe.model.served_model import ServedModel


@dataclass(frozen=True)
class PreparedStep:
    """Device tensors of one step. R sampled rows: for each sequence in `order`, `num_rows` of them at its end."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    sampled_rows: torch.Tensor  # [R] int64
    batch: ForwardBatch
    order: tuple[ScheduledSequence, ...]  # sorted by variant
    num_rows: tuple[int, ...]


class ModelRunner:
    """Runs scheduled sequences on a `ServedModel`.

    Args:
        vocab_sizes: [V] tokens each variant has; the logits beyond are minus infinity.
        seed: for requests that bring none.
    """

    def __init__(self, model: ServedModel, block_size: int, vocab_sizes: list[int], seed: int) -> None:
        self.model, self.block_size, self.vocab_sizes = model, block_size, vocab_sizes
        self.generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def run(self, scheduled: list[ScheduledSequence], upcoming: Sequence[int] = ()) -> dict[str, SampledToken]:
        """Compute the scheduled tokens; request id -> new token for the sequences that reached their end.

        `upcoming`: variants that wait for a slot, the next one first; it is loaded beside the computation.
        """
        if not scheduled:
            return {}
        step = self.prepare(scheduled)
        logits = self.model.forward(step.input_ids, step.positions, step.batch, step.sampled_rows, upcoming)
        return self._sample(step, self.mask_missing_tokens(logits, step.batch))

    @torch.inference_mode()
    def logits(self, scheduled: list[ScheduledSequence]) -> list[torch.Tensor]:
        """Every wanted row of each scheduled sequence, in the given order: float32 `[rows, vocabulary]`."""
        step = self.prepare(scheduled)
        rows = self.model.forward(step.input_ids, step.positions, step.batch, step.sampled_rows).float()
        pieces = dict(zip((item.sequence for item in step.order), torch.split(rows, list(step.num_rows)), strict=True))
        return [pieces[i.sequence][:, : self.vocab_sizes[i.sequence.variant]] for i in scheduled]

    def prepare(self, scheduled: list[ScheduledSequence]) -> PreparedStep:
        """Flatten and sort by variant: |-- sequences of variant 0 --|-- of variant 1 --|…"""
        order = tuple(sorted(scheduled, key=lambda item: item.sequence.variant))
        variants = [item.sequence.variant for item in order]
        counts = [item.num_tokens for item in order]
        starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        input_ids: list[int] = []
        positions: list[np.ndarray] = []
        slots: list[np.ndarray] = []
        sampled: list[int] = []
        num_rows: list[int] = []
        seq_lens: list[int] = []
        max_blocks = max(len(item.sequence.block_ids) for item in order)
        block_table = np.zeros((len(order), max_blocks), dtype=np.int64)
        for i, item in enumerate(order):
            sequence, first = item.sequence, item.sequence.num_computed_tokens
            last = first + item.num_tokens
            input_ids += sequence.token_ids[first:last]
            position = np.arange(first, last)
            positions.append(position)
            blocks = np.asarray(sequence.block_ids)
            block_table[i, : len(blocks)] = blocks
            slots.append(blocks[position // self.block_size] * self.block_size + position % self.block_size)
            seq_lens.append(last)
            num_rows.append(self._rows_wanted(item))
            sampled += range(starts[i + 1] - num_rows[i], starts[i + 1])
        device = self.model.device

        def to(array: Any) -> torch.Tensor:
            return torch.as_tensor(array, device=device)

        attention = AttentionBatch(
            query_start_loc=starts,
            seq_lens=seq_lens,
            block_table=to(block_table),
            slot_mapping=to(np.concatenate(slots)),
            token_sequence=to(np.repeat(np.arange(len(order)), counts)),
            token_visible=to(np.concatenate(positions) + 1),
        )
        tokens = segments_from_variants(variants, counts, device)
        rows = segments_from_variants(variants, num_rows, device)
        return PreparedStep(
            input_ids=to(np.array(input_ids, dtype=np.int64)),
            positions=to(np.concatenate(positions)),
            sampled_rows=to(np.array(sampled, dtype=np.int64)),
            batch=ForwardBatch(tokens=tokens, sampled=rows, attention=attention),
            order=order,
            num_rows=tuple(num_rows),
        )

    @staticmethod
    def _rows_wanted(item: ScheduledSequence) -> int:
        """Logit rows at the end of the chunk: the last one to sample from, all of them for prompt log-probabilities."""
        sequence = item.sequence
        if sequence.request.sampling.prompt_logprobs is not None and sequence.num_output_tokens == 0:
            return item.num_tokens
        return int(item.samples)

    def mask_missing_tokens(self, logits: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """A variant with fewer vocabulary rows than the largest can never produce what it does not have."""
        for variant, start, end in batch.sampled.spans:
            if self.vocab_sizes[variant] < logits.shape[1]:
                logits[start:end, self.vocab_sizes[variant] :] = float("-inf")
        return logits

    def _sample(self, step: PreparedStep, logits: torch.Tensor) -> dict[str, SampledToken]:
        rows: list[int] = []
        sequences = []
        start = 0
        for item, count in zip(step.order, step.num_rows, strict=True):
            if item.sequence.request.sampling.prompt_logprobs is not None and item.sequence.num_output_tokens == 0:
                self._collect_prompt_logprobs(item, logits[start : start + count])
            start += count
            if item.samples:
                rows.append(start - 1)
                sequences.append(item.sequence)
        if not rows:
            return {}
        output = sample(logits[rows], sequences, self.generator)
        return {
            sequence.request_id: SampledToken(token, logprobs)
            for sequence, token, logprobs in zip(sequences, output.token_ids, output.logprobs, strict=True)
        }

    @staticmethod
    def _collect_prompt_logprobs(item: ScheduledSequence, logits: torch.Tensor) -> None:
        """The row at position p scores the prompt token at p + 1; what a preempted run already collected is kept."""
        sequence = item.sequence
        wanted = sequence.request.sampling.prompt_logprobs
        assert wanted is not None
        first = sequence.num_computed_tokens
        skip = max(0, len(sequence.prompt_logprobs) - first)
        targets = sequence.request.prompt_token_ids[first + 1 + skip : first + 1 + item.num_tokens]
        if targets:
            logprobs = torch.log_softmax(logits[skip : skip + len(targets)].float(), dim=-1)
            sequence.prompt_logprobs += top_logprobs(logprobs, targets, [wanted] * len(targets))
