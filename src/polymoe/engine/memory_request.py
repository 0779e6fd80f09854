"""What an engine wants of a GPU's memory beside the weights, from its options."""

import math

import torch

from polymoe.bundle.reader import Bundle
from polymoe.config import EngineConfig
from polymoe.model.backends.device_facts import DeviceFacts
from polymoe.model.memory_plan import MemoryRequest, workspace_bytes
from polymoe.model.stock.stock_model import StockModel


def memory_request(
    config: EngineConfig, bundle: Bundle, stock: StockModel, dtype: torch.dtype, facts: DeviceFacts, longest: int
) -> MemoryRequest:
    """The workspace is that of the largest step; `longest`: tokens of the longest sequence."""
    text, manifest = bundle.config.get_text_config(), bundle.manifest
    per_block, needed = stock.kv_bytes_per_block(config.block_size, dtype), math.ceil(longest / config.block_size)
    states = stock.state_bytes
    asked = config.kv_cache_bytes
    if config.num_kv_blocks is not None:
        asked = config.num_kv_blocks * per_block + config.max_num_seqs * states
    return MemoryRequest(
        facts=facts,
        kv_bytes=asked,
        kv_minimum=needed * per_block + 2 * states,  # states get half of the room at most
        kv_maximum=config.max_num_seqs * (needed * per_block + states),
        headroom_bytes=(config.headroom or 0) if config.max_variants else 0,
        expert_cache_bytes=config.expert_cache_bytes if any(manifest.host_experts) else 0,
        workspace_bytes=workspace_bytes(
            tokens=config.max_num_batched_tokens,
            seqs=config.max_num_seqs,
            hidden=text.hidden_size,
            expert_width=math.prod(manifest.expert_shapes["down_proj"]) // text.hidden_size,
            top_k=getattr(text, "num_experts_per_tok", None) or manifest.num_experts,
            vocabulary=text.vocab_size,
            itemsize=dtype.itemsize,
        ),
    )
