"""Launched steps, and how long the engine thread may wait for news before it launches or lands one. Engine thread only.

A step that is launched as soon as the one before runs leaves out all that arrives while that one runs, and a thread
that blocks on the device answers nobody. So the thread waits at its inbox for as long as the device is busy anyway,
and where an admission is expected the launch waits too, until shortly before the running step ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from baton.common.clock import Clock
from baton.engine.batch import ScheduledStep
from baton.engine.inbox import Inbox
from baton.engine.logprobs import StepLogprobs
from baton.engine.staging import PendingTokens

_POLL_S = 0.0005  # how late the end of a step of unknown length may be noticed, of one with prompts also of a known one
_BLOCK_S = 0.0004  # so long before its expected end a step is waited for at the device, which wakes without delay
_NUM_REMEMBERED = 4
_ALIKE_TOKENS = 128  # steps over prompts are alike when they have the same number of tokens in units of these


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step. `ends`: tokens whose KV each of its sequences has when it lands, decodes first."""

    step: ScheduledStep
    ends: tuple[int, ...]
    tokens: PendingTokens
    logprobs: StepLogprobs
    started: float


class Pacer:
    """`lead_s`: so long before the expected end of a step its successor is launched while an admission is expected;
    None: always at once.
    """

    def __init__(self, inbox: Inbox, clock: Clock, lead_s: float | None) -> None:
        self._inbox = inbox
        self._clock = clock
        self._lead_s = lead_s
        self._landed_at = clock.now()
        self._seconds: dict[int, deque[float]] = {}  # of the latest steps of each kind

    def landed(self, flight: Flight) -> float:
        """The step has ended now; how long it took since it began or the one before ended."""
        now = self._clock.now()
        seconds = max(0.0, now - max(flight.started, self._landed_at))
        self._landed_at = now
        if (kind := _kind(flight.step)) is not None:
            self._seconds.setdefault(kind, deque(maxlen=_NUM_REMEMBERED)).append(seconds)
        return seconds

    def hold_launch(self, running: Flight) -> bool:
        """Wait while the successor of `running` is better launched later; whether a command came meanwhile."""
        end = self._expected_end(running)
        if end is None or self._lead_s is None or running.step.prefills or running.tokens.is_ready():
            return False
        left = end - self._lead_s - self._clock.now()
        return left > 0 and self._inbox.wait(left)

    def await_landing(self, flight: Flight) -> bool:
        """Wait until the step has ended or nearly so; False when a command came first."""
        while not flight.tokens.is_ready():
            end = self._expected_end(flight)
            left = _POLL_S if end is None else end - _BLOCK_S - self._clock.now()
            if left <= 0:
                return True
            if self._inbox.wait(min(left, _POLL_S) if flight.step.prefills else left):
                return False
        return True

    def _expected_end(self, flight: Flight) -> float | None:
        """Steps of a kind take about the same. Never later than the fastest of the latest."""
        kind = _kind(flight.step)
        seconds = self._seconds.get(kind) if kind is not None else None
        return max(flight.started, self._landed_at) + min(seconds) if seconds else None


def _kind(step: ScheduledStep) -> int | None:
    """0 where a step only decodes, its size where it only computes prompts from their start.

    What does both has no equals, nor has a later part of a prompt, whose time grows with what is before it.
    """
    if step.prefills and (step.decodes or not all(segment.is_first for segment in step.prefills)):
        return None
    return -(-step.num_prefill_tokens // _ALIKE_TOKENS)
