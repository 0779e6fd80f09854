"""What fits into the memory that the KV cache may have."""

import math
from dataclasses import dataclass

from polymoe.config import EngineConfig, format_bytes
from polymoe.errors import ConfigError


@dataclass(frozen=True)
class CacheRoom:
    """`nbytes` for the blocks and for what each sequence keeps beside them, `state_bytes`."""

    config: EngineConfig
    nbytes: int
    bytes_per_block: int
    state_bytes: int

    @property
    def max_num_seqs(self) -> int:
        """Sequences that may run: at most half of the room is for their states."""
        if not self.state_bytes:
            return self.config.max_num_seqs
        return max(1, min(self.config.max_num_seqs, self.nbytes // 2 // self.state_bytes))

    def num_blocks(self, longest: int) -> int:
        """As many as the room holds and the sequences can use; at least one sequence of full length, `longest` tokens,
        else `ConfigError`."""
        size = self.config.block_size
        needed = math.ceil(longest / size)
        room = max(self.nbytes - self.max_num_seqs * self.state_bytes, 0)
        count = self.config.num_kv_blocks or min(room // self.bytes_per_block, needed * self.max_num_seqs)
        if count < needed:
            least = needed * self.bytes_per_block + 2 * self.state_bytes
            raise ConfigError(
                f"the KV cache holds {count * size} tokens, less than one sequence of max_model_len {longest}: give it "
                f"at least {format_bytes(least)} (--kv-cache) or lower --max-model-len to "
                f"{count * size}."
            )
        return count
