"""Blocks of the paged KV cache: who holds them, which can be reused for a known prefix, which are free.

A full block of a finished or running sequence is known by the hash of its whole prefix, salted with the variant's
version and the tenant, because keys and values differ between variants even for the same tokens. A block that nobody
holds stays known until it is needed for something else (least recently freed first).
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """Digest of a full block: everything before it (`parent`) and its own tokens."""
    return hashlib.blake2b(parent + np.asarray(token_ids, dtype=np.int64).tobytes(), digest_size=16).digest()


def salt_of(version: str, cache_salt: str) -> bytes:
    """Root of a sequence's hash chain: what is computed by another version or for another tenant never matches."""
    return hashlib.blake2b(f"{len(version)}:{version}{cache_salt}".encode(), digest_size=16).digest()


@dataclass
class BlockManager:
    """Allocates `num_blocks` blocks of `block_size` tokens. All methods take and return block indices."""

    num_blocks: int
    block_size: int
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        # Ordered by when a block became free; blocks with a known hash among them are the cache.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        self._holders = [0] * self.num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks held by unfinished sequences, 0 to 1."""
        return 1.0 - len(self._free) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return (num_tokens + self.block_size - 1) // self.block_size

    def match_prefix(self, token_ids: list[int], salt: bytes) -> list[int]:
        """Known blocks of the longest cached prefix. At least one token is always left to compute:

        |--- matched full blocks ---|-- rest, >= 1 token --|
        """
        if not self.enable_prefix_caching:
            return []
        matched: list[int] = []
        parent = salt
        for start in range(0, (len(token_ids) - 1) // self.block_size * self.block_size, self.block_size):
            parent = hash_block(parent, token_ids[start : start + self.block_size])
            block = self._block_of.get(parent)
            if block is None:
                break
            matched.append(block)
        return matched

    def can_allocate(self, matched: list[int], num_new: int) -> bool:
        """Whether `num_new` blocks remain once the `matched` ones are taken out of the free list."""
        return num_new <= self.available(matched)

    def available(self, matched: list[int]) -> int:
        """Blocks that remain once the `matched` ones are taken out of the free list."""
        return len(self._free) - sum(self._holders[b] == 0 for b in matched)

    def take(self, matched: list[int]) -> None:
        """Hold cached blocks for one more sequence."""
        for block in matched:
            self._holders[block] += 1
            self._free.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """`count` fresh blocks; the caller asked `can_allocate` first."""
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            known = self._hash_of.pop(block, None)
            if known is not None:
                del self._block_of[known]
            self._holders[block] = 1
            taken.append(block)
        return taken

    def remember(self, block: int, digest: bytes) -> None:
        """Make a full, computed block findable. The first block with a given content stays the known one."""
        if self.enable_prefix_caching and digest not in self._block_of and block not in self._hash_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def release(self, blocks: list[int]) -> None:
        """A sequence lets go of its blocks; the end of the prefix becomes free first, its beginning last."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None

    def check_integrity(self) -> None:
        """No block is lost, free twice, or free while held; hashes and blocks match one to one."""
        for block, holders in enumerate(self._holders):
            assert holders >= 0, f"block {block} released too often"
            assert (holders == 0) == (block in self._free), f"block {block}: {holders} holders"
        assert {b: h for h, b in self._block_of.items()} == self._hash_of
