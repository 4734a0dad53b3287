"""Which block holds the KV of which tokens: a hash chain over full blocks.

Owned by the block pool, on the engine thread. The hash of a block covers its tokens and, through its parent's hash, all
tokens before it. It is keyed with a secret of the process, and a hit compares the tokens themselves as well.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

ROOT = b""


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """Blocks that hold the KV of a prompt's first tokens, in logical order, and the hash of each."""

    blocks: tuple[int, ...] = ()
    hashes: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class _Entry:
    block: int
    tokens: bytes


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

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], blocks: Sequence[int], num_full: int) -> None:
        """Enter blocks [len(hashes), num_full) of a sequence, whose KV is computed; their hashes are appended.

        Where equal content is known already, the older block stays the one that is found.
        """
        for index in range(len(hashes), num_full):
            tokens = self._tokens(token_ids, index)
            chain = self._hash(hashes[-1] if hashes else ROOT, tokens)
            hashes.append(chain)
            if chain not in self._entries and blocks[index] not in self._hash_of_block:
                self._entries[chain] = _Entry(blocks[index], tokens)
                self._hash_of_block[blocks[index]] = chain

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
