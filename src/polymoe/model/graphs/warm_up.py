"""Passes before the first request, so that it does not pay for compiling kernels and choosing their configurations."""

from collections.abc import Callable

import torch

from polymoe.model.batch.batch import AttentionBatch, DeviceLengths, ForwardBatch, segments_from_variants
from polymoe.model.served_model import ServedModel

_FEWEST_TOKENS = 16


def prompt_lengths(max_num_batched_tokens: int) -> list[int]:
    """Powers of two up to the largest step, and that: kernels are chosen by the power of two of their rows."""
    lengths = [_FEWEST_TOKENS]
    while lengths[-1] * 2 < max_num_batched_tokens:
        lengths.append(lengths[-1] * 2)
    return [length for length in lengths if length < max_num_batched_tokens] + [max_num_batched_tokens]


@torch.inference_mode()
def warm_up(model: ServedModel, lengths: list[int], progress: Callable[[float], None]) -> None:
    """One prompt of each length, all in the null block: needs device kernels, changes nothing that anyone reads."""
    cache, device = model.kv_cache, model.device
    assert model.context.backend.pads_steps, "only where steps are padded is there a null block"
    variant = model.some_variant
    for done, count in enumerate(lengths):
        progress(done / len(lengths))
        positions = torch.arange(count, device=device)
        blocks = -(-count // cache.block_size)
        ends = torch.tensor([0, count], dtype=torch.int32, device=device)
        attention = AttentionBatch(
            query_start_loc=[0, count],
            seq_lens=[count],
            block_table=torch.full((1, blocks), cache.num_blocks, device=device),
            slot_mapping=torch.full((count,), cache.num_blocks * cache.block_size, device=device),
            token_sequence=torch.zeros_like(positions),
            token_visible=positions + 1,
            device_lengths=DeviceLengths(ends, ends[1:], max_query_len=count),
        )
        tokens, sampled = (segments_from_variants([variant], [rows], device) for rows in (count, 1))
        batch = ForwardBatch(tokens=tokens, sampled=sampled, attention=attention)
        model.compute(torch.zeros_like(positions), positions, batch, torch.tensor([count - 1], device=device))
    progress(1.0)
