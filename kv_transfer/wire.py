"""The frames of a KV connection's control stream: typed values to and from `protos/transfer.proto`.

Parsing is strict: a frame of an unknown kind and a field out of its range raise WireError naming it, so that nothing
behind this module meets a value that cannot be meant. Encoding checks the same ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.messages import (
    Abort,
    Chunk,
    ChunksDone,
    Commit,
    Committed,
    DecodeMessage,
    Finish,
    LeaseKey,
    PrefillMessage,
    Segment,
)
from kv_transfer.wire_fields import U32, U64, WireError, layout_proto, parse_layout, text, within
from kv_transfer.wire_start import (
    VERSION,
    Hello,
    Refused,
    Welcome,
    hello_to_proto,
    parse_hello,
    parse_welcome,
    welcome_to_proto,
)
from protos import transfer_pb2 as pb

__all__ = [
    "VERSION",
    "DecodeValue",
    "Heartbeat",
    "Hello",
    "PrefillValue",
    "Refused",
    "Welcome",
    "WireError",
    "decode_frame",
    "layout_proto",
    "parse_decode_frame",
    "parse_layout",
    "parse_prefill_frame",
    "prefill_frame",
]

# ---- frames that concern the connection and not a hand-over; more in `wire_start`


@dataclass(frozen=True, slots=True)
class Heartbeat:
    sequence: int


PrefillValue = PrefillMessage | Hello | Heartbeat
DecodeValue = DecodeMessage | Welcome | Refused | Heartbeat


# ---- prefill to decode


def prefill_frame(value: PrefillValue) -> pb.PrefillFrame:
    """The frame that carries `value` to the decode end."""
    match value:
        case Chunk():
            return pb.PrefillFrame(chunk=_chunk_to_proto(value))
        case Commit():
            return pb.PrefillFrame(commit=_commit_to_proto(value))
        case Finish(lease):
            number, generation = _lease_to_wire("Finish", lease)
            return pb.PrefillFrame(finish=pb.Finish(lease=number, generation=generation))
        case Abort():
            return pb.PrefillFrame(abort=_abort_to_proto(value))
        case Hello():
            return pb.PrefillFrame(hello=hello_to_proto(value))
        case Heartbeat():
            return pb.PrefillFrame(heartbeat=_heartbeat_to_proto(value))


def parse_prefill_frame(frame: pb.PrefillFrame) -> PrefillValue:
    """The value in a frame that came from the prefill end."""
    match frame.WhichOneof("frame"):
        case "chunk":
            return _parse_chunk(frame.chunk)
        case "commit":
            return _parse_commit(frame.commit)
        case "finish":
            return Finish(LeaseKey(frame.finish.lease, frame.finish.generation))
        case "abort":
            return _parse_abort(frame.abort)
        case "hello":
            return parse_hello(frame.hello)
        case "heartbeat":
            return Heartbeat(frame.heartbeat.sequence)
        case None:
            raise WireError("PrefillFrame.frame", "is empty or of an unknown kind")


# ---- decode to prefill


def decode_frame(value: DecodeValue) -> pb.DecodeFrame:
    """The frame that carries `value` to the prefill end."""
    match value:
        case ChunksDone(through):
            done = pb.ChunksDone(through=within("ChunksDone.through", through, 0, U64))
            return pb.DecodeFrame(chunks_done=done)
        case Committed(lease):
            number, generation = _lease_to_wire("Committed", lease)
            return pb.DecodeFrame(committed=pb.Committed(lease=number, generation=generation))
        case Abort():
            return pb.DecodeFrame(abort=_abort_to_proto(value))
        case Welcome():
            return pb.DecodeFrame(welcome=welcome_to_proto(value))
        case Refused(message):
            return pb.DecodeFrame(refused=pb.TransferRefused(message=text("TransferRefused.message", message)))
        case Heartbeat():
            return pb.DecodeFrame(heartbeat=_heartbeat_to_proto(value))


def parse_decode_frame(frame: pb.DecodeFrame) -> DecodeValue:
    """The value in a frame that came from the decode end."""
    match frame.WhichOneof("frame"):
        case "chunks_done":
            return ChunksDone(frame.chunks_done.through)
        case "committed":
            return Committed(LeaseKey(frame.committed.lease, frame.committed.generation))
        case "abort":
            return _parse_abort(frame.abort)
        case "welcome":
            return parse_welcome(frame.welcome)
        case "refused":
            return Refused(text("TransferRefused.message", frame.refused.message))
        case "heartbeat":
            return Heartbeat(frame.heartbeat.sequence)
        case None:
            raise WireError("DecodeFrame.frame", "is empty or of an unknown kind")


# ---- the parts of a frame


def _chunk_to_proto(chunk: Chunk) -> pb.Chunk:
    _check_chunk(chunk)
    lease, generation = _lease_to_wire("Chunk", chunk.lease)
    proto = pb.Chunk(
        seq=chunk.seq,
        lease=lease,
        generation=generation,
        layer_start=chunk.segment.layer_start,
        layer_end=chunk.segment.layer_end,
        block_start=chunk.segment.block_start,
        num_blocks=chunk.segment.num_blocks,
        num_bytes=chunk.num_bytes,
    )
    try:
        proto.fingerprints.extend(chunk.fingerprints)  # checks their range as it goes
    except ValueError as error:
        raise WireError("Chunk.fingerprints", f"are not all of 64 bits: {error}") from None
    return proto


def _parse_chunk(proto: pb.Chunk) -> Chunk:
    within("Chunk.num_blocks", proto.num_blocks, 1, U32)
    segment = Segment(proto.layer_start, proto.layer_end, proto.block_start, proto.block_start + proto.num_blocks)
    lease = LeaseKey(proto.lease, proto.generation)
    chunk = Chunk(proto.seq, lease, segment, proto.num_bytes, tuple(proto.fingerprints))
    _check_chunk(chunk)
    return chunk


def _check_chunk(chunk: Chunk) -> None:
    segment = chunk.segment
    within("Chunk.seq", chunk.seq, 0, U64)
    within("Chunk.layer_start", segment.layer_start, 0, U32)
    within("Chunk.layer_end", segment.layer_end, segment.layer_start + 1, U32)
    within("Chunk.block_start", segment.block_start, 0, U32)
    within("Chunk.num_blocks", segment.num_blocks, 1, U32 - segment.block_start)
    within("Chunk.num_bytes", chunk.num_bytes, 1, U64)
    if len(chunk.fingerprints) != segment.num_blocks:
        raise WireError("Chunk.fingerprints", f"has {len(chunk.fingerprints)} values for {segment.num_blocks} blocks")


def _commit_to_proto(commit: Commit) -> pb.Commit:
    _check_commit(commit)
    lease, generation = _lease_to_wire("Commit", commit.lease)
    return pb.Commit(
        lease=lease,
        generation=generation,
        num_tokens=commit.num_tokens,
        num_chunks=commit.num_chunks,
        first_token=commit.first_token,
    )


def _parse_commit(proto: pb.Commit) -> Commit:
    lease = LeaseKey(proto.lease, proto.generation)
    commit = Commit(lease, proto.num_tokens, proto.num_chunks, proto.first_token)
    _check_commit(commit)
    return commit


def _check_commit(commit: Commit) -> None:
    within("Commit.num_tokens", commit.num_tokens, 1, U32)
    within("Commit.num_chunks", commit.num_chunks, 0, U32)
    within("Commit.first_token", commit.first_token, 0, U32)


def _abort_to_proto(abort: Abort) -> pb.TransferAbort:
    lease, generation = _lease_to_wire("TransferAbort", abort.lease)
    return pb.TransferAbort(lease=lease, generation=generation, reason=abort.reason)


def _parse_abort(proto: pb.TransferAbort) -> Abort:
    return Abort(LeaseKey(proto.lease, proto.generation), proto.reason)


def _heartbeat_to_proto(heartbeat: Heartbeat) -> pb.TransferHeartbeat:
    return pb.TransferHeartbeat(sequence=within("TransferHeartbeat.sequence", heartbeat.sequence, 0, U64))


def _lease_to_wire(message: str, lease: LeaseKey) -> tuple[int, int]:
    return (
        within(f"{message}.lease", lease.lease, 0, U64),
        within(f"{message}.generation", lease.generation, 0, U64),
    )
