"""Hand-overs that end early, and connections that break: both workers get every block back."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from baton.common.config import EngineConfig, TransferConfig
from decode_worker.handover import DecodeHalf
from kv_transfer.events import FromPrefill
from kv_transfer.messages import Chunk
from prefill_worker.handover import PrefillHalf
from protos import worker_pb2 as pb
from tests.support.worker_client import WorkerClient
from tests.transfer.handover_cluster import Cluster, Unpacks, cluster, config, prompt, spec

# ---- what ends early


async def test_cancel_after_the_reservation(connected: Cluster) -> None:
    await connected.open("a", spec(prompt(100)))
    await connected.to_decode.cancel("a")
    await connected.at_rest()


async def test_cancel_before_the_reservation_is_known(connected: Cluster) -> None:
    await connected.to_decode.open("a", spec(prompt(100)), connected.prefill.worker_id)
    await connected.to_decode.cancel("a")
    await connected.at_rest()


@pytest.mark.parametrize("who", ["prefill", "decode", "both"])
@pytest.mark.parametrize("held", [0, 3])
async def test_cancel_amid_the_transfer(connected: Cluster, who: str, held: int) -> None:
    unpacks = Unpacks(connected.decode)
    unpacks.hold_from(held)
    key = await connected.begin("a", spec(prompt(200)))
    await asyncio.wait_for(unpacks.held.wait(), 20)
    to_prefill, to_decode = connected.to_prefill, connected.to_decode
    if who != "decode":
        await to_prefill.cancel("a")
    if who != "prefill":
        await to_decode.cancel("a")
    [half] = [half for half in connected.decode._halves if isinstance(half, DecodeHalf)]

    def is_over() -> bool:
        return all(lease.is_over for lease in half._protocol.state.leases.values())

    await to_decode.until(is_over, "the end of the lease")
    if who == "prefill":
        await to_decode.until(lambda: key in to_decode.failed, "word of the abort at decode")
        assert to_decode.failed[key].code == "aborted"
    if who == "decode":
        await to_prefill.until(lambda: key in to_prefill.failed, "word of the abort at prefill")
        assert to_prefill.failed[key].code == "aborted"
    unpacks.release()
    await connected.at_rest()
    assert key not in to_decode.tokens
    assert await connected.remote("b", spec(prompt(40))) == await connected.local("c", spec(prompt(40)))


async def test_cancel_while_decoding(connected: Cluster) -> None:
    key = await connected.begin("a", spec(prompt(40), 400))
    to_decode = connected.to_decode
    await to_decode.until(lambda: len(to_decode.tokens[key]) >= 3, "some tokens")
    await to_decode.cancel("a")
    await to_decode.cancel("a")
    await connected.at_rest()
    assert key not in to_decode.failed
    assert len(to_decode.tokens[key]) < 399


async def test_a_storm_of_cancels(model: Path) -> None:
    """Forty hand-overs at once, three in four withdrawn at another stage each: the rest is right, nothing is left."""
    many = config(model, engine=EngineConfig(max_num_batched_tokens=64, max_num_seqs=64, num_blocks=600))
    requests = [spec(prompt(30 + 4 * number, seed=number), 6) for number in range(40)]

    async def run(workers: Cluster, number: int) -> list[int] | None:
        name, to_prefill = f"r{number}", workers.to_prefill
        if number % 4 == 0:
            return await workers.remote(name, requests[number])
        reserved = await workers.open(name, requests[number])
        if number % 4 > 1:
            key = await to_prefill.prefill(name, requests[number], workers.decode.worker_id, reserved)
        if number % 4 > 2:
            await to_prefill.until(lambda: bool(to_prefill.tokens[key]), "the first token")
        await asyncio.gather(workers.to_decode.cancel(name), to_prefill.cancel(name))
        return None

    async with cluster(many) as workers:
        await workers.connect()
        results = await asyncio.gather(*(run(workers, number) for number in range(40)))
        await workers.at_rest()
        for number in range(0, 40, 4):
            assert results[number] == await workers.local(f"l{number}", requests[number])
        await workers.at_rest()


async def test_the_deadline_frees_both_ends(connected: Cluster) -> None:
    unpacks = Unpacks(connected.decode)
    unpacks.hold_from(0)
    reserved = await connected.open("a", spec(prompt(100), deadline_s=1.0))
    key = await connected.to_prefill.prefill("a", spec(prompt(100)), connected.decode.worker_id, reserved)
    to_prefill, to_decode = connected.to_prefill, connected.to_decode
    await to_decode.until(lambda: key in to_decode.failed, "the deadline")
    assert (to_decode.failed[key].code, to_decode.failed[key].retryable) == ("deadline", False)
    await to_prefill.until(lambda: key in to_prefill.failed, "word of it at prefill")
    unpacks.release()
    await connected.at_rest()


async def test_an_unused_lease_expires(model: Path) -> None:
    async with cluster(config(model, transfer=TransferConfig(lease_s=0.3))) as workers:
        await workers.connect()
        await workers.open("a", spec(prompt(100)))
        failed = workers.to_decode.failed
        await workers.to_decode.until(lambda: ("a", 1) in failed, "the end of the lease")
        assert (failed["a", 1].code, failed["a", 1].retryable) == ("expired", True)
        await workers.at_rest()


async def test_a_cut_router_frees_everything(connected: Cluster) -> None:
    unpacks = Unpacks(connected.decode)
    unpacks.hold_from(2)
    await connected.begin("transfer", spec(prompt(200)))
    await asyncio.wait_for(unpacks.held.wait(), 20)
    await connected.to_decode.generate("local", spec(prompt(30), 400))
    await connected.to_decode.open("open", spec(prompt(90, seed=3)), connected.prefill.worker_id)
    await connected.to_decode.until(lambda: bool(connected.to_decode.tokens["local", 1]), "a token")
    await connected.to_decode.cut()
    await connected.to_prefill.cut()
    unpacks.release()
    for shell in (connected.prefill, connected.decode):
        async with WorkerClient(shell.address, "watcher") as watcher:
            await watcher.at_rest()


async def test_a_spoilt_chunk_is_never_served(connected: Cluster) -> None:
    unpacks = Unpacks(connected.decode)
    unpacks.flip_bit(4)
    key = await connected.begin("a", spec(prompt(200)))
    to_prefill, to_decode = connected.to_prefill, connected.to_decode
    await to_decode.until(lambda: key in to_decode.failed, "the failure")
    assert (to_decode.failed[key].code, to_decode.failed[key].retryable) == ("corrupt", True)
    await to_prefill.until(lambda: key in to_prefill.failed, "word of it at prefill")
    await connected.at_rest()
    assert key not in to_decode.tokens
    again = spec(prompt(200))
    reserved = await to_decode.open("a", again, connected.prefill.worker_id, attempt=2)
    await to_decode.until(lambda: reserved in to_decode.reserved, "a new reservation")
    key = await to_prefill.prefill("a", again, connected.decode.worker_id, to_decode.reserved[reserved], attempt=2)
    assert await connected.finish(key) == await connected.local("l", again)


async def test_a_chunk_whose_word_is_lost_is_no_corruption(connected: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one: nothing but the commit tells of it. Operators see what kind of fault it was."""
    [half] = [half for half in connected.decode._halves if isinstance(half, DecodeHalf)]
    pass_on, lost = half._listener._on_message, []

    def lose_last(event: FromPrefill) -> None:
        if isinstance(event.message, Chunk) and (event.message.segment.layer_end, event.message.segment.block_end) == (
            connected.decode._engine.layout.num_layers,
            -(-100 // 16),
        ):
            lost.append(event.message.seq)
        else:
            pass_on(event)

    monkeypatch.setattr(half._listener, "_on_message", lose_last)
    key = await connected.begin("a", spec(prompt(100)))
    to_decode = connected.to_decode
    await to_decode.until(lambda: key in to_decode.failed, "the failure")
    assert len(lost) == 1
    assert (to_decode.failed[key].code, to_decode.failed[key].retryable) == ("incomplete", True)
    monkeypatch.undo()
    await connected.at_rest()
    assert key not in to_decode.tokens


# ---- what breaks and heals


async def test_routers_hear_of_a_lost_connection_before_it_is_destroyed(connected: Cluster) -> None:
    """Until then they would send it requests, each of which costs an attempt."""
    [half] = [half for half in connected.prefill._halves if isinstance(half, PrefillHalf)]
    [pair] = half._pairs.of_peer(connected.decode.worker_id)
    destroy, may_close = pair.link.close, threading.Event()

    def close() -> None:
        assert may_close.wait(20)
        destroy()

    pair.link.close = close  # type: ignore[method-assign]
    pair.end("cut by the test")
    try:
        await connected.peer_state("lost")
        assert half._pairs.of_peer(connected.decode.worker_id) == [pair]
    finally:
        may_close.set()
    await connected.peer_state("connected", times=2)
    assert connected.to_prefill.peer_history.count((connected.decode.worker_id, "lost")) == 1


async def test_a_lost_connection_is_made_anew(connected: Cluster) -> None:
    unpacks = Unpacks(connected.decode)
    unpacks.hold_from(2)
    key = await connected.begin("a", spec(prompt(200)))
    await asyncio.wait_for(unpacks.held.wait(), 20)
    [pair] = unpacks.pairs()
    pair.end("cut by the test")
    to_prefill, to_decode = connected.to_prefill, connected.to_decode
    for client in (to_prefill, to_decode):
        await client.until(lambda client=client: key in client.failed, "the failure")  # type: ignore[misc]
        assert client.failed[key].code == "peer_lost"
    unpacks.drop()
    await connected.peer_state("connected", times=2)
    assert pair not in unpacks.pairs()
    assert await connected.remote("b", spec(prompt(70))) == await connected.local("c", spec(prompt(70)))
    await connected.at_rest()


async def test_disconnecting_frees_what_is_under_way(connected: Cluster) -> None:
    unpacks = Unpacks(connected.decode)
    unpacks.hold_from(2)
    key = await connected.begin("a", spec(prompt(200)))
    await asyncio.wait_for(unpacks.held.wait(), 20)
    await connected.to_prefill.send(disconnect_peer=pb.DisconnectPeer(worker_id=connected.decode.worker_id))
    for client in (connected.to_prefill, connected.to_decode):
        await client.until(lambda client=client: key in client.failed, "the failure")  # type: ignore[misc]
    unpacks.drop()
    await connected.at_rest()
    await connected.connect(times=2)
    assert len(await connected.remote("b", spec(prompt(70)))) == 8


async def test_draining_lets_a_hand_over_end(connected: Cluster) -> None:
    unpacks = Unpacks(connected.decode)
    unpacks.hold_from(1)
    key = await connected.begin("a", spec(prompt(100)))
    await asyncio.wait_for(unpacks.held.wait(), 20)
    draining = [asyncio.create_task(shell.drain(20.0)) for shell in (connected.prefill, connected.decode)]
    late = await connected.to_decode.generate("b", spec(prompt(10)))
    await connected.to_decode.until(lambda: late in connected.to_decode.refused, "the refusal")
    unpacks.release()
    assert len(await connected.finish(key)) == 8
    assert await asyncio.gather(*draining) == [True, True]
