"""The engine's way out: its callbacks, called on the engine thread, reach the asyncio thread in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.engine.ports import Admission, PrefillDone, SegmentWritten, StepReport
from baton.worker.mailbox import Mailbox


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine's thread has ended by itself."""

    reason: str


EngineResult = SegmentWritten | PrefillDone | StepReport | EngineLost


class EnginePorts:
    """Implements `baton.engine.ports.Ports`. Nothing here blocks the engine."""

    def __init__(self, mailbox: Mailbox[EngineResult]) -> None:
        self._mailbox = mailbox

    def on_layer_group(self, segment: SegmentWritten) -> None:
        self._mailbox.post(segment)

    def on_prefill_done(self, done: PrefillDone) -> None:
        self._mailbox.post(done)

    def on_step(self, report: StepReport) -> None:
        self._mailbox.post(report)

    def ready_to_admit(self) -> Sequence[Admission]:
        """Admissions are posted to the engine's inbox when they are ready, so there is never one to fetch."""
        return ()

    def on_lost(self, reason: str) -> None:
        self._mailbox.post(EngineLost(reason))
