"""The pool's rules one by one; test_block_pool_stateful.py mixes them."""

from __future__ import annotations

import pytest

from baton.engine.block_pool import BlockPool, StaleBlock, Use
from baton.engine.ports import BlockCounts
from baton.engine.prefix_cache import PrefixHit

NO_HIT = PrefixHit()


def filled(pool: BlockPool, owner: str, tokens: list[int], use: Use = Use.RUNNING) -> list[int]:
    """A holder whose tokens are all computed."""
    blocks = pool.blocks_for(len(tokens))
    table = pool.open(owner, blocks, pool.match_prefix(tokens, len(tokens)), use)
    pool.grow(owner, blocks)
    pool.register(owner, tokens, len(tokens))
    return table


def test_growth_is_promised_at_the_start() -> None:
    pool = BlockPool(10, 4, prefix_cache=False)
    pool.open("a", 7, NO_HIT, Use.RUNNING)
    assert pool.counts().free == 10
    assert pool.can_admit(3, NO_HIT)
    assert not pool.can_admit(4, NO_HIT)
    with pytest.raises(ValueError, match="may not hold 4"):
        pool.open("b", 4, NO_HIT, Use.RUNNING)
    pool.open("b", 3, NO_HIT, Use.LEASED)
    pool.grow("b", 3)
    pool.grow("a", 7)
    assert pool.counts() == BlockCounts(0, 0, 7, 3, 0, 10)
    with pytest.raises(ValueError, match="promised 7"):
        pool.grow("a", 8)


def test_growing_to_less_takes_nothing() -> None:
    pool = BlockPool(10, 4, prefix_cache=False)
    table = pool.open("a", 7, NO_HIT, Use.RUNNING)
    pool.grow("a", 3)
    pool.grow("a", 2)
    assert len(table) == 3
    assert pool.committed == 7
    pool.release("a")
    assert pool.committed == 0
    assert pool.counts().free == 10


def test_released_blocks_are_found_by_prefix() -> None:
    pool = BlockPool(10, 4, prefix_cache=True)
    table = list(filled(pool, "a", list(range(10))))
    pool.release("a")
    assert pool.counts() == BlockCounts(8, 2, 0, 0, 0, 10)
    assert pool.match_prefix(list(range(10)), 10).blocks == tuple(table[:2])
    assert pool.match_prefix(list(range(10)), 7).blocks == tuple(table[:1])
    assert pool.match_prefix([*range(4), 99, 5, 6, 7], 8).blocks == tuple(table[:1])
    assert pool.match_prefix([99, *range(1, 10)], 10).blocks == ()
    # The same tokens after another beginning are other KV.
    assert pool.match_prefix(list(range(4, 8)), 4).blocks == ()


def test_a_block_is_found_only_once_it_is_computed() -> None:
    pool = BlockPool(10, 4, prefix_cache=True)
    tokens = list(range(12))
    pool.open("a", 3, NO_HIT, Use.RUNNING)
    pool.grow("a", 3)
    pool.register("a", tokens, 7)
    assert len(pool.match_prefix(tokens, 12).blocks) == 1
    pool.register("a", tokens, 8)
    assert len(pool.match_prefix(tokens, 12).blocks) == 2


def test_what_is_computed_is_found_only_once_it_is_there() -> None:
    """Its hashes are ready before, also those of a prompt that is computed in pieces."""
    pool = BlockPool(8, 4, prefix_cache=True)
    tokens = list(range(17))
    pool.open("a", 5, PrefixHit(), Use.RUNNING)
    pool.grow("a", 5)
    for soon, computed in ((9, 8), (13, 7), (17, 12), (17, 17)):
        pool.register_soon("a", tokens, soon)
        assert len(pool.match_prefix(tokens, 17).blocks) < soon // 4
        pool.register("a", tokens, computed)
        assert pool.match_prefix(tokens, 17).blocks == pool.blocks_of("a")[: max(8, computed) // 4]


def test_shared_blocks_cost_nothing_twice() -> None:
    pool = BlockPool(6, 4, prefix_cache=True)
    tokens = list(range(16))
    filled(pool, "a", tokens)
    hit = pool.match_prefix(tokens, 16)
    assert len(hit.blocks) == 4
    assert pool.can_admit(6, hit)
    assert not pool.can_admit(7, hit)
    pool.open("b", 6, hit, Use.LEASED)
    assert pool.counts().running == 4
    pool.release("a")
    assert pool.counts() == BlockCounts(2, 0, 0, 4, 0, 6)


def test_a_hit_on_an_unheld_block_counts_as_taken() -> None:
    pool = BlockPool(4, 4, prefix_cache=True)
    tokens = list(range(8))
    filled(pool, "a", tokens)
    pool.release("a")
    pool.open("other", 2, NO_HIT, Use.RUNNING)
    hit = pool.match_prefix(tokens, 8)
    assert pool.can_admit(2, hit)
    assert not pool.can_admit(3, hit)


def test_eviction_takes_the_oldest_and_of_a_sequence_the_last() -> None:
    pool = BlockPool(4, 4, prefix_cache=True)
    old, new = list(range(8)), list(range(100, 108))
    filled(pool, "old", old)
    filled(pool, "new", new)
    pool.release("old")
    pool.release("new")
    pool.open("x", 4, NO_HIT, Use.RUNNING)
    for taken, (left_old, left_new) in enumerate([(1, 2), (0, 2), (0, 1), (0, 0)], 1):
        pool.grow("x", taken)
        assert len(pool.match_prefix(old, 8).blocks) == left_old
        assert len(pool.match_prefix(new, 8).blocks) == left_new


def test_equal_content_twice_keeps_the_first() -> None:
    pool = BlockPool(8, 4, prefix_cache=True)
    tokens = list(range(8))
    for owner in "ab":
        pool.open(owner, 2, NO_HIT, Use.RUNNING)
        pool.grow(owner, 2)
    pool.register("a", tokens, 8)
    pool.register("b", tokens, 8)
    first = pool.blocks_of("a")
    pool.release("b")
    assert pool.counts().cached == 0
    pool.release("a")
    assert pool.counts() == BlockCounts(6, 2, 0, 0, 0, 8)
    assert pool.match_prefix(tokens, 8).blocks == first


def test_generations_reveal_stale_names() -> None:
    pool = BlockPool(2, 4, prefix_cache=False)
    table = pool.open("a", 2, NO_HIT, Use.LEASED)
    generation = pool.grow("a", 2)
    block = table[0]
    pool.check(block, generation)
    pool.release("a")
    with pytest.raises(StaleBlock):
        pool.check(block, generation)
    pool.open("b", 2, NO_HIT, Use.LEASED)
    again = pool.grow("b", 2)
    assert again > generation
    pool.check(block, again)
    with pytest.raises(StaleBlock):
        pool.check(block, generation)


def test_fresh_blocks_are_announced_before_they_are_used() -> None:
    seen: list[int] = []
    pool = BlockPool(4, 4, prefix_cache=True, on_allocate=seen.extend)
    tokens = list(range(8))
    first = list(filled(pool, "a", tokens))
    assert seen == first
    pool.release("a")
    filled(pool, "b", tokens)
    assert seen == first


def test_a_fork_shares_until_it_writes() -> None:
    pool = BlockPool(8, 4, prefix_cache=False)
    table = pool.open("a", 4, NO_HIT, Use.RUNNING)
    pool.grow("a", 2)
    child = pool.fork("a", "b", 6, 4)
    assert child == table
    assert child is not table
    assert pool.counts().running == 2
    # Two more each, and a copy of the half-full block.
    assert pool.committed == 2 + 2 + 2 + 1
    copy = pool.ensure_writable("b", 1)
    assert copy == (table[1], child[1])
    assert table[1] != child[1]
    assert pool.ensure_writable("a", 1) is None
    assert pool.ensure_writable("b", 1) is None
    with pytest.raises(ValueError, match="never written"):
        pool.ensure_writable("b", 0)
    assert pool.committed == 3 + 2 + 2


def test_a_fork_that_ends_gives_its_copy_back() -> None:
    pool = BlockPool(8, 4, prefix_cache=False)
    pool.open("a", 2, NO_HIT, Use.RUNNING)
    pool.grow("a", 2)
    assert pool.fork("a", "b", 6, 2) is not None
    assert pool.fork("a", "c", 6, 2) is not None
    assert pool.committed == 4
    pool.release("b")
    assert pool.committed == 3
    pool.release("a")
    assert pool.committed == 2
    assert pool.ensure_writable("c", 1) is None


def test_a_fork_without_room_is_refused() -> None:
    pool = BlockPool(4, 4, prefix_cache=False)
    pool.open("a", 2, NO_HIT, Use.RUNNING)
    pool.grow("a", 2)
    assert pool.fork("a", "b", 6, 4) is None
    assert not pool.holds("b")
    assert pool.fork("a", "b", 8, 4) is not None


def test_names_are_unique() -> None:
    pool = BlockPool(4, 4, prefix_cache=False)
    pool.open("a", 1, NO_HIT, Use.LEASED)
    pool.open("b", 1, NO_HIT, Use.LEASED)
    with pytest.raises(ValueError, match="already holds"):
        pool.open("a", 1, NO_HIT, Use.RUNNING)
    with pytest.raises(ValueError, match="already holds"):
        pool.rename("a", "b")
    assert pool.holds("a")
    pool.rename("a", "a")
    pool.rename("a", "c")
    assert not pool.holds("a")
    with pytest.raises(KeyError):
        pool.release("a")
