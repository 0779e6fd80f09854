"""The KV blocks of sequences: given when a sequence starts and grows, findable once they are full, taken back."""

from polymoe.engine.scheduling.block_manager import BlockManager, hash_block
from polymoe.engine.scheduling.sequence import Sequence
from polymoe.engine.scheduling.step_record import SequenceKey


class SequenceBlocks:
    """Moves blocks between a `BlockManager` and the sequences that hold them."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks

    def known_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks in the cache that hold the sequence's first tokens."""
        if sequence.request.sampling.prompt_logprobs is not None:  # those need every prompt token's logits
            return []
        return self.blocks.match_prefix(sequence.token_ids, sequence.salt)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that the sequence lacks to hold `num_tokens` tokens."""
        return self.blocks.blocks_for(num_tokens) - len(sequence.block_ids)

    def start(self, sequence: Sequence, matched: list[int], num_tokens: int) -> None:
        """Give a sequence without blocks the `matched` ones and room for `num_tokens` tokens in all."""
        assert not sequence.block_ids
        self.blocks.take(matched)
        sequence.block_ids = list(matched)
        sequence.num_computed_tokens = len(matched) * self.blocks.block_size
        sequence.block_hashes = self._hashes(sequence, [], len(matched))
        self.grow(sequence, num_tokens)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Room for `num_tokens` tokens in all; the caller asked `can_allocate` first."""
        sequence.block_ids += self.blocks.allocate(self.missing(sequence, num_tokens))

    def release(self, sequence: Sequence) -> None:
        """Take everything back; what was computed is found again as a known prefix, or computed again."""
        self.blocks.release(sequence.block_ids)
        sequence.block_ids, sequence.block_hashes, sequence.num_computed_tokens = [], [], 0
        sequence.state_key = SequenceKey()

    def remember_full(self, sequence: Sequence) -> None:
        """Make the blocks findable that the last step has filled."""
        start, full = len(sequence.block_hashes), sequence.num_computed_tokens // self.blocks.block_size
        if full > start:
            sequence.block_hashes = self._hashes(sequence, sequence.block_hashes, full)
            for block, digest in zip(sequence.block_ids[start:full], sequence.block_hashes[start:], strict=True):
                self.blocks.remember(block, digest)

    def _hashes(self, sequence: Sequence, known: list[bytes], num_blocks: int) -> list[bytes]:
        size = self.blocks.block_size
        hashes = list(known)
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            hashes.append(hash_block(hashes[-1] if hashes else sequence.salt, sequence.token_ids[start : start + size]))
        return hashes
