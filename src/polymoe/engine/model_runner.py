"""Turns a schedule into tensors, runs the model, and samples. The only part of a step that touches the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from polymoe.engine.continued_decode import ContinuedDecode
from polymoe.engine.grammar_masks import GrammarMasks, StepMasks
from polymoe.engine.sampler import Generators, SampleOutput, sample, top_logprobs
from polymoe.engine.scheduling.step_record import PENDING, SampledToken, ScheduledSequence, SequenceKey, StepResult
from polymoe.engine.step_tensors import GatheredStep, PreparedStep
from polymoe.model.batch.batch import AttentionBatch, DeviceLengths, ForwardBatch, segments_from_variants
from polymoe.model.graphs.decode_graphs import DecodeGraphs
from polymoe.model.graphs.static_batch import DecodeInputs, PendingInputs
from polymoe.model.served_model import ServedModel
from polymoe.model.transfer.upload import upload
from polymoe.protocol.request import TokenLogprobs


@dataclass(frozen=True)
class StepInFlight:
    """A step that was given to the device."""

    sequences: list[SequenceKey]  # [R] that a token was drawn for
    output: SampleOutput
    prompt_logprobs: dict[SequenceKey, list[TokenLogprobs]]

    def wait(self) -> StepResult:
        """The new tokens, once the device has drawn them."""
        sampled = map(SampledToken, *self.output.wait())
        return StepResult(dict(zip(self.sequences, sampled, strict=True)), self.prompt_logprobs)

    @cached_property
    def tokens(self) -> dict[SequenceKey, int]:
        """What was drawn. Waits for the device."""
        return dict(zip(self.sequences, self.output.wait()[0], strict=True))

    def tokens_of(self, sequences: list[SequenceKey]) -> torch.Tensor:
        """`[n]` int64 on the device."""
        rows = [self.sequences.index(sequence) for sequence in sequences]
        return self.output.tokens[upload(rows, self.output.tokens.device)]


class ModelRunner:
    """Runs scheduled sequences on a `ServedModel`.

    Args:
        vocab_sizes: [V] tokens each variant has; the logits beyond are minus infinity.
        seed: for requests that bring none.
        graphs: runs the decode steps that it takes; None: all steps run the same way.
    """

    _continues = True  # whether, on a CPU, a decode step may be the one before, moved on by one token

    def __init__(
        self,
        model: ServedModel,
        block_size: int,
        vocab_sizes: list[int],
        seed: int,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model, self.block_size, self.vocab_sizes, self.graphs = model, block_size, vocab_sizes, graphs
        self.generators = Generators(model.device, seed)
        self.masks = GrammarMasks(max(vocab_sizes))
        apart = model.context.backend.keeps_tables_on_device or model.runs_per_variant
        self._continued = ContinuedDecode(block_size) if self._continues and not apart else None

    @torch.inference_mode()
    def launch(
        self,
        scheduled: list[ScheduledSequence],
        previous: StepInFlight | None = None,
        upcoming: Sequence[int] = (),
    ) -> StepInFlight:
        """Give the device the scheduled tokens (at least one) to compute, and a new token to draw for the sequences
        that reach their end.

        Args:
            previous: the step before this one, where its tokens are still pending.
            upcoming: variants that wait for a slot, the next one first; it is loaded beside the computation.
        """
        moved = None if self._continued is None else self._continued.moved_on(scheduled)
        step = self.gather(scheduled) if moved is None else moved[0]
        masks = self.masks.start(
            [item for item in step.order if item.samples], lambda: {} if previous is None else previous.tokens
        )
        pending = None
        if step.pending_sequences:
            assert previous is not None
            pending = PendingInputs(step.pending, previous.tokens_of(step.pending_sequences))
        if self.graphs is not None and step.is_decode and self.graphs.takes(len(step.order)):
            columns = step.input_ids, step.positions, np.asarray(step.variants), step.slot_mapping, step.block_table
            logits = self.graphs.forward(DecodeInputs(*columns, pending), set(step.variants), upcoming)
        else:
            ready = self.prepare(step) if moved is None else moved[1]
            if pending is not None:
                pending.put_into(ready.input_ids)
            if self._continued is not None and moved is None:
                self._continued.keep(step, ready)
            logits = self.model.forward(ready.input_ids, ready.positions, ready.batch, ready.sampled_rows, upcoming)
        self.model.pool.after_step()
        last = {} if pending is None else dict(zip(step.pending_sequences, pending.tokens, strict=True))
        logits = self.mask_missing_tokens(logits, step)
        return self._sample(step, logits, last, None if masks is None else masks.result())

    @torch.inference_mode()
    def logits(self, scheduled: list[ScheduledSequence]) -> list[torch.Tensor]:
        """Every wanted row of each scheduled sequence, in the given order: float32 `[rows, vocabulary]`."""
        step = self.gather(scheduled)
        ready = self.prepare(step)
        rows = self.model.forward(ready.input_ids, ready.positions, ready.batch, ready.sampled_rows).float()
        pieces = dict(zip(step.order, torch.split(rows, list(step.num_rows)), strict=True))
        return [pieces[item][:, : self.vocab_sizes[item.variant]] for item in scheduled]

    def gather(self, scheduled: list[ScheduledSequence]) -> GatheredStep:
        """Flatten and sort by variant: |-- sequences of variant 0 --|-- of variant 1 --|…"""
        order = tuple(sorted(scheduled, key=lambda item: item.variant))
        input_ids: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        max_blocks = max(len(item.block_ids) for item in order)
        tables = [[*item.block_ids, *[0] * (max_blocks - len(item.block_ids))] for item in order]
        pending: list[int] = []
        for i, item in enumerate(order):
            input_ids += item.input_ids
            if input_ids[-1] == PENDING:
                input_ids[-1] = 0
                pending.append(i)
            if item.num_tokens == 1:  # decode: numpy's calls would take longer than all else here
                block, offset = divmod(item.start, self.block_size)
                positions.append(item.start)
                slot_mapping.append(item.block_ids[block] * self.block_size + offset)
            else:
                position = np.arange(item.start, item.start + item.num_tokens)
                positions += position.tolist()
                slot_mapping += self._slot_mapping(item, position).tolist()
        return GatheredStep(
            order=order,
            variants=[item.variant for item in order],
            counts=[item.num_tokens for item in order],
            num_rows=tuple(self._rows_wanted(item) for item in order),
            input_ids=np.array(input_ids, dtype=np.int64),
            positions=np.array(positions, dtype=np.int64),
            slot_mapping=np.array(slot_mapping, dtype=np.int64),
            block_table=np.array(tables, dtype=np.int64),
            seq_lens=[item.start + item.num_tokens for item in order],
            pending=np.cumsum([item.num_tokens for item in order])[pending] - 1,
            pending_sequences=[order[i].key for i in pending],
        )

    def _slot_mapping(self, item: ScheduledSequence, position: np.ndarray) -> np.ndarray:
        """Where the keys and values at these positions of a sequence go: block * block_size + offset."""
        blocks = np.asarray(item.block_ids)
        mapping: np.ndarray = blocks[position // self.block_size] * self.block_size + position % self.block_size
        return mapping

    def prepare(self, step: GatheredStep) -> PreparedStep:
        """The step's tensors on the device."""
        starts: list[int] = np.concatenate([[0], np.cumsum(step.counts)]).tolist()
        sampled: list[int] = []
        for end, rows in zip(starts[1:], step.num_rows, strict=True):
            sampled += range(end - rows, end)
        device = self.model.device

        def to(array: Any) -> torch.Tensor:
            return upload(array, device)

        lengths = None
        if self.model.context.backend.keeps_tables_on_device:
            start_loc, seq_lens = (to(np.array(values, dtype=np.int32)) for values in (starts, step.seq_lens))
            lengths = DeviceLengths(start_loc, seq_lens, max(step.counts))
        attention = AttentionBatch(
            query_start_loc=starts,
            seq_lens=step.seq_lens,
            block_table=to(step.block_table),
            slot_mapping=to(step.slot_mapping),
            token_sequence=to(np.repeat(np.arange(len(step.order)), step.counts)),
            token_visible=to(step.positions + 1),
            device_lengths=lengths,
            state_keys=[item.state_key or item.key for item in step.order],
        )
        tokens = segments_from_variants(step.variants, step.counts, device)
        kept = list(step.num_rows)
        rows_kept = tokens if kept == step.counts else segments_from_variants(step.variants, kept, device)
        return PreparedStep(
            input_ids=to(step.input_ids),
            positions=to(step.positions),
            sampled_rows=to(np.array(sampled, dtype=np.int64)),
            batch=ForwardBatch(tokens=tokens, sampled=rows_kept, attention=attention),
        )

    @staticmethod
    def _rows_wanted(item: ScheduledSequence) -> int:
        """Logit rows at the end of the chunk: the last one to sample from, all of them for prompt log-probabilities."""
        return item.num_tokens if item.scores_prompt else int(item.samples)

    def mask_missing_tokens(self, logits: torch.Tensor, step: GatheredStep) -> torch.Tensor:
        """A variant with fewer vocabulary rows than the largest can never produce what it does not have."""
        if min(self.vocab_sizes) >= logits.shape[1]:
            return logits
        start = 0
        for variant, pairs in groupby(zip(step.variants, step.num_rows, strict=True), key=itemgetter(0)):
            end = start + sum(rows for _, rows in pairs)
            if self.vocab_sizes[variant] < logits.shape[1]:
                logits[start:end, self.vocab_sizes[variant] :] = float("-inf")
            start = end
        return logits

    def _sample(
        self,
        step: GatheredStep,
        logits: torch.Tensor,
        pending: dict[SequenceKey, torch.Tensor],
        masks: StepMasks | None,
    ) -> StepInFlight:
        rows: list[int] = []
        drawn: list[ScheduledSequence] = []
        scored: dict[SequenceKey, list[TokenLogprobs]] = {}
        start = 0
        for item, count in zip(step.order, step.num_rows, strict=True):
            if item.scores_prompt:
                scored[item.key] = self._prompt_logprobs(item, logits[start : start + count])
            start += count
            if item.samples:
                rows.append(start - 1)
                drawn.append(item)
        if len(rows) < len(logits):
            logits = logits[upload(np.array(rows, dtype=np.int64), logits.device)]
        output = sample(logits, drawn, self.generators, pending, masks)
        return StepInFlight([item.key for item in drawn], output, scored)

    @staticmethod
    def _prompt_logprobs(item: ScheduledSequence, logits: torch.Tensor) -> list[TokenLogprobs]:
        """The row of prompt token p scores token p + 1; the last one's row scores none."""
        wanted = item.request.sampling.prompt_logprobs
        assert wanted is not None
        targets = item.request.prompt_token_ids[item.start + 1 : item.start + 1 + item.num_tokens]
        if not targets:
            return []
        logprobs = torch.log_softmax(logits[: len(targets)].float(), dim=-1)
        return top_logprobs(logprobs, targets, [wanted] * len(targets))
