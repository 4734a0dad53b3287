"""The way of a chunk through the decode end: announced, received, unpacked, acknowledged; and the commit after it.

Used by `decode_protocol` only. Every announced chunk is received, wanted or not, so that sends and receives of the pair
stay matched; what nobody wants is dropped instead of unpacked.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

from kv_transfer import coverage
from kv_transfer import decode_ends as ends
from kv_transfer.decode_ends import Turn
from kv_transfer.decode_state import DecodeState, Lease, RecvFlight, RecvLink, RecvStage
from kv_transfer.events import Admit, Received, StartRecv, Unpack, Unpacked
from kv_transfer.messages import Abort, Chunk, ChunksDone, Commit, Committed, LeaseKey


def on_chunk(turn: Turn, peer: str, chunk: Chunk) -> None:
    link = turn.state.link(peer)
    if chunk.seq < link.next_seq:
        return
    if chunk.seq > link.next_seq:
        ends.lose(turn, peer, f"chunk {link.next_seq} was lost: chunk {chunk.seq} came instead")
    elif len(link.flights) >= link.slots.window:
        ends.lose(turn, peer, f"peer exceeded its window of {link.slots.window} chunks")
    else:
        turn.state = turn.state.with_link(peer, replace(link, flights=(*link.flights, RecvFlight(chunk))))
        _count(turn, peer, chunk.lease)
        start_recvs(turn, peer)


def _count(turn: Turn, peer: str, name: LeaseKey) -> None:
    lease = turn.state.live_lease(peer, name)
    if lease is None:
        disown(turn, peer, name)
    else:
        turn.state = turn.state.with_lease(replace(lease, announced=lease.announced + 1))


def disown(turn: Turn, peer: str, name: LeaseKey) -> None:
    """Answer for a lease that is unknown or over: never with an acknowledgement."""
    turn.tell(peer, Abort(name, "unknown_lease"))


def start_recvs(turn: Turn, peer: str) -> None:
    """Launch receives in order of seq while slots are free."""
    for index, flight in enumerate(turn.state.link(peer).flights):
        link = turn.state.link(peer)
        if flight.stage is not RecvStage.WAITING or link.epoch is None:
            continue
        if not link.slots.free:
            return
        slot, slots = link.slots.take()
        receiving = flight._replace(slot=slot, stage=RecvStage.RECEIVING)
        turn.state = turn.state.with_link(peer, replace(_with_flight(link, index, receiving), slots=slots))
        turn.act(StartRecv(peer, link.epoch, flight.chunk.seq, slot, flight.chunk.num_bytes))


def _with_flight(link: RecvLink, index: int, flight: RecvFlight) -> RecvLink:
    return replace(link, flights=(*link.flights[:index], flight, *link.flights[index + 1 :]))


def _flight_index(link: RecvLink, epoch: str, seq: int, stage: RecvStage) -> int | None:
    """The flight that an event of `epoch` means; None for a repeat or an event of a dead epoch."""
    index = seq - link.done_through
    if link.epoch != epoch or not 0 <= index < len(link.flights):
        return None
    return index if link.flights[index].stage is stage else None


def on_received(turn: Turn, event: Received) -> None:
    link = turn.state.link(event.peer)
    index = _flight_index(link, event.epoch, event.seq, RecvStage.RECEIVING)
    if index is None:
        return
    flight = link.flights[index]
    lease = turn.state.live_lease(event.peer, flight.chunk.lease)
    if lease is None or not is_wanted(turn.state, lease, flight.chunk):
        _finish(turn, event.peer, index)
        if lease is not None:
            try_admit(turn, lease.lease)
        return
    unpacking = replace(_with_flight(link, index, flight._replace(stage=RecvStage.UNPACKING)), stall_at=None)
    turn.state = turn.state.with_link(event.peer, unpacking)
    chunk = flight.chunk
    turn.act(Unpack(event.peer, event.epoch, chunk.seq, flight.slot, chunk.lease, chunk.segment, chunk.fingerprints))


def is_wanted(state: DecodeState, lease: Lease, chunk: Chunk) -> bool:
    """Whether the segment lies in the lease's rectangle and is neither there nor on its way there."""
    unpacking = (f.chunk for f in state.link(lease.peer).flights if f.stage is RecvStage.UNPACKING)
    taken = (*lease.received, *(other.segment for other in unpacking if other.lease == chunk.lease))
    return coverage.accepts(taken, chunk.segment, state.num_layers, lease.first_block, lease.num_blocks)


def on_unpacked(turn: Turn, event: Unpacked) -> None:
    link = turn.state.link(event.peer)
    index = _flight_index(link, event.epoch, event.seq, RecvStage.UNPACKING)
    if index is None:
        return
    chunk = link.flights[index].chunk
    _finish(turn, event.peer, index)
    lease = turn.state.live_lease(event.peer, chunk.lease)
    if lease is None:
        ends.settle(turn, chunk.lease.lease)
    elif event.ok:
        turn.state = turn.state.with_lease(replace(lease, received=(*lease.received, chunk.segment)))
        try_admit(turn, lease.lease)
    else:
        ends.fail(turn, lease, "corrupt", f"chunk {event.seq} does not match its fingerprints")


def _finish(turn: Turn, peer: str, index: int) -> None:
    """Free the slot and return credits, cumulatively and in order of seq."""
    link = turn.state.link(peer)
    done = link.flights[index]._replace(slot=-1, stage=RecvStage.DONE)
    link = replace(_with_flight(link, index, done), slots=link.slots.give(link.flights[index].slot), stall_at=None)
    passed = len(tuple(takewhile(lambda flight: flight.stage is RecvStage.DONE, link.flights)))
    link = replace(link, done_through=link.done_through + passed, flights=link.flights[passed:])
    turn.state = turn.state.with_link(peer, link)
    if passed:
        turn.tell(peer, ChunksDone(link.done_through))
    start_recvs(turn, peer)


# ---- commit


def on_commit(turn: Turn, peer: str, commit: Commit) -> None:
    lease = turn.state.live_lease(peer, commit.lease)
    if lease is None:
        disown(turn, peer, commit.lease)
    elif lease.commit is None:
        turn.state = turn.state.with_lease(replace(lease, commit=commit))
        try_admit(turn, lease.lease)


def try_admit(turn: Turn, number: int) -> None:
    """Admit a committed lease whose announced chunks are all processed, or end it if they do not add up."""
    lease = turn.state.leases[number]
    commit = lease.commit
    if commit is None or _chunks_pending(turn.state, lease):
        return
    if not adds_up(turn.state, lease, commit):
        ends.fail(turn, lease, "incomplete", "the commit does not match what was received")
        return
    turn.state = turn.state.without_lease(lease)
    turn.act(Admit(lease.key, commit.lease, commit.num_tokens, commit.first_token))
    turn.tell(lease.peer, Committed(commit.lease))


def _chunks_pending(state: DecodeState, lease: Lease) -> bool:
    flights = state.link(lease.peer).flights
    return any(f.stage is not RecvStage.DONE and f.chunk.lease == lease.name for f in flights)


def adds_up(state: DecodeState, lease: Lease, commit: Commit) -> bool:
    """All KV is there exactly once, in as many chunks as were sent, for the prompt that was reserved for (I5)."""
    chunks = commit.num_chunks == lease.announced == len(lease.received)
    complete = coverage.is_complete(lease.received, state.num_layers, lease.first_block, lease.num_blocks)
    return chunks and complete and commit.num_tokens == lease.num_tokens
