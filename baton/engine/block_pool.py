"""Who holds which KV block. The engine thread owns the pool; nobody else calls it.

Every block is in exactly one of five lists: free, cached (unheld, its KV can still be found by prefix), running, leased
(held for a hand-over) or quarantined. A block with several holders is in the most active of their lists, in the order
running, leased, quarantined.

The ledger makes growth safe: a holder states at the start how many blocks it may come to hold, and is let in only while
blocks in use plus all growth still promised fit in the pool. So `grow` never fails.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from baton.engine.ports import BlockCounts
from baton.engine.prefix_cache import Chain, PrefixCache, PrefixHit


class Use(IntEnum):
    """Why a block is held, most active first."""

    RUNNING = 0
    LEASED = 1
    QUARANTINED = 2


_UNHELD = len(Use)  # less active than any


class StaleBlock(RuntimeError):
    """A name of a block outlived its allocation (invariant I1)."""


@dataclass(slots=True, eq=False)
class _Holding:
    """Blocks of one holder in logical order. `chain` covers the full blocks that the prefix cache knows of."""

    blocks: list[int]
    max_blocks: int
    use: Use
    generation: int
    chain: Chain = field(default_factory=Chain)

    @property
    def growth(self) -> int:
        return self.max_blocks - len(self.blocks)


class BlockPool:
    """Holders are named by strings (request and reservation ids). Block counts everywhere, never bytes.

    `on_allocate` is told of every set of blocks that gets new content, before it is used.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_cache: bool,
        on_allocate: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_allocate = on_allocate
        self._prefix = PrefixCache(block_size) if prefix_cache else None
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._held: tuple[set[int], set[int], set[int]] = (set(), set(), set())
        self._refs = [[0, 0, 0] for _ in range(num_blocks)]
        self._generations = [0] * num_blocks
        self._generation = 0
        self._holdings: dict[str, _Holding] = {}
        self._growth = 0
        self._copies: Counter[int] = Counter()

    # ---- what there is

    def counts(self) -> BlockCounts:
        running, leased, quarantined = map(len, self._held)
        return BlockCounts(len(self._free), len(self._cached), running, leased, quarantined, self.num_blocks)

    @property
    def committed(self) -> int:
        """Blocks in use plus the growth that their holders were promised; never above `num_blocks`."""
        return sum(map(len, self._held)) + self._growth + self._copies.total()

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def holds(self, owner: str) -> bool:
        return owner in self._holdings

    def blocks_of(self, owner: str) -> tuple[int, ...]:
        return tuple(self._holdings[owner].blocks)

    def check(self, block: int, generation: int) -> None:
        """Raise StaleBlock unless `block` still is what `generation` named."""
        if self._generations[block] != generation or not any(self._refs[block]):
            raise StaleBlock(f"block {block} has generation {self._generations[block]}, not {generation}")

    # ---- taking

    def match_prefix(self, token_ids: Sequence[int], max_tokens: int) -> PrefixHit:
        """Known full blocks of the first `max_tokens` tokens. Valid until the pool is next changed."""
        if self._prefix is None:
            return PrefixHit()
        return self._prefix.match(token_ids, max_tokens // self.block_size)

    def can_admit(self, max_blocks: int, hit: PrefixHit) -> bool:
        """Whether a holder that shares `hit` and grows to `max_blocks` fits beside all growth promised before."""
        revived = sum(block in self._cached for block in hit.blocks)
        return self.committed + max_blocks - len(hit.blocks) + revived <= self.num_blocks

    def open(self, owner: str, max_blocks: int, hit: PrefixHit, use: Use) -> list[int]:
        """Start a holding with the shared blocks of `hit`. Returns its block table, which later calls change in place.

        The caller has asked `can_admit`.
        """
        if owner in self._holdings:
            raise ValueError(f"{owner} already holds blocks")
        if max_blocks < len(hit.blocks) or not self.can_admit(max_blocks, hit):
            raise ValueError(
                f"{owner} may not hold {max_blocks} blocks: {self.committed} of {self.num_blocks} committed"
            )
        self._generation += 1
        holding = _Holding(list(hit.blocks), max_blocks, use, self._generation, Chain(list(hit.hashes)))
        self._holdings[owner] = holding
        self._growth += holding.growth
        for block in hit.blocks:
            self._hold(block, use)
        return holding.blocks

    def grow(self, owner: str, num_blocks: int) -> int:
        """Make the holding at least `num_blocks` long. Returns the generation of the blocks taken last."""
        holding = self._holdings[owner]
        missing = num_blocks - len(holding.blocks)
        if missing <= 0:
            return holding.generation
        if num_blocks > holding.max_blocks:
            raise ValueError(f"{owner} was promised {holding.max_blocks} blocks and asks for {num_blocks}")
        fresh = self._take(missing, holding.use)
        holding.generation = self._generation
        holding.blocks.extend(fresh)
        self._growth -= missing
        return holding.generation

    def fork(self, owner: str, new_owner: str, num_tokens: int, max_blocks: int) -> list[int] | None:
        """Share the blocks of the first `num_tokens` tokens with a new holder; None when its growth does not fit.

        A last block that is not full is shared too; whoever writes to it first calls `ensure_writable`.
        """
        parent = self._holdings[owner]
        shared = parent.blocks[: self.blocks_for(num_tokens)]
        copies = 1 if num_tokens % self.block_size else 0
        if self.committed + max_blocks - len(shared) + copies > self.num_blocks:
            return None
        hashes = tuple(parent.chain.hashes[: num_tokens // self.block_size])
        table = self.open(new_owner, max_blocks, PrefixHit(tuple(shared), hashes), parent.use)
        if copies:
            self._copies[shared[-1]] += 1
        return table

    def ensure_writable(self, owner: str, index: int) -> tuple[int, int] | None:
        """Give the holder a block of its own at logical `index`. Returns (source, copy) when its KV must be copied."""
        holding = self._holdings[owner]
        shared = holding.blocks[index]
        if sum(self._refs[shared]) == 1:
            return None
        if not self._copies[shared]:
            raise ValueError(f"block {shared} is shared by prefix and is never written")
        own = self._take(1, holding.use)[0]
        self._copies[shared] -= 1
        holding.blocks[index] = own
        self._drop(shared, holding.use)
        return shared, own

    # ---- keeping

    def register(self, owner: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Let others find the holder's full blocks among its first `num_computed_tokens`, whose KV is there."""
        if self._prefix is None:
            return
        holding, num_full = self._holdings[owner], num_computed_tokens // self.block_size
        if num_full > len(holding.chain.hashes):  # of a decode one step in `block_size`
            self._prefix.extend(holding.chain, token_ids, holding.blocks, num_full)

    def register_soon(self, owner: str, token_ids: Sequence[int], num_tokens: int) -> None:
        """The KV of these tokens is being computed: do now what would take time once it is there."""
        if self._prefix is not None:
            self._prefix.hash_ahead(self._holdings[owner].chain, token_ids, num_tokens // self.block_size)

    def distrust(self, owner: str) -> None:
        """The holder's KV may be spoilt: nobody finds any of its blocks from now on."""
        if self._prefix is not None:
            for block in self._holdings[owner].blocks:
                self._prefix.forget(block)

    def move(self, owner: str, use: Use) -> None:
        """Change why the holder has its blocks."""
        holding = self._holdings[owner]
        for block in holding.blocks:
            self._hold(block, use)
            self._drop(block, holding.use)
        holding.use = use

    def rename(self, owner: str, new_owner: str) -> list[int]:
        """Hand a holding to another name, as it is. Returns its block table."""
        holding = self._holdings.pop(owner)
        if new_owner in self._holdings:
            self._holdings[owner] = holding
            raise ValueError(f"{new_owner} already holds blocks")
        self._holdings[new_owner] = holding
        return holding.blocks

    def release(self, owner: str) -> None:
        """End a holding. Blocks that nobody else holds become cached or free; the last ones are evicted first."""
        holding = self._holdings.pop(owner)
        self._growth -= holding.growth
        for block in reversed(holding.blocks):
            self._drop(block, holding.use)

    # ---- one block

    def _take(self, count: int, use: Use) -> list[int]:
        self._generation += 1
        fresh = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in fresh:
            self._generations[block] = self._generation
            self._hold(block, use)
        if self.on_allocate is not None:
            self.on_allocate(fresh)
        return fresh

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        assert self._prefix is not None
        self._prefix.forget(block)
        return block

    def _hold(self, block: int, use: Use) -> None:
        """A long prompt has thousands of blocks, and its first token waits for them: only what changes is touched."""
        refs = self._refs[block]
        before = _most_active(refs)
        refs[use] += 1
        if use < before:
            if before == _UNHELD:
                self._cached.pop(block, None)  # else it was taken out of the free ones
            else:
                self._held[before].remove(block)
            self._held[use].add(block)

    def _drop(self, block: int, use: Use) -> None:
        refs = self._refs[block]
        refs[use] -= 1
        copies = self._copies.get(block, 0)
        if copies and sum(refs) <= copies:
            self._copies[block] -= 1
        after = _most_active(refs)
        if after <= use:
            return
        self._held[use].remove(block)
        if after != _UNHELD:
            self._held[after].add(block)
        elif self._prefix is not None and block in self._prefix:
            self._cached[block] = None
        else:
            self._free.append(block)


def _most_active(refs: list[int]) -> int:
    """The first use that a block is held for, _UNHELD if none."""
    return 0 if refs[0] else 1 if refs[1] else 2 if refs[2] else _UNHELD
