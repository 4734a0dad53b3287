"""What the runner asks of a faster way for steps that only decode. A CPU has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from baton.engine.batch import ScheduledStep
from baton.engine.request import Request


class DecodePath(Protocol):
    """Engine thread, current stream, inference mode. Reads and writes the runner's draws."""

    def measure(self) -> int:
        """Bytes that `prepare` will take on the device, found by preparing a part. Before `prepare`."""
        ...

    def prepare(self) -> None:
        """Get ready for every size of batch. Once, before the first `launch`."""
        ...

    def takes(self, step: ScheduledStep) -> bool:
        """Whether `launch` can run this step."""
        ...

    def launch(self, decodes: Sequence[Request]) -> None:
        """Start one token for each; the first rows of the draws hold them when it has run."""
        ...

    def forget_last(self) -> None:
        """A step is launched in another way: the draws are no longer those of the last `launch`."""
        ...

    def replay_last(self) -> None:
        """Compute the last launch once more, for measurements. Only right after a launch."""
        ...
