"""The runner of encoder–decoder models: prompts go to the encoder, whole, and only the rest are tokens of the step."""

from dataclasses import replace

import numpy as np

from polymoe.engine.model_runner import ModelRunner
from polymoe.engine.scheduling.step_record import ScheduledSequence
from polymoe.engine.step_tensors import GatheredStep, PreparedStep
from polymoe.model.batch.batch import EncoderBatch, segments_from_variants
from polymoe.model.transfer.upload import upload


class EncoderDecoderRunner(ModelRunner):
    """Runs scheduled sequences on an `EncoderDecoderModel`.

    A prompt may be scheduled in chunks; the encoder reads it in the step in which its last token is scheduled:

        |--- prompt: num_encoder_tokens ---|-- decoder --|
        |-- chunk --|-------- chunk ---------|    the second one brings the encoder's pass
    """

    _continues = False

    def gather(self, scheduled: list[ScheduledSequence]) -> GatheredStep:
        """As `ModelRunner.gather`, without the tokens that the encoder reads: a sequence may have none left."""
        step = super().gather(scheduled)
        encoder_lens = np.repeat([item.request.num_encoder_tokens for item in step.order], step.counts)
        own = step.positions >= encoder_lens
        return replace(
            step,
            counts=[_decoder_tokens(item) for item in step.order],
            input_ids=step.input_ids[own],
            positions=step.positions[own],
            slot_mapping=step.slot_mapping[own],
            pending=(np.cumsum(own) - 1)[step.pending],
        )

    def prepare(self, step: GatheredStep) -> PreparedStep:
        """As `ModelRunner.prepare`, with the prompts whose last token is in this step."""
        ready = super().prepare(step)
        assert ready.batch.attention is not None
        lens = np.repeat([item.request.num_encoder_tokens for item in step.order], step.counts)
        attention = replace(ready.batch.attention, token_encoder_len=upload(lens, self.model.device))
        complete = [item for item in step.order if _completes_prompt(item)]
        prompts = self._prompts(complete) if complete else None
        shape = (len(step.input_ids), 1)
        return replace(ready, batch=replace(ready.batch, attention=attention, encoder=prompts, shape=shape))

    def _prompts(self, sequences: list[ScheduledSequence]) -> EncoderBatch:
        """`sequences` in the order of their variants."""
        lengths = [s.request.num_encoder_tokens for s in sequences]
        input_ids = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
        slot_mapping = []
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            input_ids[row, :length] = sequence.request.prompt_token_ids[:length]
            slot_mapping.append(self._slot_mapping(sequence, np.arange(length)))
        device = self.model.device
        return EncoderBatch(
            input_ids=upload(input_ids, device),
            lengths=lengths,
            slot_mapping=upload(np.concatenate(slot_mapping), device),
            rows=segments_from_variants([s.variant for s in sequences], [max(lengths)] * len(sequences), device),
        )

    @staticmethod
    def _rows_wanted(item: ScheduledSequence) -> int:
        """The last one to sample from; all of the decoder's for `logits`."""
        if item.request.sampling.prompt_logprobs is not None:
            return _decoder_tokens(item)
        return int(item.samples)


def _decoder_tokens(item: ScheduledSequence) -> int:
    return max(0, item.start + item.num_tokens - max(item.start, item.request.num_encoder_tokens))


def _completes_prompt(item: ScheduledSequence) -> bool:
    return item.start < item.request.num_encoder_tokens <= item.start + item.num_tokens
