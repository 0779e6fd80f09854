"""Blocks are never lost, never shared by mistake, and a known prefix is found only by who may."""

import random

from polymoe.engine.scheduling.block_manager import BlockManager, hash_block, salt_of


def fill(blocks: BlockManager, tokens: list[int], salt: bytes) -> list[int]:
    """What the scheduler does for one sequence: match, allocate the rest, remember the full blocks."""
    matched = blocks.match_prefix(tokens, salt)
    missing = blocks.blocks_for(len(tokens)) - len(matched)
    assert blocks.can_allocate(matched, missing)
    blocks.take(matched)
    held = matched + blocks.allocate(missing)
    parent = salt
    for i in range(len(tokens) // blocks.block_size):
        parent = hash_block(parent, tokens[i * blocks.block_size : (i + 1) * blocks.block_size])
        blocks.remember(held[i], parent)
    return held


def test_a_prefix_is_found_again_but_one_token_is_always_left() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    salt = salt_of("version", "")
    held = fill(blocks, list(range(8)), salt)
    assert blocks.match_prefix(list(range(8)), salt) == held[:1]
    assert blocks.match_prefix(list(range(9)), salt) == held[:2]
    assert blocks.match_prefix([0, 1, 2, 9, 4, 5, 6, 7, 8], salt) == []


def test_another_version_or_tenant_finds_nothing() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    fill(blocks, list(range(8)), salt_of("version-a", "tenant"))
    for salt in (salt_of("version-b", "tenant"), salt_of("version-a", ""), salt_of("version-at", "enant")):
        assert blocks.match_prefix(list(range(9)), salt) == []


def test_blocks_of_a_finished_sequence_stay_known_until_they_are_needed() -> None:
    blocks = BlockManager(num_blocks=3, block_size=2)
    salt = salt_of("v", "")
    held = fill(blocks, [1, 2, 3, 4], salt)
    blocks.release(held)
    assert blocks.num_free == 3
    assert blocks.match_prefix([1, 2, 3, 4, 5], salt) == held
    blocks.allocate(2)  # the unused one, then the end of the old prefix
    assert blocks.match_prefix([1, 2, 3, 4, 5], salt) == held[:1]
    blocks.check_integrity()


def test_matched_blocks_do_not_count_as_room() -> None:
    blocks = BlockManager(num_blocks=3, block_size=2)
    salt = salt_of("v", "")
    blocks.release(fill(blocks, [1, 2, 3, 4], salt))
    matched = blocks.match_prefix([1, 2, 3, 4, 5, 6, 7, 8], salt)
    assert len(matched) == 2
    assert blocks.can_allocate(matched, 1)
    assert not blocks.can_allocate(matched, 2)


def test_random_traffic_keeps_every_invariant() -> None:
    rng = random.Random(0)
    blocks = BlockManager(num_blocks=20, block_size=3)
    live: list[list[int]] = []
    for _ in range(2000):
        if live and rng.random() < 0.5:
            blocks.release(live.pop(rng.randrange(len(live))))
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 18))]
            salt = salt_of(str(rng.randrange(2)), "")
            if blocks.can_allocate(
                matched := blocks.match_prefix(tokens, salt), blocks.blocks_for(len(tokens)) - len(matched)
            ):
                live.append(fill(blocks, tokens, salt))
        blocks.check_integrity()
        assert blocks.num_free == 20 - len({b for held in live for b in held})
