"""The way of a chunk through the decode end: announced, received, unpacked, acknowledged; and the commit after it.

Used by `decode_protocol` only. Every announced chunk is received, wanted or not, so that sends and receives of the pair
stay matched; what nobody wants is dropped instead of unpacked.
"""

from __future__ import annotations

from kv_transfer import coverage
from kv_transfer import decode_ends as ends
from kv_transfer import link_protocol as links
from kv_transfer.decode_ends import Turn
from kv_transfer.decode_events import Admit, Received, StartRecv, Unpack, Unpacked
from kv_transfer.decode_state import Lease, RecvFlight, RecvLink, RecvStage
from kv_transfer.link_state import Link
from kv_transfer.messages import Abort, Chunk, ChunksDone, Commit, Committed, LeaseKey


def on_chunk(turn: Turn, peer: str, chunk: Chunk) -> None:
    link = turn.link(peer)
    if chunk.seq < link.next_seq:
        return
    if chunk.seq > link.next_seq:
        links.lose(turn, peer, f"chunk {link.next_seq} was lost: chunk {chunk.seq} came instead")
    elif len(link.flights) >= link.slots.window:
        links.lose(turn, peer, f"peer exceeded its window of {link.slots.window} chunks")
    else:
        flights = (*link.flights, RecvFlight(chunk))
        link = Link(link.epoch, link.slots, chunk.seq + 1, link.done_through, flights, link.stall_at)
        if turn.live_lease(peer, chunk.lease) is None:
            disown(turn, peer, chunk.lease)
        start_recvs(turn, peer, link)


def disown(turn: Turn, peer: str, name: LeaseKey) -> None:
    """Answer for a lease that is unknown or over: never with an acknowledgement."""
    turn.tell(peer, Abort(name, "unknown_lease"))


def start_recvs(turn: Turn, peer: str, link: RecvLink) -> None:
    """Launch receives in order of seq while slots are free; `link` is the peer's as it now stands."""
    if link.epoch is not None and link.slots.free and link.flights and link.flights[-1].stage is RecvStage.WAITING:
        flights, slots = list(link.flights), link.slots
        for index, (chunk, _, stage) in enumerate(flights):
            if stage is RecvStage.WAITING and slots.free:
                slot, slots = slots.take()
                flights[index] = RecvFlight(chunk, slot, RecvStage.RECEIVING)
                turn.act(StartRecv(peer, link.epoch, chunk.seq, slot, chunk.num_bytes))
        link = link._replace(slots=slots, flights=tuple(flights))
    turn.put_link(peer, link)


def _with(link: RecvLink, index: int, flight: RecvFlight) -> tuple[RecvFlight, ...]:
    return (*link.flights[:index], flight, *link.flights[index + 1 :])


def _flight_index(link: RecvLink, epoch: str, seq: int, stage: RecvStage) -> int | None:
    """The flight that an event of `epoch` means; None for a repeat or an event of a dead epoch."""
    index = seq - link.done_through
    if link.epoch != epoch or not 0 <= index < len(link.flights):
        return None
    return index if link.flights[index].stage is stage else None


def on_received(turn: Turn, event: Received) -> None:
    link = turn.link(event.peer)
    index = _flight_index(link, event.epoch, event.seq, RecvStage.RECEIVING)
    if index is None:
        return
    chunk, slot, _ = link.flights[index]
    lease = turn.live_lease(event.peer, chunk.lease)
    if lease is None or not is_wanted(turn, lease, chunk):
        _free(turn, event.peer, index)
        if lease is not None:
            try_admit(turn, lease)
        _return_credits(turn, event.peer, link.done_through)
        return
    flights = _with(link, index, RecvFlight(chunk, slot, RecvStage.UNPACKING))
    turn.put_link(event.peer, Link(link.epoch, link.slots, link.next_seq, link.done_through, flights))
    turn.act(Unpack(event.peer, event.epoch, chunk.seq, slot, chunk.lease, chunk.segment, chunk.fingerprints))


def is_wanted(turn: Turn, lease: Lease, chunk: Chunk) -> bool:
    """Whether the segment lies in the lease's rectangle and is neither there nor on its way there."""
    wanted = coverage.inside(chunk.segment, turn.num_layers, lease.first_block, lease.num_blocks)
    if not wanted or coverage.meets(lease.covered, chunk.segment):
        return False
    for other, _, stage in turn.link(lease.peer).flights:
        rival = stage is RecvStage.UNPACKING and other.lease == chunk.lease
        if rival and coverage.overlap(other.segment, chunk.segment):
            return False
    return True


def on_unpacked(turn: Turn, event: Unpacked) -> None:
    link = turn.link(event.peer)
    index = _flight_index(link, event.epoch, event.seq, RecvStage.UNPACKING)
    if index is None:
        return
    chunk = link.flights[index].chunk
    _free(turn, event.peer, index)
    lease = turn.live_lease(event.peer, chunk.lease)
    if lease is None:
        ends.settle(turn, chunk.lease.lease)
    elif event.ok:
        lease = lease.received(chunk.segment)
        turn.change(lease)
        try_admit(turn, lease)
    else:
        ends.fail(turn, lease, "corrupt", f"chunk {event.seq} does not match its fingerprints")
    _return_credits(turn, event.peer, link.done_through)


def _return_credits(turn: Turn, peer: str, before: int) -> None:
    """Cumulatively and in order of seq. The last action of its turn: an admission need not wait for it."""
    through = turn.link(peer).done_through
    if through > before:
        turn.tell(peer, ChunksDone(through))


def _free(turn: Turn, peer: str, index: int) -> None:
    """The chunk is done with, and its slot the next one's."""
    link = turn.link(peer)
    chunk, slot, _ = link.flights[index]
    flights = _with(link, index, RecvFlight(chunk, -1, RecvStage.DONE))
    passed = next((at for at, flight in enumerate(flights) if flight.stage is not RecvStage.DONE), len(flights))
    link = Link(link.epoch, link.slots.give(slot), link.next_seq, link.done_through + passed, flights[passed:])
    start_recvs(turn, peer, link)


# ---- commit


def on_commit(turn: Turn, peer: str, commit: Commit) -> None:
    lease = turn.live_lease(peer, commit.lease)
    if lease is None:
        disown(turn, peer, commit.lease)
    elif lease.commit is None:
        lease = lease._replace(commit=commit)
        turn.change(lease)
        try_admit(turn, lease)


def try_admit(turn: Turn, lease: Lease) -> None:
    """Admit a committed lease whose announced chunks are all processed, or end it if they do not add up."""
    commit = lease.commit
    if commit is None or _chunks_pending(turn, lease):
        return
    if not adds_up(turn, lease, commit):
        ends.fail(turn, lease, "incomplete", "the commit does not match what was received")
        return
    turn.forget(lease.lease, lease)
    turn.act(Admit(lease.key, commit.lease, commit.num_tokens, commit.first_token))
    turn.tell(lease.peer, Committed(commit.lease))


def _chunks_pending(turn: Turn, lease: Lease) -> bool:
    flights = turn.link(lease.peer).flights
    return any(flight.stage is not RecvStage.DONE and flight.chunk.lease == lease.name for flight in flights)


def adds_up(turn: Turn, lease: Lease, commit: Commit) -> bool:
    """All KV is there exactly once, in as many chunks as were sent, for the prompt that was reserved for (I5)."""
    complete = coverage.is_complete(lease.covered, turn.num_layers, lease.first_block, lease.num_blocks)
    return complete and commit.num_chunks == lease.num_received and commit.num_tokens == lease.num_tokens
