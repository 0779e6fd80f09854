"""An encoder–decoder variant's task: greedy answers against targets (ROUGE), and what it says of every target token."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from polymoe.bench.exam import Advance, Exam, Marks
from polymoe.bench.originals import KeptLogProbs
from polymoe.bench.rivals import Weights, put_weights
from polymoe.bench.rouge import rouge
from polymoe.bench.task_pairs import Pair
from polymoe.engine.llm import LLM
from polymoe.engine.request import SamplingParams
from polymoe.engine.tokenizer import VariantTokenizer
from polymoe.errors import PolymoeError
from polymoe.evaluate.fidelity import OriginalModel, check_token_ids, compare, padded
from polymoe.model.skeleton import context_limit
from polymoe.offline.bundle import Bundle
from polymoe.offline.family import Family

Ids = list[int]


class Candidate(Protocol):
    """Whoever sits the exam."""

    def answers(self, inputs: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
        """Greedy answers; an end-of-text token and what follows it may be there or not."""

    def logits(self, inputs: Sequence[Ids], windows: Sequence[Ids]) -> list[Tensor]:
        """float32 [tokens, vocabulary] for each: what the decoder says after each token of its window."""


class StockCandidate:
    """A checkpoint in stock transformers, float32 on the CPU."""

    def __init__(self, path: Path) -> None:
        self.original = OriginalModel(path, torch.float32, torch.device("cpu"))
        self.model = self.original.model

    @torch.inference_mode()
    def answers(self, inputs: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
        written = self.model.generate(**padded(inputs), max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        return [row[1:] for row in written.tolist()]  # without the decoder's start token

    def logits(self, inputs: Sequence[Ids], windows: Sequence[Ids]) -> list[Tensor]:
        return self.original.logits(list(windows), list(inputs))


class ServedCandidate:
    """A variant in the engine, float32 on the CPU; `batch` requests at once."""

    def __init__(self, bundle: Bundle, variant: str, batch: int) -> None:
        self.llm = LLM(bundle.path, device="cpu", dtype="float32", max_num_seqs=batch)
        self.variant, self.index = variant, self.llm.variants.index(variant)

    def answers(self, inputs: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
        greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)
        return [found.outputs[0].token_ids for found in self.llm.generate(list(inputs), greedy, self.variant)]

    def logits(self, inputs: Sequence[Ids], windows: Sequence[Ids]) -> list[Tensor]:
        prompts = [(self.index, [*ids, *window]) for ids, window in zip(inputs, windows, strict=True)]
        return self.llm.engine.prompt_logits(prompts, [len(ids) for ids in inputs])


class TaskExam(Exam):
    """Pairs of the variant's own task.

    Args:
        folder: for the original's log-probabilities.
        batch: pairs a pass.
    """

    sample = "pairs"

    def __init__(
        self, family: Family, variant: str, pairs: Sequence[Pair], max_new_tokens: int, folder: Path, batch: int = 32
    ) -> None:
        index = family.names.index(variant)
        self.variant, self.max_new_tokens, self.batch = variant, max_new_tokens, batch
        self.path = family.checkpoints[index].path
        self.vocab_size = family.vocab_sizes[index]
        self.tokenizer = VariantTokenizer(self.path)
        config = family.checkpoints[index].config
        self.ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        start = int(config.decoder_start_token_id)
        encoded = [
            (self.tokenizer.encode(pair.input), self.tokenizer.encode(pair.target), pair.target) for pair in pairs
        ]
        # Pairs of similar length share a pass, or most of it would be padding.
        encoded.sort(key=lambda item: (len(item[0]), len(item[1])))
        self.inputs, self.references = [item[0] for item in encoded], [item[2] for item in encoded]
        self.windows = [[start, *item[1]] for item in encoded]  # of the decoder
        self._check_lengths(context_limit(config) // 2)
        check_token_ids(variant, [*self.inputs, *self.windows], self.vocab_size)
        self.num_samples = len(encoded)
        self._kept = KeptLogProbs(folder / f"{variant}.f32", self._original_logits())

    def _check_lengths(self, limit: int) -> None:
        """Raise `PolymoeError` for what is beyond the positions of the encoder or the decoder."""
        for what, longest in (
            ("an input", max(len(ids) for ids in self.inputs)),
            ("a target", max(len(window) for window in self.windows)),
            ("an answer of --max-new-tokens", self.max_new_tokens + 1),
        ):
            if longest > limit:
                raise PolymoeError(
                    f"--task {self.variant}: {what} may be {longest} tokens long, and the variant was configured for "
                    f"{limit}; leave out what is longer."
                )

    def _original_logits(self) -> Iterator[Tensor]:
        candidate = StockCandidate(self.path)
        for first in range(0, self.num_samples, self.batch):
            here = slice(first, first + self.batch)
            yield from candidate.logits(self.inputs[here], self.windows[here])

    def alone(self, advance: Advance) -> Marks:
        return self._marks(StockCandidate(self.path), advance)

    def of_weights(self, weights: Weights, advance: Advance) -> Marks:
        candidate = StockCandidate(self.path)
        put_weights(candidate.model, weights)
        return self._marks(candidate, advance)

    def of_bundle(self, bundle: Bundle, advance: Advance) -> Marks:
        return self._marks(ServedCandidate(bundle, self.variant, self.batch), advance)

    def _marks(self, candidate: Candidate, advance: Advance) -> Marks:
        answers = []
        for first in range(0, self.num_samples, self.batch):
            group = self.inputs[first : first + self.batch]
            for ids in candidate.answers(group, self.max_new_tokens):
                end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
                answers.append(self.tokenizer.decode(ids[:end]))
            advance(len(group))

        def originals(first: int, windows: list[Ids]) -> list[Tensor]:
            return [self._kept[i] for i in range(first, first + len(windows))]

        def served(first: int, windows: list[Ids]) -> list[Tensor]:
            return candidate.logits(self.inputs[first : first + len(windows)], windows)

        fidelity = compare(self.windows, originals, served, self.vocab_size, self.batch)
        return Marks(fidelity, rouge(answers, self.references))
