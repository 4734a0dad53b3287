"""The hand-over with real workers: real engine, real gRPC, real gloo, in one process; the test is the router."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from baton.common.config import EngineConfig
from protos import worker_pb2 as pb
from tests.support.tiny_model import make_tiny_llama
from tests.transfer.handover_cluster import Cluster, Unpacks, cluster, config, prompt, spec

# ---- what comes out


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 200])
async def test_remote_tokens_equal_local_tokens(connected: Cluster, length: int) -> None:
    samplings: list[dict[str, object]] = [{}, {"temperature": 0.9, "seed": 11, "top_p": 0.9, "top_k": 50}]
    for number, sampling in enumerate(samplings):
        request = spec(prompt(length, seed=number), 20, **sampling)
        remote = await connected.remote(f"remote-{number}", request)
        local = await connected.local(f"local-{number}", request)
        assert remote == local
        assert len(remote) == 20
    await connected.at_rest()


async def test_a_resubmitted_request_goes_on_where_it_was(connected: Cluster) -> None:
    request = spec(prompt(50), 12, temperature=0.8, seed=5)
    tokens = await connected.local("whole", request)
    again = spec(prompt(50) + tokens[:4], 8, temperature=0.8, seed=5, num_emitted=4)
    assert await connected.remote("rest", again) == tokens[4:]
    assert min(connected.to_prefill.tokens["rest", 1]) == 4


async def test_known_blocks_are_not_sent_again(connected: Cluster) -> None:
    unpacks = Unpacks(connected.decode)
    first = await connected.remote("a", spec(prompt(100)))
    sent = unpacks.count
    second = await connected.remote("b", spec(prompt(100)))
    assert second == first
    assert connected.to_decode.reserved["a", 1].num_cached_tokens == 0
    assert connected.to_decode.reserved["b", 1].num_cached_tokens == 96
    assert 0 < unpacks.count - sent < sent / 2
    [whole, rest] = connected.timeline().hand_overs()
    block_bytes = connected.decode._engine.layout.block_bytes
    assert (whole.num_bytes, rest.num_bytes) == (7 * block_bytes, 1 * block_bytes)
    await connected.at_rest()


async def test_the_timeline_of_a_hand_over_is_in_order(connected: Cluster) -> None:
    before = time.monotonic()
    await connected.remote("a", spec(prompt(100)))
    [times] = connected.timeline().hand_overs()
    chunks = connected.timeline().chunks()
    assert times.num_chunks == len(chunks) > 3
    assert times.num_bytes == sum(chunk.num_bytes for chunk in chunks)
    assert times.written_at is not None
    assert times.verified_at is not None
    assert before < times.written_at < times.verified_at <= times.admissible_at < time.monotonic()
    assert times.exposed_s == times.admissible_at - times.written_at
    for chunk in chunks:
        assert chunk.written_at is not None
        assert chunk.posted_at is not None
        assert chunk.received_at is not None
        assert chunk.verified_at is not None
        assert chunk.written_at < chunk.announced_at <= chunk.posted_at <= chunk.received_at <= chunk.verified_at
    assert sum(connected.timeline().totals().receive_posted.counts) == len(chunks)
    assert connected.timeline()._open == {}
    assert connected.timeline()._leases == {}


async def test_a_prompt_that_decode_knows_whole_needs_no_chunk(connected: Cluster) -> None:
    first = await connected.remote("a", spec(prompt(96)))
    unpacks = Unpacks(connected.decode)
    assert await connected.remote("b", spec(prompt(96))) == first
    assert unpacks.count == 0
    await connected.at_rest()


async def test_a_request_that_ends_at_its_first_token_ends_on_prefill(connected: Cluster) -> None:
    [token] = await connected.local("reference", spec(prompt(40), 1))
    assert await connected.remote("length", spec(prompt(40), 1)) == [token]
    assert await connected.remote("stop", spec(prompt(40), 9, stop_token_ids=[token])) == [token]
    assert connected.to_prefill.finish_reasons == {("length", 1): "length", ("stop", 1): "stop"}
    await connected.at_rest()
    assert not connected.to_decode.tokens.keys() - {("reference", 1)}
    assert not connected.to_decode.failed


async def test_many_interleaved_requests(model: Path) -> None:
    many = config(model, engine=EngineConfig(max_num_batched_tokens=64, max_num_seqs=32, num_blocks=400))
    async with cluster(many) as workers:
        await workers.connect()
        requests = {
            f"r{number}": spec(prompt(5 + 9 * number, seed=number), 3 + number % 7, temperature=number % 2, seed=number)
            for number in range(24)
        }
        remote = await asyncio.gather(*(workers.remote(name, request) for name, request in requests.items()))
        local = await asyncio.gather(*(workers.local(f"l{name}", request) for name, request in requests.items()))
        assert remote == local
        await workers.at_rest()


async def test_both_ends_report_their_part_of_the_timeline(connected: Cluster) -> None:
    await connected.remote("a", spec(prompt(60)))
    await connected.at_rest()
    at_prefill = connected.to_prefill.events["a", 1]
    at_decode = connected.to_decode.events["a", 1]
    assert at_prefill[0] == at_decode[0] == "accepted"
    wanted = {"prefill_start", "transfer_start", "prefill_end", "first_token", "transfer_end", "committed"}
    assert wanted <= set(at_prefill)
    assert at_prefill.index("queued") < at_prefill.index("transfer_start") < at_prefill.index("committed")
    order = [name for name in at_decode if name in {"reserved", "transfer_start", "committed", "admitted", "finished"}]
    assert order == ["reserved", "transfer_start", "committed", "admitted", "finished"]


async def test_nothing_is_left_after_the_workers_have_stopped(model: Path) -> None:
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()
    async with cluster(config(model)) as workers:
        await workers.connect()
        unpacks = Unpacks(workers.decode)
        unpacks.hold_from(2)
        await workers.begin("amid a transfer", spec(prompt(200)))
        await asyncio.wait_for(unpacks.held.wait(), 20)
        await workers.to_decode.generate("running", spec(prompt(20), 400))
    ours = ("engine", "kv ", "join ", "store ", "close ", "bounded ")
    left = [thread for thread in set(threading.enumerate()) - threads if thread.name.startswith(ours)]
    assert not left
    assert asyncio.all_tasks() == tasks


# ---- what does not begin


@pytest.mark.parametrize(
    ("module", "ours", "theirs"), [("decode_worker.listener", 2, 1), ("prefill_worker.dialer", 3, 1)]
)
async def test_workers_of_another_version_are_refused_and_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, module: str, ours: int, theirs: int
) -> None:
    """In a cluster that is being upgraded: what they would send each other would not be understood."""
    monkeypatch.setattr(f"{module}.VERSION", ours)
    async with cluster(config(model)) as workers:
        await workers.want_connection()
        refused = await workers.peer_state("refused")
        assert f"version of the hand-over: {ours} here, {theirs} there" in refused.message


async def test_other_layouts_are_refused_and_named(model: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=1)
    engine = EngineConfig(block_size=32, num_blocks=64)
    async with cluster(config(model), config(other, engine=engine)) as workers:
        await workers.want_connection()
        refused = await workers.peer_state("refused")
        assert "block_size: 32 here, 16 there" in refused.message
        assert "model_hash" in refused.message
        assert "num_layers" not in refused.message
        key = await workers.to_decode.open("a", spec(prompt(20)), workers.prefill.worker_id)
        await workers.to_decode.until(lambda: key in workers.to_decode.refused, "the refusal")
        assert workers.to_decode.refused[key].code == "no_connection"
        assert len(await workers.local("b", spec(prompt(20)))) == 8


async def test_without_a_connection_both_ends_refuse(model: Path) -> None:
    async with cluster(config(model)) as workers:
        reserved = pb.Reserved(lease=1, generation=1)
        opened = await workers.to_decode.open("a", spec(prompt(20)), workers.prefill.worker_id)
        sent = await workers.to_prefill.prefill("a", spec(prompt(20)), workers.decode.worker_id, reserved)
        for client, key in ((workers.to_decode, opened), (workers.to_prefill, sent)):
            await client.until(lambda client=client, key=key: key in client.refused, "the refusal")  # type: ignore[misc]
            assert client.refused[key].code == "no_connection"
        await workers.at_rest()


async def test_a_full_pool_is_busy(connected: Cluster) -> None:
    await connected.open("a", spec(prompt(400), 100))
    await connected.open("b", spec(prompt(400, seed=1), 80))
    key = await connected.to_decode.open("c", spec(prompt(100, seed=2)), connected.prefill.worker_id)
    await connected.to_decode.until(lambda: key in connected.to_decode.refused, "the refusal")
    assert connected.to_decode.refused[key].code == "busy"
    assert connected.to_decode.refused[key].retry_after_s > 0
    for name in ("a", "b"):
        await connected.to_decode.cancel(name)
    await connected.at_rest()
    assert len(await connected.remote("d", spec(prompt(100, seed=2)))) == 8


async def test_a_stale_lease_is_not_filled(connected: Cluster) -> None:
    reserved = await connected.open("a", spec(prompt(100)))
    await connected.to_decode.cancel("a")
    await connected.to_decode.at_rest()
    key = await connected.to_prefill.prefill("a", spec(prompt(100)), connected.decode.worker_id, reserved)
    await connected.to_prefill.until(lambda: key in connected.to_prefill.failed, "the failure")
    assert connected.to_prefill.failed[key].code == "aborted"
    await connected.at_rest()


async def test_repeated_commands_change_nothing(connected: Cluster) -> None:
    request = spec(prompt(60))
    reserved = await connected.open("a", request)
    await connected.to_decode.open("a", request, connected.prefill.worker_id)
    for _ in range(2):
        key = await connected.to_prefill.prefill("a", request, connected.decode.worker_id, reserved)
    tokens = await connected.finish(key)
    await connected.to_prefill.prefill("a", request, connected.decode.worker_id, reserved)
    assert tokens == await connected.local("l", request)
    await connected.at_rest()
    assert connected.to_decode.reserved[key] == reserved
