"""Closing a link to a worker, also in the very moment in which a dial fails: nothing is dialled afterwards."""

from __future__ import annotations

import asyncio
import socket

from baton.common.clock import MonotonicClock
from router.worker_link import LinkSettings, WorkerLink
from router.worker_session import WorkerSession

CLOSE_S = 15.0


class Nobody:
    """An observer of links on which nobody ever says hello."""

    def on_attached(self, session: WorkerSession) -> None:
        raise AssertionError(session)

    on_lost = on_heartbeat = on_peer_state = on_attached


class Stubborn(WorkerLink):
    """A link whose dial swallows the cancel that meets it, as a library may."""

    num_dials = 0

    async def _attach_once(self) -> bool:
        self.num_dials += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return True
        return False


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def link(kind: type[WorkerLink]) -> WorkerLink:
    observer = Nobody()
    return kind(f"127.0.0.1:{closed_port()}", LinkSettings("router", 0.1, 1.0), observer, MonotonicClock())  # type: ignore[arg-type]


async def test_a_swallowed_cancel_ends_the_link_all_the_same() -> None:
    stubborn = link(Stubborn)
    stubborn.start()
    await asyncio.sleep(0)
    await asyncio.wait_for(stubborn.close(), CLOSE_S)
    assert isinstance(stubborn, Stubborn)
    assert stubborn.num_dials == 1


async def test_links_close_whenever_their_dial_fails() -> None:
    for step in range(100):
        dialling = link(WorkerLink)
        dialling.start()
        await asyncio.sleep(step * 0.0001)
        await asyncio.wait_for(dialling.close(), CLOSE_S)
