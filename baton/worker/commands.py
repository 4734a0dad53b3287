"""From a router's frame to the half that serves it: duplicates, draining and invalid requests are dealt with here.

Asyncio thread, called by the Attach service for every frame after the hello.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from baton.common.errors import InvalidRequest
from baton.worker.attempts import Attempts, send_refusal
from baton.worker.half import AttemptCommand, Half, PeerCommand
from baton.worker.session import RouterSession
from baton.worker.spec import Limits, read_spec
from protos import worker_pb2 as pb

logger = logging.getLogger(__name__)


class CommandDispatcher:
    """Routes by the name of the frame's field; each name belongs to one half."""

    def __init__(self, attempts: Attempts, limits: Limits, halves: Iterable[Half]) -> None:
        self._attempts = attempts
        self._limits = limits
        self._half_of = {name: half for half in halves for name in half.commands}
        self.draining = False

    def dispatch(self, session: RouterSession, frame: pb.RouterFrame) -> None:
        name = frame.WhichOneof("frame")
        match name:
            case "heartbeat":
                pass
            case "cancel":
                self._attempts.cancel(session, frame.cancel.key)
            case "generate":
                self._begin(session, name, frame.generate)
            case "open":
                self._begin(session, name, frame.open)
            case "prefill":
                self._begin(session, name, frame.prefill)
            case "connect_peer":
                self._on_peer(session, name, frame.connect_peer)
            case "disconnect_peer":
                self._on_peer(session, name, frame.disconnect_peer)
            case _:
                logger.warning("router %s sent an unexpected frame: %s", session.router_id, name)

    def _begin(self, session: RouterSession, name: str, command: AttemptCommand) -> None:
        if self._attempts.is_known(session, session.key(command.key)):
            return
        half = self._half_of.get(name)
        if half is None:
            send_refusal(session, command.key, "invalid", f"this worker takes no {name} command")
        elif self.draining:
            send_refusal(session, command.key, "draining", "this worker is being drained")
        else:
            self._accept(session, half, command)

    def _accept(self, session: RouterSession, half: Half, command: AttemptCommand) -> None:
        try:
            spec = read_spec(command.spec, self._limits)
        except InvalidRequest as error:
            send_refusal(session, command.key, "invalid", str(error))
            return
        half.begin(self._attempts.accept(session, command.key, spec, half), command)

    def _on_peer(self, session: RouterSession, name: str, command: PeerCommand) -> None:
        half = self._half_of.get(name)
        if half is None:
            logger.warning("router %s sent %s to a worker that connects to no peer", session.router_id, name)
            return
        half.on_peer_command(session, command)
