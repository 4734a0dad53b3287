"""The way of a segment through the prefill end: queued, packing, packed, sending, acknowledged; then the commit.

Used by `prefill_protocol` only. A sequence number that was given out is always sent, even if its attempt has ended
since: sends and receives of the pair stay matched, and the peer drops what nobody wants.
"""

from __future__ import annotations

from bisect import bisect_right

from kv_transfer import link_protocol
from kv_transfer import prefill_ends as ends
from kv_transfer.link_events import AttemptKey, SendMessage
from kv_transfer.link_state import Link
from kv_transfer.messages import Chunk, Commit, Finish
from kv_transfer.prefill_ends import Turn
from kv_transfer.prefill_events import Pack, Packed, PrefillDone, SegmentReady, SendDone, StartSend
from kv_transfer.prefill_state import Attempt, FirstToken, Flight, Phase, Queued, SendLink, Stage


def on_segment(turn: Turn, event: SegmentReady) -> None:
    attempt = turn.holders.get(event.key)
    if attempt is None or attempt.phase is not Phase.STREAMING or attempt.first is not None:
        return
    peer, link = attempt.peer, turn.link(attempt.peer)
    queued = Queued(event.key, attempt.lease, event.segment, event.num_bytes)
    if has_room(link):  # so nothing waits
        turn.change(attempt.announced(()))
        turn.put_link(peer, _launch(turn, peer, link, queued))
        return
    if not attempt.queue:
        turn.put_waiting(peer, (*(turn.waiting.get(peer) or ()), event.key))
    turn.change(attempt.announced((*attempt.queue, queued)))


def has_room(link: SendLink) -> bool:
    """Whether a slot and a credit are there; never without an epoch."""
    return bool(link.slots.free) and link.next_seq - link.done_through < link.slots.window


def _launch(turn: Turn, peer: str, link: SendLink, queued: Queued) -> SendLink:
    """Start a pack; the link with it."""
    epoch, slots, seq, done_through, flights, stall_at = link
    assert epoch is not None
    slot, slots = slots.take()
    turn.act(Pack(peer, epoch, seq, slot, queued.key, queued.lease, queued.segment))
    return Link(epoch, slots, seq + 1, done_through, (*flights, Flight(seq, slot, Stage.PACKING, queued)), stall_at)


def pump(turn: Turn, peer: str, link: SendLink) -> None:
    """Start packs while a segment waits and a slot and a credit are there. `link` is the peer's as it now stands."""
    while has_room(link) and (waiting := turn.waiting.get(peer)):
        link = _launch(turn, peer, link, _next_queued(turn, peer, waiting))
    turn.put_link(peer, link)


def _next_queued(turn: Turn, peer: str, waiting: tuple[AttemptKey, ...]) -> Queued:
    attempt = turn.holders[waiting[0]]
    queued, left = attempt.queue[0], attempt.queue[1:]
    turn.change(attempt._replace(queue=left))
    if not left:
        turn.put_waiting(peer, waiting[1:])
    return queued


def on_packed(turn: Turn, event: Packed) -> None:
    link = turn.link(event.peer)
    index = _flight_index(link, event.epoch, event.seq, Stage.PACKING)
    if index is None:
        return
    seq, slot, _, queued, _ = link.flights[index]
    flights = list(link.flights)
    flights[index] = Flight(seq, slot, Stage.PACKED, queued, event.fingerprints)
    sent = _send_packed(turn, event.peer, event.epoch, flights)
    turn.put_link(event.peer, Link(link.epoch, link.slots, link.next_seq, link.done_through, tuple(flights)))
    for key in sent:
        attempt = turn.holders.get(key)
        if attempt is not None and attempt.phase is Phase.STREAMING:
            try_commit(turn, attempt)
    ends.settle(turn, queued.key)


def _flight_index(link: SendLink, epoch: str, seq: int, stage: Stage) -> int | None:
    """The flight that an event of `epoch` means; None for a repeat or an event of a dead epoch."""
    if link.epoch == epoch:
        for index, flight in enumerate(link.flights):
            if flight.seq == seq:
                return index if flight.stage is stage else None
    return None


def _send_packed(turn: Turn, peer: str, epoch: str, flights: list[Flight]) -> list[AttemptKey]:
    """Announce and launch what is packed, strictly in order of seq; whose it was. Changes `flights`."""
    sent = []
    for index, (seq, slot, stage, queued, fingerprints) in enumerate(flights):
        if stage is Stage.PACKING:
            break
        if stage is Stage.PACKED:
            chunk = Chunk(seq, queued.lease, queued.segment, queued.num_bytes, fingerprints)
            turn.act(SendMessage(peer, epoch, chunk))
            turn.act(StartSend(peer, epoch, seq, slot, queued.num_bytes))
            flights[index] = Flight(seq, slot, Stage.SENDING, queued)
            sent.append(queued.key)
    return sent


def on_send_done(turn: Turn, event: SendDone) -> None:
    link = turn.link(event.peer)
    index = _flight_index(link, event.epoch, event.seq, Stage.SENDING)
    if index is None:
        return
    slots = link.slots.give(link.flights[index].slot)
    flights = (*link.flights[:index], *link.flights[index + 1 :])
    pump(turn, event.peer, Link(link.epoch, slots, link.next_seq, link.done_through, flights))


def on_chunks_done(turn: Turn, peer: str, through: int) -> None:
    link = turn.link(peer)
    if through > sent_through(link):
        link_protocol.lose(turn, peer, f"peer acknowledged chunk {through - 1}, which was never sent")
    elif through > link.done_through:
        pump(turn, peer, Link(link.epoch, link.slots, link.next_seq, through, link.flights))


def sent_through(link: SendLink) -> int:
    """Every chunk with seq below this has had its Chunk message."""
    for flight in link.flights:
        if flight.stage is not Stage.SENDING:
            return flight.seq
    return link.next_seq


# ---- commit


def on_done(turn: Turn, event: PrefillDone) -> None:
    attempt = turn.holders.get(event.key)
    if attempt is None or attempt.phase is not Phase.STREAMING or attempt.first is not None:
        return
    first = FirstToken(event.num_tokens, event.first_token, event.ended)
    attempt = attempt._replace(first=first, in_engine=False)
    turn.change(attempt)
    if event.ended:
        turn.tell(attempt.peer, Finish(attempt.lease))
        ends.drain(turn, attempt)
        return
    if attempt.queue:
        _advance(turn, attempt)
    try_commit(turn, attempt)


def _advance(turn: Turn, attempt: Attempt) -> None:
    """Nearest to commit goes first: of the attempts that have announced all of theirs, the one with fewest left.

    They are at the head of those that wait, ordered, and stay so: only the first of them is served.
    """
    turn.unqueue(attempt)
    others = turn.waiting.get(attempt.peer) or ()
    left = [len(other.queue) for other in map(turn.holders.__getitem__, others) if other.first is not None]
    place = bisect_right(left, len(attempt.queue))
    turn.put_waiting(attempt.peer, (*others[:place], attempt.key, *others[place:]))


def try_commit(turn: Turn, attempt: Attempt) -> None:
    """Commit once every announced segment has had its Chunk message."""
    first = attempt.first
    if first is not None and not _has_unsent(turn.link(attempt.peer), attempt):
        turn.tell(attempt.peer, Commit(attempt.lease, first.num_tokens, attempt.num_chunks, first.token))
        turn.change(attempt._replace(phase=Phase.COMMITTING))


def _has_unsent(link: SendLink, attempt: Attempt) -> bool:
    if attempt.queue:
        return True
    return any(flight.stage is not Stage.SENDING and flight.queued.key == attempt.key for flight in link.flights)
