"""Known bugs of hand-overs, put back into the protocol one at a time. `test_mutants.py` expects each to be caught.

A mutant replaces one or two small functions of the protocol and names the smallest world in which it must show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kv_transfer import (
    decode_chunks,
    decode_ends,
    decode_protocol,
    link_protocol,
    prefill_chunks,
    prefill_ends,
    prefill_protocol,
)
from kv_transfer.decode_state import Lease, LeasePhase, RecvFlight
from kv_transfer.events import (
    OpenRequested,
    PeerConnected,
    PrefillRequested,
    Received,
    ReleaseLease,
    ReportFailed,
    Unpack,
)
from kv_transfer.messages import Chunk, ChunksDone, Commit, Committed, LeaseKey
from kv_transfer.prefill_state import Attempt
from kv_transfer.slots import SlotPool
from tests.transfer.explorer.config import Config, RequestSpec

Patch = tuple[Any, str, Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    config: Config
    patches: tuple[Patch, ...]


def world(
    *kinds: str, requests: int = 1, chunks: int = 1, faults: int = 1, attempts: int = 1, tokens: int = 2
) -> Config:
    specs = (RequestSpec(0, 0, chunks, tokens=tokens),) * requests
    return Config("mutant", 1, 1, specs, faults, frozenset(kinds), attempts=attempts)


def _never(*_: Any) -> bool:
    return False


def _always(*_: Any) -> bool:
    return True


def _nothing(*_: Any) -> None:
    return None


def _acknowledge_unknown(turn: decode_ends.Turn, peer: str, name: LeaseKey) -> None:
    turn.tell(peer, Committed(name))


_tick = link_protocol.on_tick
_requested, _open = prefill_protocol.on_requested, decode_protocol.on_open


def _requested_then_clean(turn: prefill_ends.Turn, event: PrefillRequested) -> None:
    _tick(turn, turn.now)
    _requested(turn, event)


def _open_then_clean(turn: decode_ends.Turn, event: OpenRequested) -> None:
    _tick(turn, turn.now)
    _open(turn, event)


def _note_time(turn: Any, now: float) -> None:
    turn.now = max(now, turn.now)


_chunk = decode_chunks.on_chunk


def _repeat_restarts_deadline(turn: decode_ends.Turn, peer: str, chunk: Chunk) -> None:
    lease = turn.live_lease(peer, chunk.lease)
    if lease is not None and chunk.seq < turn.link(peer).next_seq:
        turn.change(lease._replace(deadline=lease.deadline + 10.0))
    _chunk(turn, peer, chunk)


def _any_generation(turn: decode_ends.Turn, peer: str, name: LeaseKey) -> Lease | None:
    lease = turn.holders.get(name.lease)
    return lease if lease is not None and lease.phase is LeasePhase.RESERVED and lease.peer == peer else None


def _finish_keeps_lease(turn: decode_ends.Turn, peer: str, name: LeaseKey) -> None:
    lease = turn.live_lease(peer, name)
    if lease is not None:
        turn.act(ReleaseLease(lease.key, name))


_open_epoch = SlotPool.open_epoch


def _all_slots_free(pool: SlotPool[Any], window: int) -> SlotPool[Any]:
    return _open_epoch(pool, window)._replace(free=tuple(range(window)))


_connected = link_protocol.on_connected


def _connect_once(turn: Any, event: PeerConnected) -> None:
    if event.epoch.endswith("#1"):
        _connected(turn, event)


def _receive_repeats(turn: decode_ends.Turn, peer: str, chunk: Chunk) -> None:
    link = turn.link(peer)
    if chunk.seq >= link.next_seq:
        _chunk(turn, peer, chunk)
        return
    decode_chunks.start_recvs(turn, peer, link._replace(flights=(*link.flights, RecvFlight(chunk))))


_decode_fail = decode_ends.fail


def _spare_untouched(turn: decode_ends.Turn, lease: Lease, code: str, reason: str) -> None:
    if code != "peer_lost" or lease.num_received:
        _decode_fail(turn, lease, code, reason)


def _forget_attempt(turn: prefill_ends.Turn, key: Any, attempt: Attempt) -> None:
    turn.holders, turn.aliases = turn.holders.discard(key), turn.aliases.discard(attempt.alias)


_on_received = decode_chunks.on_received


def _keep_credit_of_dropped(turn: decode_ends.Turn, event: Received) -> None:
    _on_received(turn, event)
    if not any(isinstance(action, Unpack) for action in turn.actions):
        messages = [getattr(action, "message", None) for action in turn.actions]
        turn.actions = [a for a, said in zip(turn.actions, messages, strict=True) if not isinstance(said, ChunksDone)]


_drain = prefill_ends.drain


def _report_cancel(turn: prefill_ends.Turn, attempt: Attempt) -> None:
    _drain(turn, attempt)
    turn.act(ReportFailed(attempt.key, "aborted", "drained"))


def _commit_at_once(turn: decode_ends.Turn, peer: str, commit: Commit) -> None:
    lease = turn.live_lease(peer, commit.lease)
    if lease is None:
        turn.tell(peer, Committed(commit.lease))
        return
    turn.tell(peer, Committed(commit.lease))
    lease = lease._replace(commit=commit)
    turn.change(lease)
    decode_chunks.try_admit(turn, lease)


def _end_without_abort(turn: prefill_ends.Turn, attempt: Attempt, code: str, reason: str) -> None:
    turn.report(attempt.key, code, reason)
    prefill_ends.drain(turn, attempt)


MUTANTS = (
    Mutant(
        "prefill frees blocks while a pack reads them",
        world("cancel"),
        ((prefill_ends, "pack_in_flight", _never),),
    ),
    Mutant(
        "decode frees blocks while an unpack writes to them",
        world("cancel"),
        ((decode_ends, "unpack_in_flight", _never),),
    ),
    Mutant("an unknown lease is acknowledged", world("cancel"), ((decode_chunks, "disown", _acknowledge_unknown),)),
    Mutant("a commit is acknowledged before it is checked", world(), ((decode_chunks, "on_commit", _commit_at_once),)),
    Mutant(
        "decode is not told of a prefill abort",
        world("refuse", "lose", faults=2),
        ((prefill_ends, "tell_abort", _nothing),),
    ),
    Mutant(
        "prefill is not told of a decode abort",
        world("tick", "lose", faults=2),
        ((decode_ends, "tell_abort", _nothing),),
    ),
    Mutant(
        "expired attempts are cleaned up only when new work comes",
        world("lose"),
        (
            (link_protocol, "on_tick", _note_time),
            (prefill_protocol, "on_requested", _requested_then_clean),
            (decode_protocol, "on_open", _open_then_clean),
        ),
    ),
    Mutant(
        "a stale event restarts a deadline", world("dup"), ((decode_chunks, "on_chunk", _repeat_restarts_deadline),)
    ),
    Mutant(
        "a late chunk of an old generation is accepted",
        replace(world("crash", requests=2), fine=False),
        ((decode_ends.Turn, "live_lease", _any_generation),),
    ),
    Mutant("prefill commits before its last chunk", world(), ((prefill_chunks, "_has_unsent", _never),)),
    Mutant("decode does not count what it received", world("lose", chunks=2), ((decode_chunks, "adds_up", _always),)),
    Mutant(
        "blocks are freed twice when a cancel races a finish",
        world("cancel", tokens=1),
        ((decode_protocol, "on_finish", _finish_keeps_lease),),
    ),
    Mutant(
        "a dead epoch's slot returns early",
        world("suspect", attempts=2),
        ((SlotPool, "open_epoch", _all_slots_free),),
    ),
    Mutant("a peer once lost is dead for ever", world("suspect"), ((link_protocol, "on_connected", _connect_once),)),
    Mutant("a repeated chunk is received twice", world("dup"), ((decode_chunks, "on_chunk", _receive_repeats),)),
    Mutant(
        "a lost peer's untouched lease lives on",
        world("suspect"),
        ((decode_ends, "fail", _spare_untouched),),
    ),
    Mutant("a repeated command is run again", world("dup"), ((prefill_ends.Turn, "forget", _forget_attempt),)),
    Mutant(
        "credits of dropped chunks are kept",
        world("cancel"),
        ((decode_chunks, "on_received", _keep_credit_of_dropped),),
    ),
    Mutant("every end is reported, also a good one", world(), ((prefill_ends, "drain", _report_cancel),)),
    Mutant(
        "the stall watch is missing",
        world("lose"),
        ((link_protocol, "watch_progress", _nothing),),
    ),
    Mutant("the engine is not told of an abort", world("tick"), ((prefill_ends, "end", _end_without_abort),)),
)
