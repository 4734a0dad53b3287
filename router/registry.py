"""Who is in the cluster: the addresses that are members, the workers attached now, and which pairs can hand over.

The process that runs the router sets the members; links keep them attached; the dispatcher reads `snapshot` and looks
sessions up by worker_id. Event loop only, except `set_members_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from baton.common.clock import Clock
from protos import worker_pb2 as pb
from router.metrics import Metrics
from router.pairs import CONNECTING, PairTable
from router.policy import Cluster
from router.record import RecentRequests
from router.worker_link import LinkSettings, WorkerLink
from router.worker_session import WorkerSession

_log = logging.getLogger("baton.router")


@dataclass(frozen=True, slots=True)
class Member:
    """One worker of the cluster. `address` is host:port of its gRPC server; `role` is "prefill" or "decode"."""

    address: str
    role: str


class Registry:
    """Owns links, sessions and pairs."""

    def __init__(self, settings: LinkSettings, recent: RecentRequests, metrics: Metrics, clock: Clock) -> None:
        self.pairs = PairTable()
        self.last_step_at = clock.now()
        self._settings = settings
        self._recent = recent
        self._metrics = metrics
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._links: dict[str, WorkerLink] = {}
        self._sessions: dict[str, WorkerSession] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._listeners: list[Callable[[], None]] = []
        self._worker_listeners: list[Callable[[], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._max_model_len = 0
        self._news = asyncio.Event()

    # ---- membership

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def set_members(self, members: Iterable[Member]) -> None:
        """Attach to every new address and let go of every address that is gone."""
        self._members = {member.address: member for member in members}
        for address in [address for address in self._links if address not in self._members]:
            self._close(self._links.pop(address))
        for address in self._members:
            if address not in self._links:
                self._links[address] = WorkerLink(address, self._settings, self, self._clock)
                self._links[address].start()

    def set_members_threadsafe(self, members: Iterable[Member]) -> None:
        """The same from another thread. The router must have been started."""
        if self._loop is None:
            raise RuntimeError("the registry is not started")
        self._loop.call_soon_threadsafe(self.set_members, list(members))

    async def close(self) -> None:
        self.set_members([])
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _close(self, link: WorkerLink) -> None:
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # ---- what others read

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a request that waits might be able to start, or readiness may have changed."""
        self._listeners.append(listener)

    def subscribe_to_workers(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a worker was attached or lost."""
        self._worker_listeners.append(listener)

    @property
    def sessions(self) -> list[WorkerSession]:
        return [session for session in self._sessions.values() if not session.lost]

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    @property
    def is_ready(self) -> bool:
        """A decode worker is attached."""
        return any(session.hello.role == "decode" for session in self.sessions)

    async def wait_for(self, num_prefill: int, num_decode: int) -> None:
        """Returns once so many workers are attached and no pair is still connecting. The caller bounds the wait."""
        while not self._has(num_prefill, num_decode):
            self._news.clear()
            await self._news.wait()

    def _has(self, num_prefill: int, num_decode: int) -> bool:
        roles = [session.hello.role for session in self.sessions]
        attached = roles.count("prefill") >= num_prefill and roles.count("decode") >= num_decode
        return attached and not any(pair.state == CONNECTING for pair in self.pairs.all())

    @property
    def has_had_workers(self) -> bool:
        """Some worker has been attached, now or earlier."""
        return self.max_model_len > 0

    def session(self, worker_id: str) -> WorkerSession:
        return self._sessions[worker_id]

    def snapshot(self) -> Cluster:
        workers = [session.snapshot() for session in self.sessions]
        return Cluster(workers, self.pairs.schedulable(self._clock.now()))

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output that some attached worker can take; the last known value while none is."""
        lengths = [session.capacity for session in self.sessions]
        self._max_model_len = max(lengths, default=self._max_model_len)
        return self._max_model_len

    def link_error(self, address: str) -> str:
        link = self._links.get(address)
        return link.last_error if link else ""

    # ---- what links and sessions report

    def on_attached(self, session: WorkerSession) -> None:
        _log.info("%s worker %s attached at %s", session.hello.role, session.worker_id, session.address)
        self._sessions[session.worker_id] = session
        self._metrics.on_worker(session.worker_id, session.hello.role)
        for other in self.sessions:
            if session.hello.role == "prefill" and other.hello.role == "decode":
                self._introduce(session, other)
            elif session.hello.role == "decode" and other.hello.role == "prefill":
                self._introduce(other, session)
        self._workers_changed()

    def _introduce(self, prefill: WorkerSession, decode: WorkerSession) -> None:
        pair = self.pairs.introduce(prefill.hello, decode.hello)
        if pair.state == CONNECTING:
            peer = pb.ConnectPeer(worker_id=decode.worker_id, address=decode.hello.transfer_address)
            prefill.send(pb.RouterFrame(connect_peer=peer))
        else:
            _log.error("%s cannot hand over to %s: %s", pair.prefill, pair.decode, pair.message)

    def on_lost(self, session: WorkerSession) -> None:
        """A session that another one of the same worker has replaced takes nothing along."""
        if self._sessions.get(session.worker_id) is not session:
            return
        del self._sessions[session.worker_id]
        self.pairs.drop_worker(session.worker_id)
        self._metrics.on_worker_lost(session.worker_id, session.hello.role)
        for other in self.sessions:
            if session.hello.role == "decode" and other.hello.role == "prefill":
                other.send(pb.RouterFrame(disconnect_peer=pb.DisconnectPeer(worker_id=session.worker_id)))
        self._workers_changed()

    def on_heartbeat(self, session: WorkerSession, beat: pb.WorkerHeartbeat) -> None:
        if session.beat is None or beat.steps != session.beat.steps:
            self.last_step_at = self._clock.now()
        self._metrics.on_heartbeat(session.worker_id, beat)
        self._changed()

    def on_peer_state(self, session: WorkerSession, state: pb.PeerState) -> None:
        self.pairs.report(session.worker_id, state.worker_id, state.state, state.message)
        self._changed()

    def on_attempt_events(self, session: WorkerSession, report: pb.AttemptEvents) -> None:
        for event in report.events:
            self._recent.add_worker_event(
                report.key.request_id, session.worker_id, report.key.attempt, event.name, event.at_s
            )

    def on_fenced_frame(self) -> None:
        self._metrics.fenced_frames.inc()

    def on_room(self) -> None:
        self._changed()

    def _workers_changed(self) -> None:
        self._changed()
        for listener in self._worker_listeners:
            listener()

    def _changed(self) -> None:
        self._news.set()
        for listener in self._listeners:
            listener()
