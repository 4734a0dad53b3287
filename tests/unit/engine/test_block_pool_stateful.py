"""Any sequence of operations conserves blocks, honours every promise and never gives a block to two writers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from baton.engine.block_pool import BlockPool, Use

BLOCK_SIZE = 2
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=12)


class PoolMachine(RuleBasedStateMachine):
    """`model` keeps, for every holder, its block table, its tokens and how much it was promised."""

    owners = Bundle("owners")

    @initialize(num_blocks=st.integers(1, 12), prefix_cache=st.booleans())
    def make(self, num_blocks: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, prefix_cache, on_allocate=self._allocated)
        self.tables: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.promised: dict[str, int] = {}
        self.uses: dict[str, Use] = {}
        self.content: dict[int, tuple[int, ...]] = {}
        self.number = 0

    def _allocated(self, blocks: Sequence[int]) -> None:
        held = {block for table in self.tables.values() for block in table}
        assert not held & set(blocks), "a held block was given away"
        assert len(set(blocks)) == len(blocks)
        for block in blocks:
            self.content.pop(block, None)

    @rule(target=owners, prompt=tokens, more=st.integers(0, 6), use=st.sampled_from(Use))
    def open(self, prompt: list[int], more: int, use: Use) -> object:
        hit = self.pool.match_prefix(prompt, len(prompt))
        for index, block in enumerate(hit.blocks):
            assert self.content[block] == tuple(prompt[: (index + 1) * BLOCK_SIZE]), "a hit with other content"
        max_blocks = self.pool.blocks_for(len(prompt) + more)
        if not self.pool.can_admit(max_blocks, hit):
            return multiple()
        owner = f"r{self.number}"
        self.number += 1
        self.tables[owner] = self.pool.open(owner, max_blocks, hit, use)
        self.tokens[owner] = prompt
        self.promised[owner] = max_blocks
        self.uses[owner] = use
        return owner

    @rule(owner=owners)
    def compute(self, owner: str) -> None:
        """Growth within the promise always succeeds; then the tokens' blocks can be found."""
        self.pool.grow(owner, self.pool.blocks_for(len(self.tokens[owner])))
        for index in range(len(self.tokens[owner]) // BLOCK_SIZE):
            self.content[self.tables[owner][index]] = tuple(self.tokens[owner][: (index + 1) * BLOCK_SIZE])
        self.pool.register(owner, self.tokens[owner], len(self.tokens[owner]))

    @rule(owner=owners)
    def grow_fully(self, owner: str) -> None:
        self.pool.grow(owner, self.promised[owner])
        assert len(self.tables[owner]) == self.promised[owner]

    @rule(owner=owners, use=st.sampled_from(Use))
    def move(self, owner: str, use: Use) -> None:
        self.pool.move(owner, use)
        self.uses[owner] = use

    @rule(target=owners, owner=owners, more=st.integers(0, 3), all_but_last=st.booleans())
    def fork(self, owner: str, more: int, all_but_last: bool) -> object:
        """All tokens, or all but the last: then others may have found the shared last block by its prefix."""
        length = len(self.tokens[owner]) - all_but_last
        if length < 1 or self.pool.blocks_for(length) > len(self.tables[owner]):
            return multiple()
        child = f"r{self.number}"
        self.number += 1
        max_blocks = self.pool.blocks_for(length) + more
        table = self.pool.fork(owner, child, length, max_blocks)
        if table is None:
            return multiple()
        self.tables[child], self.tokens[child] = table, self.tokens[owner][:length]
        self.promised[child], self.uses[child] = max_blocks, self.uses[owner]
        if length % BLOCK_SIZE:
            source = table[-1]
            for name in (child,) if all_but_last else (owner, child):
                copy = self.pool.ensure_writable(name, len(table) - 1)
                if copy is not None:
                    assert copy[0] == source
                    assert self.tables[name][len(table) - 1] == copy[1]
            assert self.content.get(table[-1]) is None or table[-1] == source
        return child

    @rule(owner=owners)
    def distrust(self, owner: str) -> None:
        self.pool.distrust(owner)
        for block in self.tables[owner]:
            self.content.pop(block, None)

    @rule(owner=consumes(owners))
    def release(self, owner: str) -> None:
        del self.tables[owner], self.tokens[owner], self.promised[owner], self.uses[owner]
        self.pool.release(owner)

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def every_block_is_in_one_list(self) -> None:
        counts = self.pool.counts()
        assert counts.free + counts.cached + counts.running + counts.leased + counts.quarantined == counts.total
        expected: dict[int, Use] = {}
        for owner, table in self.tables.items():
            assert len(set(table)) == len(table)
            for block in table:
                expected[block] = min(self.uses[owner], expected.get(block, Use.QUARANTINED))
        by_use = Counter(expected.values())
        assert (counts.running, counts.leased, counts.quarantined) == tuple(by_use[use] for use in Use)

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def promises_fit(self) -> None:
        held = len({block for table in self.tables.values() for block in table})
        growth = sum(self.promised[owner] - len(table) for owner, table in self.tables.items())
        assert held + growth == self.pool.committed <= self.pool.num_blocks

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for owner in self.tables:
                self.pool.release(owner)
            counts = self.pool.counts()
            assert counts.free + counts.cached == counts.total
            assert self.pool.committed == 0


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
