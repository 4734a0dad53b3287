"""Which block holds the KV of which tokens: a hash chain over full blocks.

Owned by the block pool, on the engine thread. The hash of a block covers its tokens and, through its parent's hash, all
tokens before it. It is keyed with a secret of the process, and a hit compares the tokens themselves as well.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

ROOT = b""


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Blocks that hold the KV of a prompt's first tokens, in logical order, and the hash of each."""

    blocks: tuple[int, ...] = ()
    hashes: tuple[bytes, ...] = ()


class _Entry(NamedTuple):
    block: int
    tokens: bytes


@dataclass(slots=True, eq=False)
class Chain:
    """One sequence's hashes: of the blocks that were entered, and of the next ones, whose KV is still computed.

    `ahead`: hash and tokens of each.
    """

    hashes: list[bytes] = field(default_factory=list)
    ahead: list[tuple[bytes, bytes]] = field(default_factory=list)


class PrefixCache:
    """Maps chain hashes to blocks. Holds no reference on a block: the pool forgets a block before it is reused."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._key = secrets.token_bytes(32)
        self._entries: dict[bytes, _Entry] = {}
        self._hash_of_block: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of_block

    def match(self, token_ids: Sequence[int], max_blocks: int) -> PrefixHit:
        """The longest run of known blocks from the start of `token_ids`, at most `max_blocks` of them."""
        blocks: list[int] = []
        hashes: list[bytes] = []
        parent = ROOT
        for index in range(max_blocks):
            tokens = self._tokens(token_ids, index)
            parent = self._hash(parent, tokens)
            entry = self._entries.get(parent)
            if entry is None or entry.tokens != tokens:
                break
            blocks.append(entry.block)
            hashes.append(parent)
        return PrefixHit(tuple(blocks), tuple(hashes))

    def hash_ahead(self, chain: Chain, token_ids: Sequence[int], num_full: int) -> None:
        """Do what `extend` will need for the sequence's first `num_full` blocks: 3 us each, while they are computed."""
        parent = chain.ahead[-1][0] if chain.ahead else chain.hashes[-1] if chain.hashes else ROOT
        for index in range(len(chain.hashes) + len(chain.ahead), num_full):
            tokens = self._tokens(token_ids, index)
            parent = self._hash(parent, tokens)
            chain.ahead.append((parent, tokens))

    def extend(self, chain: Chain, token_ids: Sequence[int], blocks: Sequence[int], num_full: int) -> None:
        """Enter the next blocks of a sequence, up to `num_full` of it, whose KV is computed.

        Where equal content is known already, the older block stays the one that is found.
        """
        self.hash_ahead(chain, token_ids, num_full)
        start = len(chain.hashes)
        count = max(0, num_full - start)
        entered, chain.ahead = chain.ahead[:count], chain.ahead[count:]
        for block, (link, tokens) in zip(blocks[start : start + count], entered, strict=True):
            chain.hashes.append(link)
            if link not in self._entries and block not in self._hash_of_block:
                self._entries[link] = _Entry(block, tokens)
                self._hash_of_block[block] = link

    def forget(self, block: int) -> None:
        """The block's content is about to change."""
        chain = self._hash_of_block.pop(block, None)
        if chain is not None:
            del self._entries[chain]

    def _tokens(self, token_ids: Sequence[int], index: int) -> bytes:
        start = index * self._block_size
        return array("I", token_ids[start : start + self._block_size]).tobytes()

    def _hash(self, parent: bytes, tokens: bytes) -> bytes:
        return blake2b(parent + tokens, digest_size=16, key=self._key).digest()
