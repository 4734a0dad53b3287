"""Events and actions of the protocol that both ends have: connections, messages, time, and the names of attempts.

Times are seconds of one monotonic clock and arrive inside events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kv_transfer.messages import DecodeMessage, PrefillMessage


class AttemptKey(NamedTuple):
    """One try at one request, as the router names it."""

    request_id: str
    attempt: int


# ---- events


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """The pair's process group is up under `epoch`; `window` chunks may be in flight."""

    peer: str
    epoch: str
    window: int


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The control stream of `epoch` ended, fell silent, or a transfer of it failed."""

    peer: str
    epoch: str
    reason: str


@dataclass(frozen=True, slots=True)
class EpochDestroyed:
    """The process group of `epoch` is gone and its transfer thread has ended.

    No pack, send, receive or unpack of it runs or will start: nothing of it can touch staging or KV blocks any more.
    """

    peer: str
    epoch: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """The router withdraws an attempt. Unknown and ended attempts are a no-op."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; deadlines at or before `now` fall due. Sent by the reaper's own timer, due or not."""

    now: float


# ---- actions


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Write a frame to the peer's control stream of `epoch`; drop it if that stream is gone."""

    peer: str
    epoch: str
    message: PrefillMessage | DecodeMessage


@dataclass(frozen=True, slots=True)
class DestroyEpoch:
    """Close the control stream and the process group of `epoch`, then report EpochDestroyed."""

    peer: str
    epoch: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReportFailed:
    """Tell the router that the attempt has ended here without finishing."""

    key: AttemptKey
    code: str
    reason: str


CommonEvent = PeerConnected | PeerLost | EpochDestroyed | Cancel | Tick
CommonAction = SendMessage | DestroyEpoch | ReportFailed
