"""Local generation: prefill and decode on this worker. Attached to every worker, whatever its role.

Also the owner of attempts whose hand-over is complete: from then on they are local requests like any other.
"""

from __future__ import annotations

from baton.common.clock import Clock
from baton.engine.ports import Abort, AddRequest, RequestFailed
from baton.worker.attempts import Attempt, Attempts
from baton.worker.half import AttemptCommand, BaseHalf, EnginePort
from baton.worker.session import engine_id
from protos import worker_pb2 as pb


class GenerateHalf(BaseHalf):
    """Stateless: the engine holds the requests, the table holds the attempts."""

    commands = frozenset({"generate"})

    def __init__(self, engine: EnginePort, attempts: Attempts, clock: Clock) -> None:
        self._engine = engine
        self._attempts = attempts
        self._clock = clock

    def begin(self, attempt: Attempt, command: AttemptCommand) -> None:
        assert isinstance(command, pb.GenerateCommand)
        shares = command.HasField("fork_of")
        fork_of = engine_id(attempt.session.key(command.fork_of)) if shares else ""
        self._engine.post(AddRequest(attempt.spec.request(attempt.engine_id, self._clock.now(), fork_of=fork_of)))

    def cancel(self, attempt: Attempt) -> None:
        self._engine.post(Abort(attempt.engine_id))

    def on_failure(self, failure: RequestFailed) -> None:
        attempt = self._attempts.get(failure.request_id)
        if attempt is None or attempt.owner is not self:
            return
        if failure.code == "invalid":
            self._attempts.refuse(attempt, "invalid", failure.reason)
        else:
            self._attempts.fail(attempt, "internal", f"{failure.code}: {failure.reason}")
