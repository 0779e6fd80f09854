"""Which tokens the grammars of a step's sequences allow next: filled in one call, beside the forward pass."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher

from polymoe.engine.scheduling.step_record import PENDING, ScheduledSequence, SequenceKey
from polymoe.model.transfer.upload import upload

# The 8 tokens that a byte of a mask stands for, lowest bit first.
_BITS = torch.tensor([[bool(byte >> bit & 1) for bit in range(8)] for byte in range(256)])  # [256, 8] bool


@dataclass
class _Progress:
    """How far one sequence is in its grammar."""

    matcher: LLMatcher | None  # None: no token is allowed, and the sequence ends with an error
    num_tokens: int = 0  # of its output that the matcher has seen


@dataclass(frozen=True)
class StepMasks:
    """Masks for some rows of a step."""

    rows: list[int]  # n
    words: np.ndarray  # [n, vocabulary / 32] int32, a bit a token
    complete: frozenset[int]  # rows whose answer has no continuation: only an end token is allowed

    def apply(self, logits: torch.Tensor) -> None:
        """Minus infinity for what is not allowed. In place, without waiting for the device."""
        device = logits.device
        octets = upload(self.words.view(np.uint8).astype(np.int64), device)
        allowed = _BITS.to(device)[octets].flatten(1)[:, : logits.shape[1]]
        if len(self.rows) == len(logits):
            logits.masked_fill_(~allowed, float("-inf"))
            return
        rows = upload(self.rows, device)
        logits[rows] = logits[rows].masked_fill(~allowed, float("-inf"))


class GrammarMasks:
    """Args: vocab_size: width of the logits."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = (vocab_size + 31) // 32
        self._progress: WeakKeyDictionary[SequenceKey, _Progress] = WeakKeyDictionary()
        self._executor: LLExecutor | None = None
        self._thread = ThreadPoolExecutor(1, "grammar-masks")

    def start(
        self, sequences: Sequence[ScheduledSequence], pending: Callable[[], Mapping[SequenceKey, int]]
    ) -> "Future[StepMasks] | None":
        """Begin to fill the masks of the sequences that have a grammar; None if no one has.

        Args:
            sequences: the rows that are sampled from, in order.
            pending: waits for the last tokens that the host does not know yet.
        """
        if all(sequence.grammar is None for sequence in sequences):
            return None
        return self._thread.submit(self._fill, sequences, pending)

    def _fill(
        self, sequences: Sequence[ScheduledSequence], pending: Callable[[], Mapping[SequenceKey, int]]
    ) -> StepMasks:
        rows = [row for row, sequence in enumerate(sequences) if sequence.grammar is not None]
        words = np.zeros((len(rows), self._num_words), dtype=np.int32)
        moved: list[tuple[LLMatcher, int]] = []
        for index, row in enumerate(rows):
            matcher = self._advance(sequences[row], pending)
            if matcher is not None:
                moved.append((matcher, index))
        if moved:
            if self._executor is None:
                self._executor = LLExecutor()
            self._executor.unsafe_compute_mask_ptr(
                moved, words.ctypes.data, words.shape[1] * words.itemsize, len(words)
            )
        complete = set()
        for matcher, index in moved:
            if matcher.is_error():  # it allows an end token then, as if the answer were complete
                words[index] = 0
            elif matcher.is_stopped():
                complete.add(rows[index])
        return StepMasks(rows, words, frozenset(complete))

    def _advance(
        self, sequence: ScheduledSequence, pending: Callable[[], Mapping[SequenceKey, int]]
    ) -> LLMatcher | None:
        """The sequence's matcher, after all tokens of its output."""
        assert sequence.grammar is not None
        progress = self._progress.get(sequence.key)
        if progress is None:
            progress = self._progress[sequence.key] = _Progress(sequence.grammar.start())
        known = len(sequence.token_ids) - sequence.num_output_tokens + progress.num_tokens
        new = list(sequence.token_ids[known:])
        if new and new[-1] == PENDING:
            new[-1] = pending()[sequence.key]
        progress.num_tokens += len(new)
        # A sequence that turns out to have ended is still in this step; what is drawn for it is dropped.
        if progress.matcher is not None and (min(new, default=0) < 0 or not progress.matcher.consume_tokens(new)):
            progress.matcher = None
        return progress.matcher
