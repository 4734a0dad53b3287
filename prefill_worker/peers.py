"""The decode workers that routers want this prefill worker connected with, and what routers hear of them.

Asyncio thread. A peer is kept while at least one router wants it; `prefill_worker/dialer.py` does the connecting.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.worker.faults import Faults
from baton.worker.session import RouterSession
from baton.worker.tasks import Tasks
from prefill_worker.dialer import Dialer, PeerRefused
from protos import worker_pb2

logger = logging.getLogger(__name__)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0


@dataclass(slots=True, eq=False)
class _Peer:
    worker_id: str
    address: str
    wanted_by: set[RouterSession] = field(default_factory=set)
    state: str = "connecting"
    message: str = ""
    task: asyncio.Task[object] | None = None

    def frame(self) -> worker_pb2.WorkerFrame:
        state = worker_pb2.PeerState(worker_id=self.worker_id, state=self.state, message=self.message)
        return worker_pb2.WorkerFrame(peer_state=state)


class Peers:
    """One task per wanted peer. `on_count` is told how many there are."""

    def __init__(self, dialer: Dialer, tasks: Tasks, faults: Faults, on_count: Callable[[int], None]) -> None:
        self._dialer = dialer
        self._tasks = tasks
        self._faults = faults
        self._on_count = on_count
        self._peers: dict[str, _Peer] = {}

    def want(self, session: RouterSession, worker_id: str, address: str) -> None:
        """Connect, or say how the connection stands. A worker that moved to another address is dialled anew."""
        peer = self._peers.get(worker_id)
        if peer is None or peer.address != address:
            wanted_by = peer.wanted_by if peer is not None else set()
            self._hang_up(worker_id)
            peer = self._peers[worker_id] = _Peer(worker_id, address, wanted_by)
            peer.task = self._tasks.spawn(self._keep(peer), f"peer:{worker_id}")
            self._on_count(len(self._peers))
        peer.wanted_by.add(session)
        session.send(peer.frame())

    def unwant(self, session: RouterSession, worker_id: str) -> None:
        peer = self._peers.get(worker_id)
        if peer is not None:
            peer.wanted_by.discard(session)
            if not peer.wanted_by:
                self._hang_up(worker_id)

    def forget(self, session: RouterSession) -> None:
        """The router is gone, and with it all that it wanted."""
        for worker_id in list(self._peers):
            self.unwant(session, worker_id)

    async def stop(self) -> None:
        tasks = [peer.task for peer in self._peers.values() if peer.task is not None]
        for worker_id in list(self._peers):
            self._hang_up(worker_id)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _hang_up(self, worker_id: str) -> None:
        peer = self._peers.pop(worker_id, None)
        self._dialer.forget(worker_id)
        if peer is not None and peer.task is not None:
            peer.task.cancel()
            self._on_count(len(self._peers))

    async def _keep(self, peer: _Peer) -> None:
        """Connect, and again whenever the connection is lost, until nobody wants it or the peer refuses.

        The pause between tries doubles, and starts over after a success.
        """
        pause = FIRST_PAUSE_S
        while True:
            self._say(peer, "connecting", "")
            was_connected = False

            def on_connected() -> None:
                nonlocal was_connected
                was_connected = True
                self._say(peer, "connected", "")

            def on_lost(reason: str) -> None:
                self._say(peer, "lost", reason)

            try:
                reason = await self._dialer.serve_once(peer.worker_id, peer.address, on_connected, on_lost)
            except PeerRefused as error:
                self._say(peer, "refused", str(error))
                return
            except Exception as error:  # a defect of this try must not part the pair for ever
                self._faults.add()
                logger.exception("the connection with %s went wrong", peer.worker_id)
                reason = repr(error)
            if peer.state != "lost":
                self._say(peer, "lost", reason)
            pause = FIRST_PAUSE_S if was_connected else min(2 * pause, LONGEST_PAUSE_S)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    def _say(self, peer: _Peer, state: str, message: str) -> None:
        """Tell every router that wants the peer, once per change."""
        logger.info("decode worker %s: %s %s", peer.worker_id, state, message)
        peer.state, peer.message = state, message
        for session in peer.wanted_by:
            session.send(peer.frame())
