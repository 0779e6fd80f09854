"""From logits to tokens, for all rows of a step at once.

Order of the steps (vLLM's): bias and penalties and minimum length on the raw logits, then temperature, then min-p,
top-k and top-p, then the draw. Reported log-probabilities are those of the raw logits, in float32.
"""

from dataclasses import dataclass

import torch

from polymoe.engine.request import TokenLogprobs
from polymoe.engine.sequence import Sequence
from polymoe.model.upload import upload

NEG_INF = float("-inf")


@dataclass(frozen=True)
class SampleOutput:
    """`token_ids [R]` int64 on the CPU, and log-probabilities for the rows that asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


def sample(logits: torch.Tensor, sequences: list[Sequence], generator: torch.Generator) -> SampleOutput:
    """Draw one token a row.

    Args:
        logits: `[R, vocabulary]`; row i belongs to `sequences[i]`. Changed in place.
        generator: for requests without a seed, on the logits' device.

    The host waits for the device once, for the tokens (and for log-probabilities where they are asked for).
    """
    logits = logits.float()
    wanted = [s.request.sampling.logprobs for s in sequences]
    raw = torch.log_softmax(logits, dim=-1) if any(w is not None for w in wanted) else None
    _edit(logits, sequences)
    greedy = [i for i, s in enumerate(sequences) if s.request.sampling.greedy]
    tokens = logits.argmax(dim=-1)
    if len(greedy) < len(sequences):
        rows = [i for i, s in enumerate(sequences) if not s.request.sampling.greedy]
        index = upload(rows, logits.device)
        tokens[index] = _draw(logits[index], [sequences[i] for i in rows], generator)
    token_ids = tokens.tolist()
    reports: list[TokenLogprobs | None] = [None] * len(sequences)
    if raw is not None:
        rows = [i for i, w in enumerate(wanted) if w is not None]
        counts = [w for w in wanted if w is not None]
        for i, report in zip(rows, top_logprobs(raw[rows], [token_ids[i] for i in rows], counts), strict=True):
            reports[i] = report
    return SampleOutput(token_ids, reports)


def top_logprobs(logprobs: torch.Tensor, token_ids: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """For each row of `logprobs [R, vocabulary]`: the given token first, then the `counts[i]` most probable."""
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(max(max(counts), 1), dim=-1)
    columns = zip(
        token_ids, chosen[:, 0].tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist(), counts, strict=True
    )
    return [
        TokenLogprobs([token, *indices[:count]], [value, *values[:count]], rank)
        for token, value, rank, indices, values, count in columns
    ]


def _edit(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Logit bias, penalties, and stop tokens held back until the minimum length. In place."""
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if sampling.repetition_penalty != 1.0:
            before = sequence.token_ids[sequence.request.num_encoder_tokens :]
            seen = torch.tensor(sorted(set(before)), device=logits.device)
            values = logits[row, seen]
            penalty = sampling.repetition_penalty
            logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            output = torch.tensor(
                sequence.token_ids[sequence.num_prompt_tokens :], dtype=torch.int64, device=logits.device
            )
            ids, counts = torch.unique(output, return_counts=True)
            logits[row, ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
        if sequence.num_output_tokens < sampling.min_tokens and sequence.request.stop_token_ids:
            logits[row, torch.tensor(sequence.request.stop_token_ids, device=logits.device)] = NEG_INF


def _draw(logits: torch.Tensor, sequences: list[Sequence], generator: torch.Generator) -> torch.Tensor:
    """Random draws `[R]`: argmax of probability / exponential noise is a draw from the probabilities."""
    sampling = [s.request.sampling for s in sequences]
    device = logits.device
    logits = logits / upload([p.temperature for p in sampling], device)[:, None]
    logits = _truncate(
        logits,
        min_p=[p.min_p for p in sampling],
        top_k=[p.top_k if p.top_k > 0 else logits.shape[1] for p in sampling],
        top_p=[p.top_p for p in sampling],
    )
    noise = torch.empty(logits.shape, device=device).exponential_(generator=generator)
    for row, sequence in enumerate(sequences):
        if sequence.generator is not None:
            noise[row].exponential_(generator=_generator_on(device, sequence))
    return (torch.softmax(logits, dim=-1) / noise).argmax(dim=-1)


def _generator_on(device: torch.device, sequence: Sequence) -> torch.Generator:
    """The sequence's own generator; on a GPU one of its own there, made for its first draw."""
    if sequence.generator is None or sequence.generator.device.type != device.type:
        seed = sequence.request.sampling.seed
        assert seed is not None
        sequence.generator = torch.Generator(device).manual_seed(seed)
    return sequence.generator


def _truncate(logits: torch.Tensor, min_p: list[float], top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """Minus infinity for the tokens that min-p, top-k and top-p leave out; the most probable one always stays."""
    if max(min_p) > 0:
        probs = torch.softmax(logits, dim=-1)
        least = upload(min_p, logits.device)[:, None] * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probs < least, NEG_INF)
    vocabulary = logits.shape[1]
    if min(top_k) >= vocabulary and min(top_p) >= 1:
        return logits
    values, order = logits.sort(dim=-1, descending=True)
    keep = torch.arange(vocabulary, device=logits.device) < upload(top_k, logits.device)[:, None]
    values = values.masked_fill(~keep, NEG_INF)
    probs = torch.softmax(values, dim=-1)
    before = probs.cumsum(dim=-1) - probs  # probability of the better tokens
    values = values.masked_fill(before >= upload(top_p, logits.device)[:, None], NEG_INF)
    return torch.empty_like(logits).scatter_(1, order, values)
