"""When the parts of a hand-over happened, as seen by its decode end: what operators and benchmarks read.

The decode half owns one Timeline. Chunks are noted on the asyncio thread, posted receives on transfer threads, and
anybody may read. Times are seconds of this worker's clock. What prefill says of its own clock counts only where both
processes run on one kernel, whose monotonic clock they share (`clock_domain`).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

BOUNDS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
REMEMBERED = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def clock_domain() -> str:
    """Names the monotonic clock of this process: equal names, comparable times. Empty when it cannot be told."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


@dataclass(slots=True)
class Histogram:
    """`counts[i]` samples are at most `bounds[i]` and above the bound before; the last count is of all above."""

    bounds: tuple[float, ...] = BOUNDS_S
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def copy(self) -> Histogram:
        return Histogram(self.bounds, list(self.counts), self.total)


@dataclass(frozen=True, slots=True)
class ChunkTimes:
    """One chunk. `written_at`: its KV was computed, None where that is not known on this clock.

    `announced_at`: its Chunk was read. `posted_at`: its receive was launched. `received_at`, `verified_at`: the decode
    half learnt of it.
    """

    seq: int
    lease: int
    num_bytes: int
    announced_at: float
    written_at: float | None = None
    posted_at: float | None = None
    received_at: float | None = None
    verified_at: float | None = None


@dataclass(frozen=True, slots=True)
class HandOverTimes:
    """One admitted hand-over, over all of its chunks. `written_at`: the last of its KV was computed at prefill."""

    request_id: str
    num_tokens: int
    num_chunks: int
    num_bytes: int
    first_announced_at: float | None
    written_at: float | None
    verified_at: float | None
    committed_at: float
    admissible_at: float

    @property
    def exposed_s(self) -> float | None:
        """From the end of the prompt's last layer to verified, committed and admissible."""
        return None if self.written_at is None else self.admissible_at - self.written_at


@dataclass(frozen=True, slots=True)
class TransferTotals:
    """Everything since the start of the worker. `receive_posted`: from Chunk read to receive launched."""

    num_bytes: int
    num_chunks: int
    num_hand_overs: int
    receive_posted: Histogram
    exposed: Histogram


@dataclass(slots=True)
class _OpenLease:
    num_bytes: int = 0
    num_chunks: int = 0
    first_announced_at: float | None = None
    written_at: float | None = None
    verified_at: float | None = None
    committed_at: float | None = None


class Timeline:
    """Any thread. Keeps the latest chunks and hand-overs one by one, and totals of all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], ChunkTimes] = {}
        self._done: dict[str, int] = {}  # chunks whose credits are returned, by live epoch
        self._leases: dict[int, _OpenLease] = {}
        self._chunks: deque[ChunkTimes] = deque(maxlen=REMEMBERED)
        self._hand_overs: deque[HandOverTimes] = deque(maxlen=REMEMBERED)
        self._num_bytes = self._num_chunks = self._num_hand_overs = 0
        self._receive_posted, self._exposed = Histogram(), Histogram()

    # ---- notes

    def reserved(self, lease: int) -> None:
        """The lease has begun. Nothing is noted of leases that have not, or that have ended."""
        with self._lock:
            self._leases[lease] = _OpenLease()

    def epoch_begun(self, epoch: str) -> None:
        """Nothing is noted of epochs that have not, or that have ended: their streams may be read a little longer."""
        with self._lock:
            self._done[epoch] = 0

    def announced(self, epoch: str, seq: int, lease: int, num_bytes: int, written_at: float | None, now: float) -> None:
        with self._lock:
            if epoch not in self._done or seq < self._done[epoch] or (epoch, seq) in self._open:
                return  # of an epoch that is over, or told twice
            self._open[epoch, seq] = ChunkTimes(seq, lease, num_bytes, announced_at=now, written_at=written_at)
            of_lease = self._leases.get(lease)
            if of_lease is None:
                return
            of_lease.num_bytes += num_bytes
            of_lease.num_chunks += 1
            if of_lease.first_announced_at is None:
                of_lease.first_announced_at = now
            if written_at is not None:
                of_lease.written_at = max(written_at, of_lease.written_at or written_at)

    def posted(self, epoch: str, seq: int, now: float) -> None:
        with self._lock:
            chunk = self._open.get((epoch, seq))
            if chunk is not None:
                self._open[epoch, seq] = replace(chunk, posted_at=now)
                self._receive_posted.add(now - chunk.announced_at)

    def received(self, epoch: str, seq: int, now: float) -> None:
        """The first word counts: a receive and the unpack behind it may both say so."""
        with self._lock:
            chunk = self._open.get((epoch, seq))
            if chunk is not None and chunk.received_at is None:
                self._open[epoch, seq] = replace(chunk, received_at=now)
                self._num_bytes += chunk.num_bytes
                self._num_chunks += 1

    def verified(self, epoch: str, seq: int, now: float) -> None:
        with self._lock:
            chunk = self._open.pop((epoch, seq), None)
            if chunk is not None:
                self._chunks.append(replace(chunk, verified_at=now))
                if chunk.lease in self._leases:
                    self._leases[chunk.lease].verified_at = now

    def done(self, epoch: str, through: int) -> None:
        """Credits of all chunks below `through` are returned. What was received and dropped is forgotten."""
        with self._lock:
            if epoch in self._done:
                self._done[epoch] = through
            for key in [key for key in self._open if key[0] == epoch and key[1] < through]:
                del self._open[key]

    def committed(self, lease: int, now: float) -> None:
        """Its Commit was read. A prompt that decode caches whole has no chunk before it."""
        with self._lock:
            if lease in self._leases:
                self._leases[lease].committed_at = now

    def admissible(self, lease: int, request_id: str, num_tokens: int, now: float) -> None:
        with self._lock:
            times = self._leases.pop(lease, None) or _OpenLease()
            hand_over = HandOverTimes(
                request_id,
                num_tokens,
                times.num_chunks,
                times.num_bytes,
                times.first_announced_at,
                times.written_at,
                times.verified_at,
                now if times.committed_at is None else times.committed_at,
                now,
            )
            self._hand_overs.append(hand_over)
            self._num_hand_overs += 1
            if hand_over.exposed_s is not None:
                self._exposed.add(hand_over.exposed_s)

    def lease_ended(self, lease: int) -> None:
        with self._lock:
            self._leases.pop(lease, None)

    def epoch_ended(self, epoch: str) -> None:
        """Chunks that it had in flight are forgotten."""
        with self._lock:
            self._done.pop(epoch, None)
            self._open = {key: chunk for key, chunk in self._open.items() if key[0] != epoch}

    # ---- reading

    def chunks(self) -> Sequence[ChunkTimes]:
        """The latest verified chunks, oldest first."""
        with self._lock:
            return list(self._chunks)

    def hand_overs(self) -> Sequence[HandOverTimes]:
        """The latest admitted hand-overs, oldest first."""
        with self._lock:
            return list(self._hand_overs)

    def totals(self) -> TransferTotals:
        with self._lock:
            return TransferTotals(
                self._num_bytes,
                self._num_chunks,
                self._num_hand_overs,
                self._receive_posted.copy(),
                self._exposed.copy(),
            )
