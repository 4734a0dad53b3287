"""One prefill worker and two decode workers: what one pair suffers, the other does not notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from baton.common.config import EngineConfig, TransferConfig
from tests.support.tiny_model import make_tiny_llama
from tests.support.worker_client import WorkerClient
from tests.transfer.handover_cluster import Cluster, Unpacks, cluster, config, prompt, spec, worker

STALLED, LENGTH = 5, 200


@asynccontextmanager
async def two_pairs(model: Path) -> AsyncIterator[tuple[Cluster, Cluster]]:
    """The same prefill worker, seen with each of its decode workers; 64 blocks of its own, which 5 prompts exceed."""
    patient = TransferConfig(window=3, slot_bytes=16384, operation_timeout_s=60.0, lease_s=600.0)
    roomy = config(
        model, engine=EngineConfig(max_num_batched_tokens=32, max_num_seqs=16, num_blocks=128), transfer=patient
    )
    async with (
        cluster(config(model, transfer=patient), roomy) as one,
        worker(roomy, "decode") as decode,
        WorkerClient(decode.address) as to_decode,
    ):
        await to_decode.attached()
        other = replace(one, decode=decode, to_decode=to_decode)
        for pair in (one, other):
            pair.never_stalled()
        await asyncio.gather(one.connect(), other.connect())
        yield one, other


async def test_a_peer_that_does_not_unpack_delays_nobody_else(tmp_path: Path) -> None:
    async with two_pairs(make_tiny_llama(tmp_path)) as (stalled, other):
        unpacks = Unpacks(stalled.decode)
        unpacks.hold_from(0)
        keys = [await stalled.begin(f"a{number}", spec(prompt(LENGTH, number))) for number in range(STALLED)]
        await asyncio.wait_for(unpacks.held.wait(), 60)
        for number in range(3):
            request = spec(prompt(LENGTH, 100 + number))
            tokens = await asyncio.wait_for(other.remote(f"b{number}", request), 60)
            assert tokens == await other.local(f"c{number}", request)
        assert not any(key in stalled.to_decode.tokens for key in keys)
        unpacks.release()
        for number, key in enumerate(keys):
            assert await stalled.finish(key) == await stalled.local(f"d{number}", spec(prompt(LENGTH, number)))
        await stalled.at_rest()
        await other.at_rest()


@pytest.mark.parametrize("who", ["prefill", "decode"])
async def test_one_that_waits_for_its_peers_share_can_be_cancelled(tmp_path: Path, who: str) -> None:
    async with two_pairs(make_tiny_llama(tmp_path)) as (stalled, other):
        unpacks = Unpacks(stalled.decode)
        unpacks.hold_from(0)
        keys = [await stalled.begin(f"a{number}", spec(prompt(LENGTH, number))) for number in range(STALLED)]
        await asyncio.wait_for(unpacks.held.wait(), 60)
        client = stalled.to_prefill if who == "prefill" else stalled.to_decode
        await client.cancel(keys[-1][0])
        unpacks.release()
        for key in keys[:-1]:
            await stalled.finish(key)
        await stalled.at_rest()
        await other.at_rest()
        assert not stalled.to_prefill.tokens[keys[-1]]
