"""From logits to tokens, for all rows of a step at once.

Order of the steps (vLLM's): bias, penalties, minimum length and what is allowed on the raw logits, then temperature,
then min-p, top-k and top-p, then the draw. Reported log-probabilities are those of the raw logits, in float32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from polymoe.engine.grammar_masks import StepMasks
from polymoe.engine.scheduling.step_record import NO_TOKEN, NOTHING_ALLOWED, ScheduledSequence, SequenceKey
from polymoe.model.transfer.download import Download
from polymoe.model.transfer.upload import upload
from polymoe.protocol.request import TokenLogprobs

NEG_INF = float("-inf")
_LARGEST = torch.finfo(torch.float32).max
# A repetition penalty below this takes any logit out of the range of float32, and orders tokens in the same way.
_LEAST_PENALTY = 1e-20


class Generators:
    """Sources of random numbers on one device: `shared` by the requests without a seed, and one for each that has one.

    Args: `seed`: of the shared one.
    """

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self.shared = torch.Generator(device).manual_seed(seed)
        self._own: WeakKeyDictionary[SequenceKey, torch.Generator] = WeakKeyDictionary()

    def of(self, key: SequenceKey, seed: int) -> torch.Generator:
        """The sequence's own, which goes on from step to step, preempted or not."""
        if key not in self._own:
            self._own[key] = torch.Generator(self.shared.device).manual_seed(seed)
        return self._own[key]


@dataclass(frozen=True)
class SampleOutput:
    """What the rows of a step drew, for the host once it asks."""

    tokens: torch.Tensor  # [R] int64, on the device; 0 where there is none
    _download: Download  # tokens, best logits, and the top log-probabilities of the rows that asked for them
    _wanted: list[int | None]  # [R]

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Token ids `[R]` (or `NO_TOKEN`, `NOTHING_ALLOWED`), and log-probabilities of the rows that asked for them.
        The only place that waits."""
        tokens, best, *top = self._download.wait()
        reports: list[TokenLogprobs | None] = [None] * len(self._wanted)
        if top:
            rows = [i for i, w in enumerate(self._wanted) if w is not None]
            counts = [w for w in self._wanted if w is not None]
            for i, report in zip(rows, _reports(top, counts), strict=True):
                reports[i] = report
        found: list[int] = tokens.tolist()
        for row, value in enumerate(best.tolist()):
            if not value > NEG_INF:
                found[row] = NO_TOKEN if math.isnan(value) else NOTHING_ALLOWED
        return found, reports


def sample(
    logits: torch.Tensor,
    sequences: list[ScheduledSequence],
    generators: Generators,
    pending: Mapping[SequenceKey, torch.Tensor] | None = None,
    masks: StepMasks | None = None,
) -> SampleOutput:
    """Draw one token a row, without waiting for the device.

    Args:
        logits: `[R, vocabulary]`; row i belongs to `sequences[i]`. Changed in place.
        generators: on the logits' device.
        pending: the last token, `[]` on the device, of sequences whose host does not know it yet.
        masks: what the grammars of some sequences allow.
    """
    if masks is not None or not all(map(_takes_the_best, sequences)):
        logits = logits.float()
    wanted = [s.request.sampling.logprobs for s in sequences]
    asking = [i for i, w in enumerate(wanted) if w is not None]
    raw = torch.log_softmax(logits[upload(asking, logits.device)], dim=-1) if asking else None
    _edit(logits, sequences, pending or {}, frozenset() if masks is None else masks.complete)
    if masks is not None:
        masks.apply(logits)
    best, tokens = logits.max(dim=-1)  # which takes NaN for the largest, and the first of equal ones
    rows = [i for i, s in enumerate(sequences) if not s.request.sampling.greedy]
    if rows:
        index = upload(rows, logits.device)
        tokens[index] = _draw(logits[index], best[index, None], [sequences[i] for i in rows], generators)
    top: list[torch.Tensor] = []
    if raw is not None:
        top = _top(raw, tokens[upload(asking, logits.device)], max(w for w in wanted if w is not None))
    return SampleOutput(tokens, Download([tokens, best, *top]), wanted)


def top_logprobs(logprobs: torch.Tensor, token_ids: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """For each row of `logprobs [R, vocabulary]`: the given token first, then the `counts[i]` most probable. Waits."""
    return _reports(Download(_top(logprobs, upload(token_ids, logprobs.device), max(counts))).wait(), counts)


def _top(logprobs: torch.Tensor, tokens: torch.Tensor, most: int) -> list[torch.Tensor]:
    """Of each row: the given token, its log-probability and rank `[R]`; ids and values of the best `[R, most]`."""
    chosen = logprobs.gather(1, tokens[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    best = logprobs.topk(max(most, 1), dim=-1)
    return [tokens, chosen[:, 0], ranks, best.indices, best.values]


def _reports(top: Sequence[torch.Tensor], counts: list[int]) -> list[TokenLogprobs]:
    """What `_top` found, on the host, with `counts[i]` of the best for row i."""
    columns = zip(*(tensor.tolist() for tensor in top), counts, strict=True)
    return [
        TokenLogprobs([token, *indices[:count]], [value, *values[:count]], rank)
        for token, value, rank, indices, values, count in columns
    ]


def _takes_the_best(sequence: ScheduledSequence) -> bool:
    """Whether its token is the one with the largest logit, whatever these are rounded to, and nobody asks for more."""
    sampling, request = sequence.request.sampling, sequence.request
    plain = sampling.greedy and sampling.logprobs is None and sampling.allowed_token_ids is None
    plain = plain and not (sampling.logit_bias or request.banned)
    penalties = sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1.0
    return plain and not penalties and sampling.min_tokens <= sequence.num_output_tokens


def _edit(
    logits: torch.Tensor,
    sequences: list[ScheduledSequence],
    pending: Mapping[SequenceKey, torch.Tensor],
    complete: frozenset[int],
) -> None:
    """Logit bias, penalties, tokens that are not allowed, and stop tokens held back until the minimum length. In place.

    Args: `complete`: rows that must end now, however short they are.
    """
    device = logits.device
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        last = pending.get(sequence.key)
        if sampling.repetition_penalty != 1.0:
            seen = _tokens(sequence, sequence.request.num_encoder_tokens, last, device)
            values = logits[row, seen]
            penalty = max(sampling.repetition_penalty, _LEAST_PENALTY)
            logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            output = _tokens(sequence, len(sequence.request.prompt_token_ids), last, device)
            counts = torch.zeros_like(logits[row]).index_add_(0, output, torch.ones_like(output, dtype=logits.dtype))
            logits[row] -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
        if sampling.logit_bias:
            ids = upload(list(sampling.logit_bias), device)
            logits[row, ids] += upload(list(sampling.logit_bias.values()), device)
        if sampling.allowed_token_ids is not None:
            ids = upload(sampling.allowed_token_ids, device)
            allowed = logits[row, ids]
            logits[row] = NEG_INF
            logits[row, ids] = allowed
        if sequence.request.banned:
            _ban(logits[row], sequence, last)
        short = sequence.num_output_tokens < sampling.min_tokens and row not in complete
        if short and sequence.request.stop_token_ids:
            logits[row, upload(sequence.request.stop_token_ids, device)] = NEG_INF


def _ban(logits: torch.Tensor, sequence: ScheduledSequence, last: torch.Tensor | None) -> None:
    """Minus infinity in `logits [vocabulary]` for what would complete one of the sequence's banned rows of tokens."""
    output = list(sequence.token_ids[len(sequence.request.prompt_token_ids) :])
    known = output if last is None else output[:-1]
    ends: list[int] = []
    if_last: list[tuple[int, int]] = []  # (end, the token before it), where only the device knows that one
    for *before, end in sequence.request.banned:
        if not before:
            ends.append(end)
        elif last is None:
            if known[-len(before) :] == before:
                ends.append(end)
        elif known[len(known) - len(before) + 1 :] == before[:-1] and len(output) >= len(before):
            if_last.append((end, before[-1]))
    if ends:
        logits[upload(ends, logits.device)] = NEG_INF
    if if_last and last is not None:
        pairs = upload(if_last, logits.device)  # [n, 2]
        hit = torch.where(pairs[:, 1] == last, NEG_INF, 0.0)
        logits.scatter_add_(0, pairs[:, 0], hit.to(logits.dtype))


def _tokens(sequence: ScheduledSequence, start: int, last: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The sequence's tokens from `start` on, int64 on the device; `last`: its last one, where the host lacks it."""
    known = sequence.token_ids[start:]
    if last is None:
        return upload(np.array(known, dtype=np.int64), device)
    return torch.cat([upload(np.array(known[:-1], dtype=np.int64), device), last[None]])


def _draw(
    logits: torch.Tensor, best: torch.Tensor, sequences: list[ScheduledSequence], generators: Generators
) -> torch.Tensor:
    """Random draws `[R]`: argmax of probability / exponential noise is a draw from the probabilities.

    `best [R, 1]`: the largest logit of each row. It is subtracted first, so that nothing becomes infinite, whatever the
    temperature.
    """
    sampling = [s.request.sampling for s in sequences]
    device = logits.device
    logits = logits.clamp(max=_LARGEST) - best.clamp(max=_LARGEST)
    logits = logits / upload([p.temperature for p in sampling], device)[:, None]
    logits = _truncate(
        logits,
        min_p=[p.min_p for p in sampling],
        top_k=[p.top_k if p.top_k > 0 else logits.shape[1] for p in sampling],
        top_p=[p.top_p for p in sampling],
    )
    noise = torch.empty(logits.shape, device=device).exponential_(generator=generators.shared)
    for row, sequence in enumerate(sequences):
        if sequence.request.sampling.seed is not None:
            noise[row].exponential_(generator=generators.of(sequence.key, sequence.request.sampling.seed))
    return (torch.softmax(logits, dim=-1) / noise).argmax(dim=-1)


def _truncate(logits: torch.Tensor, min_p: list[float], top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """Minus infinity for the tokens that min-p, top-k and top-p leave out; the most probable one always stays."""
    if max(min_p) > 0:
        probs = torch.softmax(logits, dim=-1)
        least = upload(min_p, logits.device)[:, None] * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probs < least, NEG_INF)
    vocabulary = logits.shape[1]
    if min(top_k) >= vocabulary and min(top_p) >= 1:
        return logits
    values, order = logits.sort(dim=-1, descending=True, stable=True)  # of equal ones the first stays, as for argmax
    keep = torch.arange(vocabulary, device=logits.device) < upload(top_k, logits.device)[:, None]
    values = values.masked_fill(~keep, NEG_INF)
    probs = torch.softmax(values, dim=-1)
    before = probs.cumsum(dim=-1) - probs  # probability of the better tokens
    # A top_p that float32 rounds to zero would leave out the first as well.
    limits = upload(top_p, logits.device)[:, None].clamp(min=torch.finfo(torch.float32).tiny)
    values = values.masked_fill(before >= limits, NEG_INF)
    return torch.empty_like(logits).scatter_(1, order, values)
