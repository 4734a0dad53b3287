"""The way of a segment through the prefill end: queued, packing, packed, sending, acknowledged; then the commit.

Used by `prefill_protocol` only. A sequence number that was given out is always sent, even if its attempt has ended
since: sends and receives of the pair stay matched, and the peer drops what nobody wants.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from kv_transfer import prefill_ends as ends
from kv_transfer.events import AttemptKey, Pack, Packed, PrefillDone, SegmentReady, SendDone, StartSend
from kv_transfer.messages import Chunk, Commit, Finish
from kv_transfer.prefill_ends import Turn
from kv_transfer.prefill_state import FirstToken, Flight, Link, Phase, PrefillState, Queued, Stage


def on_segment(turn: Turn, event: SegmentReady) -> None:
    attempt = turn.state.attempts.get(event.key)
    if attempt is None or attempt.phase is not Phase.STREAMING or attempt.first is not None:
        return
    link = turn.state.link(attempt.peer)
    queued = Queued(event.key, attempt.lease, event.segment, event.num_bytes)
    turn.state = turn.state.with_link(attempt.peer, replace(link, queue=(*link.queue, queued)))
    pump(turn, attempt.peer)


def pump(turn: Turn, peer: str) -> None:
    """Start packs while a segment waits and a slot and a credit are there."""
    link = turn.state.link(peer)
    while link.queue and link.has_room and link.epoch is not None:
        queued = link.queue[next_to_pack(turn.state, link)]
        slot, slots = link.slots.take()
        seq = link.next_seq
        turn.act(Pack(peer, link.epoch, seq, slot, queued.key, queued.lease, queued.segment))
        link = replace(
            link,
            slots=slots,
            next_seq=seq + 1,
            queue=tuple(other for other in link.queue if other is not queued),
            flights=(*link.flights, Flight(seq, slot, Stage.PACKING, queued)),
        )
        turn.state = turn.state.with_link(peer, link)


def next_to_pack(state: PrefillState, link: Link) -> int:
    """Nearest to commit first: fewest segments left among attempts that announced all of theirs; else first come."""
    left = Counter(queued.key for queued in link.queue)
    final = [key for key in left if state.attempts[key].first is not None]
    if not final:
        return 0
    nearest = min(final, key=left.__getitem__)
    return next(index for index, queued in enumerate(link.queue) if queued.key == nearest)


def on_packed(turn: Turn, event: Packed) -> None:
    link = turn.state.link(event.peer)
    index = _flight_index(link, event.epoch, event.seq, Stage.PACKING)
    if index is None:
        return
    packed = link.flights[index]._replace(stage=Stage.PACKED, fingerprints=event.fingerprints)
    flights = (*link.flights[:index], packed, *link.flights[index + 1 :])
    turn.state = turn.state.with_link(event.peer, replace(link, flights=flights, stall_at=None))
    _send_packed(turn, event.peer)
    ends.settle(turn, packed.queued.key)


def _flight_index(link: Link, epoch: str, seq: int, stage: Stage) -> int | None:
    """The flight that an event of `epoch` means; None for a repeat or an event of a dead epoch."""
    if link.epoch != epoch:
        return None
    return next((i for i, flight in enumerate(link.flights) if flight.seq == seq and flight.stage is stage), None)


def _send_packed(turn: Turn, peer: str) -> None:
    """Announce and launch what is packed, strictly in order of seq."""
    for flight in turn.state.link(peer).flights:
        if flight.stage is Stage.PACKING:
            return
        if flight.stage is Stage.PACKED:
            _send(turn, peer, flight)


def _send(turn: Turn, peer: str, flight: Flight) -> None:
    link = turn.state.link(peer)
    if link.epoch is None:
        return
    queued = flight.queued
    turn.tell(peer, Chunk(flight.seq, queued.lease, queued.segment, queued.num_bytes, flight.fingerprints))
    turn.act(StartSend(peer, link.epoch, flight.seq, flight.slot, queued.num_bytes))
    sending = flight._replace(stage=Stage.SENDING)
    flights = tuple(sending if other.seq == flight.seq else other for other in link.flights)
    turn.state = turn.state.with_link(peer, replace(link, flights=flights))
    attempt = turn.state.attempts.get(queued.key)
    if attempt is not None and attempt.phase is Phase.STREAMING:
        turn.state = turn.state.with_attempt(replace(attempt, num_chunks=attempt.num_chunks + 1))
        try_commit(turn, queued.key)


def on_send_done(turn: Turn, event: SendDone) -> None:
    link = turn.state.link(event.peer)
    index = _flight_index(link, event.epoch, event.seq, Stage.SENDING)
    if index is None:
        return
    slots = link.slots.give(link.flights[index].slot)
    flights = (*link.flights[:index], *link.flights[index + 1 :])
    turn.state = turn.state.with_link(event.peer, replace(link, slots=slots, flights=flights, stall_at=None))
    pump(turn, event.peer)


def on_chunks_done(turn: Turn, peer: str, through: int) -> None:
    link = turn.state.link(peer)
    if through > link.sent_through:
        ends.lose(turn, peer, f"peer acknowledged chunk {through - 1}, which was never sent")
    elif through > link.done_through:
        turn.state = turn.state.with_link(peer, replace(link, done_through=through, stall_at=None))
        pump(turn, peer)


# ---- commit


def on_done(turn: Turn, event: PrefillDone) -> None:
    attempt = turn.state.attempts.get(event.key)
    if attempt is None or attempt.phase is not Phase.STREAMING or attempt.first is not None:
        return
    first = FirstToken(event.num_tokens, event.first_token, event.ended)
    turn.state = turn.state.with_attempt(replace(attempt, first=first, in_engine=False))
    if event.ended:
        turn.tell(attempt.peer, Finish(attempt.lease))
        ends.drain(turn, event.key)
    else:
        try_commit(turn, event.key)


def try_commit(turn: Turn, key: AttemptKey) -> None:
    """Commit once every announced segment has had its Chunk message."""
    attempt = turn.state.attempts[key]
    first = attempt.first
    if first is None or _has_unsent(turn.state.link(attempt.peer), key):
        return
    turn.tell(attempt.peer, Commit(attempt.lease, first.num_tokens, attempt.num_chunks, first.token))
    turn.state = turn.state.with_attempt(replace(attempt, phase=Phase.COMMITTING))


def _has_unsent(link: Link, key: AttemptKey) -> bool:
    queued = any(queued.key == key for queued in link.queue)
    return queued or any(f.queued.key == key and f.stage is not Stage.SENDING for f in link.flights)
