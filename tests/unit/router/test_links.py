"""Membership and liveness: who is dialled, who is introduced to whom, who is lost, and what the operator sees."""

from __future__ import annotations

import asyncio
import threading

import pytest

from baton.common.clock import MonotonicClock
from protos import worker_pb2 as wpb
from router.registry import Member
from router.worker_session import WorkerSession
from tests.support.fake_worker import LAYOUT, FakeWorker, answer, pair_of_answers
from tests.unit.router.conftest import Served, serving


async def test_prefill_workers_are_introduced_to_every_decode_worker_in_any_order(
    workers: list[FakeWorker], served: Served
) -> None:
    prefill, decode = pair_of_answers("p0", "d0")
    late = FakeWorker("d1", script=answer)
    workers.extend((prefill, decode, late))
    await served.attach(prefill, decode)
    await served.attach(prefill, decode, late)
    peers = [await prefill.next_frame("connect_peer", count) for count in (1, 2)]
    expected = {(worker.hello.worker_id, worker.hello.transfer_address) for worker in (decode, late)}
    assert {(peer.worker_id, peer.address) for peer in peers} == expected
    assert served.router.registry.snapshot().connected == {("p0", "d0"), ("p0", "d1")}
    assert not decode.received("connect_peer")


async def test_a_lost_decode_worker_is_disconnected_and_its_successor_introduced(
    workers: list[FakeWorker], served: Served
) -> None:
    prefill, decode = pair_of_answers("p0", "d0")
    workers.extend((prefill, decode))
    await served.attach(prefill, decode)
    port = int(decode.address.rpartition(":")[2])
    await decode.kill()
    assert (await prefill.next_frame("disconnect_peer")).worker_id == "d0"
    successor = FakeWorker("d0-second", script=answer)
    workers.append(successor)
    await successor.start(port)
    assert (await prefill.next_frame("connect_peer", 2)).worker_id == "d0-second"
    await served.until(lambda: served.router.registry.snapshot().connected == {("p0", "d0-second")})
    metrics = (await served.http.get("/metrics")).text
    assert 'worker="d0"' not in metrics
    assert 'baton_worker_lost_total{role="decode"} 1.0' in metrics


async def test_an_incompatible_pair_is_never_connected_and_the_difference_is_shown(workers: list[FakeWorker]) -> None:
    other = wpb.KVLayout()
    other.CopyFrom(LAYOUT)
    other.num_kv_heads = 4
    prefill, decode = FakeWorker("p0", "prefill", answer, layout=other), FakeWorker("d0", "decode", answer)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(prefill, decode)
        response = await served.complete()
        assert response.headers["x-baton-path"] == "local; remote asked for, no prefill worker connected"
        assert not prefill.received("connect_peer")
        (pair,) = (await served.http.get("/v1/workers")).json()["pairs"]
        assert pair["state"] == "incompatible"
        assert pair["message"] == "num_kv_heads: prefill 4, decode 2"


async def test_a_refused_pair_is_not_scheduled_and_the_reason_is_shown(workers: list[FakeWorker]) -> None:
    def refuse(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.HasField("connect_peer"):
            worker_id = frame.connect_peer.worker_id
            worker.say(peer_state=wpb.PeerState(worker_id=worker_id, state="refused", message="other dtype"))

    workers.extend((FakeWorker("p0", "prefill", refuse), FakeWorker("d0", "decode", answer)))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        assert (await served.complete()).headers["x-baton-path"].startswith("local; ")
        (pair,) = (await served.http.get("/v1/workers")).json()["pairs"]
        assert (pair["state"], pair["message"]) == ("refused", "other dtype")


async def test_the_worker_learns_the_heartbeat_times_and_hears_from_the_router(
    workers: list[FakeWorker], served: Served
) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    hello = workers[0].received("hello")[0]
    assert hello.router_id
    assert (hello.heartbeat_interval_s, hello.heartbeat_timeout_s) == (0.05, 1.0)
    await served.until(lambda: workers[0].num_router_heartbeats > 3)


async def test_a_silent_worker_is_lost_within_its_deadline_and_attached_again(workers: list[FakeWorker]) -> None:
    workers.append(FakeWorker("d0"))
    async with serving(router={"heartbeat_timeout_s": 0.3}) as served:
        await served.attach(*workers)
        loop = asyncio.get_running_loop()
        workers[0].beats = False
        started = loop.time()
        await served.until(lambda: not served.router.registry.sessions)
        assert 0.2 < loop.time() - started < 10.0
        entry = (await served.http.get("/v1/workers")).json()["workers"][0]
        assert entry["attached"] is False
        assert "no frame for" in entry["error"]
        workers[0].beats = True
        await served.until(lambda: served.router.registry.is_ready)


async def test_a_worker_that_hangs_up_is_dialled_again(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    workers[0].hang_up()
    await workers[0].next_frame("hello", 2)
    await served.until(lambda: served.router.registry.is_ready)


async def test_an_address_where_nobody_listens_is_named_with_its_error(served: Served) -> None:
    served.router.registry.set_members([Member("127.0.0.1:1", "decode")])
    await served.until(lambda: "UNAVAILABLE" in served.router.registry.link_error("127.0.0.1:1"))
    entry = (await served.http.get("/v1/workers")).json()["workers"][0]
    assert entry["attached"] is False
    assert entry["address"] == "127.0.0.1:1"


async def test_members_may_be_set_from_another_thread_and_taken_away(workers: list[FakeWorker], served: Served) -> None:
    worker = await FakeWorker("d0").start()
    workers.append(worker)
    registry = served.router.registry
    thread = threading.Thread(target=registry.set_members_threadsafe, args=([Member(worker.address, "decode")],))
    thread.start()
    await served.until(lambda: registry.is_ready)
    thread.join()
    registry.set_members([])
    await served.until(lambda: not registry.sessions)
    assert (await served.http.get("/v1/workers")).json() == {"workers": [], "pairs": []}


async def test_a_session_that_was_replaced_does_not_disconnect_its_successor(
    workers: list[FakeWorker], served: Served
) -> None:
    """The address of a worker is taken away and given back before its old stream has ended."""
    prefill, decode = pair_of_answers("p0", "d0")
    workers.extend((prefill, decode))
    await served.attach(prefill, decode)
    registry = served.router.registry
    (old,) = [session for session in registry.sessions if session.worker_id == "d0"]
    registry.on_attached(WorkerSession(old.address, old.hello, registry, MonotonicClock()))
    registry.on_lost(old)
    await served.until(lambda: registry.snapshot().connected == {("p0", "d0")})
    assert not prefill.received("disconnect_peer")


async def test_a_defect_in_a_session_does_not_take_the_address_out_of_the_cluster(
    workers: list[FakeWorker], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, attached = served.router.registry, served.router.registry.on_attached
    seen: list[str] = []

    def defective_once(session: WorkerSession) -> None:
        seen.append(session.worker_id)
        if len(seen) == 1:
            raise KeyError("a defect")
        attached(session)

    monkeypatch.setattr(registry, "on_attached", defective_once)
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    assert seen == ["d0", "d0"]
