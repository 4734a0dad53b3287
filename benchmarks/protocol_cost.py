"""What the hand-over protocol itself costs per chunk, without transport, engine or event loop.

    python -m benchmarks.protocol_cost [--repeats N] [--out FILE] [CASE ...]

Both pure machines of `kv_transfer.protocol` hand requests over to each other; every action that waits for the world
(pack, send, receive, unpack, reserve) is answered at once. Each step is timed by itself. A case says how many requests
are handed over together, in how many chunks each, how many more are open and silent, and whether the KV comes chunk by
chunk or all at once, so that it queues for credits. Microseconds, the clock's own cost included; the collector is on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.serve.environment import describe_client
from kv_transfer import events as ev
from kv_transfer.messages import Segment
from kv_transfer.protocol import DecodeState, PrefillState, counters, decode_step, prefill_step

PREFILL, DECODE = "prefill", "decode"
EPOCH = "P0 D0 #1"
LAYERS = 32
GROUPS = 4  # layer groups of one step's blocks: chunks come group by group
BLOCKS = 64  # of a prompt that come with one step
WINDOW = 8
FAR = 1e9


@dataclass(frozen=True, slots=True)
class Case:
    requests: int = 8
    chunks: int = 64
    idle: int = 0
    burst: bool = False


CASES = {
    "paced": Case(),
    "burst": Case(burst=True),
    "paced, 504 more open": Case(idle=504),
    "burst, 504 more open": Case(idle=504, burst=True),
    "paced, 512 chunks": Case(chunks=512),
    "burst, 512 chunks": Case(chunks=512, burst=True),
    "one request": Case(requests=1),
}


class Pair:
    """A prefill and a decode end, and everything between them. Counts nanoseconds per side and kind of event."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {
            PREFILL: PrefillState.initial(),
            DECODE: DecodeState.initial(num_layers=LAYERS),
        }
        self.steps: dict[str, Callable[..., Any]] = {PREFILL: prefill_step, DECODE: decode_step}
        self.times: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.admitted = 0
        self._due: deque[tuple[str, Any]] = deque()
        self._sends: deque[int] = deque()
        self._receives: deque[int] = deque()
        for side, peer in ((PREFILL, DECODE), (DECODE, PREFILL)):
            self.feed(side, ev.PeerConnected(peer, EPOCH, WINDOW))

    def feed(self, side: str, event: Any) -> None:
        """One event, and all that follows from it."""
        self._due.append((side, event))
        while self._due:
            self._step(*self._due.popleft())

    def _step(self, side: str, event: Any) -> None:
        step, state = self.steps[side], self.states[side]
        began = time.perf_counter_ns()
        after, actions = step(state, event)
        took = time.perf_counter_ns() - began
        self.states[side] = after
        self.times[side, kind_of(event)].append(took)
        for action in actions:
            self._perform(side, action)

    def _perform(self, side: str, action: Any) -> None:
        match action:
            case ev.SendMessage():
                sent: Any = ev.FromPrefill if side == PREFILL else ev.FromDecode
                self._due.append((other(side), sent(side, EPOCH, action.message)))
            case ev.Pack():
                prints = tuple(range(action.segment.num_blocks))
                self._due.append((PREFILL, ev.Packed(DECODE, EPOCH, action.seq, prints)))
            case ev.StartSend():
                self._sends.append(action.seq)
                self._match()
            case ev.StartRecv():
                self._receives.append(action.seq)
                self._match()
            case ev.Unpack():
                self._due.append((DECODE, ev.Unpacked(PREFILL, EPOCH, action.seq, True)))
            case ev.ReserveBlocks():
                self._due.append((DECODE, ev.BlocksReserved(action.lease, 1, 0, self.num_blocks)))
            case ev.ReportReserved():
                self._due.append((PREFILL, ev.PrefillRequested(action.key, DECODE, action.lease, 0, FAR)))
            case ev.Admit():
                self.admitted += 1
            case ev.ReportFailed() | ev.ReportRefused() | ev.DestroyEpoch() | ev.ReleaseLease():
                raise AssertionError(f"unexpected: {action}")

    def _match(self) -> None:
        if self._sends and self._receives:
            self._due.append((PREFILL, ev.SendDone(DECODE, EPOCH, self._sends.popleft())))
            self._due.append((DECODE, ev.Received(PREFILL, EPOCH, self._receives.popleft())))

    # ---- a run

    num_blocks = 0

    def hand_over(self, case: Case) -> None:
        """All requests of the case, their chunks interleaved."""
        self.num_blocks = case.chunks // GROUPS * BLOCKS
        keys = [ev.AttemptKey(f"request-{number}", 0) for number in range(case.requests + case.idle)]
        for key in keys:
            self.feed(DECODE, ev.OpenRequested(key, PREFILL, self.num_blocks, FAR))
        moving = keys[case.idle :]
        written = [ev.SegmentReady(key, piece, 1 << 20) for piece in pieces(case.chunks) for key in moving]
        if case.burst:
            self._due.extend((PREFILL, event) for event in written)
            self._due.extend((PREFILL, ev.PrefillDone(key, self.num_blocks, 7, False)) for key in moving)
            self.feed(PREFILL, ev.Tick(1.0))
        else:
            for event in written:
                self.feed(PREFILL, event)
            for key in moving:
                self.feed(PREFILL, ev.PrefillDone(key, self.num_blocks, 7, False))
        left = [counters(state) for state in self.states.values()]
        if self.admitted != case.requests or left != [(case.idle, 0, 0)] * 2:
            raise AssertionError(f"{self.admitted} of {case.requests} requests were handed over, {left} is left")


def other(side: str) -> str:
    return DECODE if side == PREFILL else PREFILL


def kind_of(event: Any) -> str:
    inner = getattr(event, "message", event)
    return type(inner).__name__


def pieces(chunks: int) -> Iterator[Segment]:
    """Chunks of a prompt in the order of computing: all layer groups of some blocks, then the next blocks."""
    depth = LAYERS // GROUPS
    for number in range(chunks):
        step, group = divmod(number, GROUPS)
        yield Segment(group * depth, (group + 1) * depth, step * BLOCKS, (step + 1) * BLOCKS)


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Every run takes the same steps; of each, the least time that it took counts, so that what else runs does not."""
    runs = []
    for _ in range(repeats):
        pair = Pair()
        pair.hand_over(case)
        runs.append(pair.times)
    least = {step: np.min([run[step] for run in runs], axis=0) for step in sorted(runs[0])}
    chunks = case.requests * case.chunks
    per_chunk = {
        side: round(float(sum(taken.sum() for (at, _), taken in least.items() if at == side)) / chunks / 1e3, 2)
        for side in (PREFILL, DECODE)
    }
    events = {f"{side} {kind}": _figures(taken) for (side, kind), taken in least.items()}
    return {"per_chunk_us": per_chunk, "events_us": events}


def _figures(nanoseconds: npt.NDArray[np.int64]) -> dict[str, float]:
    median, high = np.percentile(nanoseconds, [50, 99]) / 1e3
    mean = float(np.mean(nanoseconds)) / 1e3
    return {"count": len(nanoseconds), "mean": round(mean, 2), "p50": round(median, 2), "p99": round(high, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", choices=[[], *CASES])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, object]] = {}
    for name in options.cases or list(CASES):
        results[name] = measure(CASES[name], options.repeats)
        print(f"{name:24} {results[name]['per_chunk_us']} us per chunk", flush=True)
    if options.out:
        report = {"environment": asyncio.run(describe_client()), "repeats": options.repeats, "cases": results}
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
