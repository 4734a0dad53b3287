"""Every value survives its frame, and a frame that cannot be meant names the field that is wrong."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.kv_layout import DTYPES, KVLayout
from kv_transfer.messages import Abort, Chunk, ChunksDone, Commit, Committed, Finish, LeaseKey, Segment
from kv_transfer.wire import (
    DecodeValue,
    Heartbeat,
    Hello,
    PrefillValue,
    Refused,
    Welcome,
    WireError,
    decode_frame,
    layout_proto,
    parse_decode_frame,
    parse_layout,
    parse_prefill_frame,
    prefill_frame,
)
from protos import transfer_pb2 as pb
from protos import worker_pb2

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
LAYOUT = KVLayout("abc", "bfloat16", 16, 32, 8, 128)
CHUNK = Chunk(5, LeaseKey(1, 2), Segment(0, 4, 8, 10), 4096, (1, U64))
COMMIT = Commit(LeaseKey(1, 2), 100, 7, 42)
WELCOME = Welcome("d0", "epoch-1", "127.0.0.1", 4000, 4, 1 << 20, "gloo", version=7)

u32 = st.integers(0, U32)
u64 = st.integers(0, U64)
positive = st.integers(1, U32)
text = st.text(min_size=1, max_size=10)
leases = st.builds(LeaseKey, u64, u64)
layouts = st.builds(KVLayout, text, st.sampled_from(sorted(DTYPES)), positive, positive, positive, positive)
aborts = st.builds(Abort, leases, st.text(max_size=10))
heartbeats = st.builds(Heartbeat, u64)


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    layer_start, block_start = draw(st.integers(0, 100)), draw(st.integers(0, 10_000))
    num_blocks = draw(st.integers(1, 5))
    segment = Segment(layer_start, draw(st.integers(layer_start + 1, 200)), block_start, block_start + num_blocks)
    fingerprints = draw(st.tuples(*[u64] * num_blocks))
    return Chunk(draw(u64), draw(leases), segment, draw(st.integers(1, U64)), fingerprints)


prefill_values = st.one_of(
    chunks(),
    st.builds(Commit, leases, positive, u32, u32),
    st.builds(Finish, leases),
    aborts,
    st.builds(Hello, text, layouts, st.text(max_size=10), st.booleans(), st.integers(0, 2**32 - 1)),
    heartbeats,
)
decode_values = st.one_of(
    st.builds(ChunksDone, u64),
    st.builds(Committed, leases),
    aborts,
    st.builds(
        Welcome,
        text,
        text,
        text,
        st.integers(1, 65535),
        positive,
        st.integers(1, U64),
        st.sampled_from(["gloo", "nccl"]),
    ),
    st.builds(Refused, text),
    heartbeats,
)


@given(prefill_values)
def test_prefill_values_survive_their_frame(value: PrefillValue) -> None:
    frame = pb.PrefillFrame.FromString(prefill_frame(value).SerializeToString())
    assert parse_prefill_frame(frame) == value


@given(decode_values)
def test_decode_values_survive_their_frame(value: DecodeValue) -> None:
    frame = pb.DecodeFrame.FromString(decode_frame(value).SerializeToString())
    assert parse_decode_frame(frame) == value


def test_an_empty_or_unknown_frame_is_refused() -> None:
    unknown = b"\xfa\x01\x00"  # field 31, which no version of this program knows
    with pytest.raises(WireError, match=r"PrefillFrame\.frame"):
        parse_prefill_frame(pb.PrefillFrame())
    with pytest.raises(WireError, match=r"PrefillFrame\.frame"):
        parse_prefill_frame(pb.PrefillFrame.FromString(unknown))
    with pytest.raises(WireError, match=r"DecodeFrame\.frame"):
        parse_decode_frame(pb.DecodeFrame.FromString(unknown))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seq": U64 + 1}, "Chunk.seq"),
        ({"seq": -1}, "Chunk.seq"),
        ({"lease": LeaseKey(-1, 0)}, "Chunk.lease"),
        ({"lease": LeaseKey(0, U64 + 1)}, "Chunk.generation"),
        ({"segment": Segment(-1, 4, 8, 10)}, "Chunk.layer_start"),
        ({"segment": Segment(4, 4, 8, 10)}, "Chunk.layer_end"),
        ({"segment": Segment(0, 4, 10, 10)}, "Chunk.num_blocks"),
        ({"segment": Segment(0, 4, U32 - 1, U32 + 1)}, "Chunk.num_blocks"),
        ({"num_bytes": 0}, "Chunk.num_bytes"),
        ({"fingerprints": (1,)}, "Chunk.fingerprints"),
        ({"fingerprints": (1, -1)}, "Chunk.fingerprints"),
    ],
)
def test_a_chunk_out_of_range_is_not_encoded(changes: dict[str, object], field: str) -> None:
    with pytest.raises(WireError) as error:
        prefill_frame(dataclasses.replace(CHUNK, **changes))  # type: ignore[arg-type]
    assert error.value.field == field


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("num_blocks", 0, "Chunk.num_blocks"),
        ("num_blocks", 3, "Chunk.fingerprints"),
        ("layer_start", 4, "Chunk.layer_end"),
        ("block_start", U32, "Chunk.num_blocks"),
        ("num_bytes", 0, "Chunk.num_bytes"),
    ],
)
def test_a_chunk_out_of_range_is_not_accepted(field: str, value: int, named: str) -> None:
    frame = prefill_frame(CHUNK)
    setattr(frame.chunk, field, value)
    with pytest.raises(WireError) as error:
        parse_prefill_frame(frame)
    assert error.value.field == named


@pytest.mark.parametrize(
    ("field", "value"), [("num_tokens", 0), ("num_tokens", U32 + 1), ("num_chunks", -1), ("first_token", U32 + 1)]
)
def test_a_commit_out_of_range_is_refused(field: str, value: int) -> None:
    with pytest.raises(WireError) as error:
        prefill_frame(dataclasses.replace(COMMIT, **{field: value}))  # type: ignore[arg-type]
    assert error.value.field == f"Commit.{field}"


def test_a_commit_of_nothing_is_not_accepted() -> None:
    with pytest.raises(WireError, match=r"Commit\.num_tokens"):
        parse_prefill_frame(pb.PrefillFrame(commit=pb.Commit(lease=1)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("worker_id", ""),
        ("epoch", ""),
        ("store_host", ""),
        ("store_port", 0),
        ("store_port", 65536),
        ("window", 0),
        ("slot_bytes", 0),
        ("backend", "mpi"),
    ],
)
def test_a_welcome_that_cannot_be_followed_is_refused_at_both_ends(field: str, value: object) -> None:
    with pytest.raises(WireError, match=rf"TransferWelcome\.{field}"):
        decode_frame(dataclasses.replace(WELCOME, **{field: value}))  # type: ignore[arg-type]
    frame = decode_frame(WELCOME)
    setattr(frame.welcome, field, value)
    with pytest.raises(WireError, match=rf"TransferWelcome\.{field}"):
        parse_decode_frame(frame)


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "float64"), ("model_hash", ""), ("block_size", 0), ("num_layers", 0)]
)
def test_a_layout_out_of_range_is_refused_at_both_ends(field: str, value: object) -> None:
    with pytest.raises(WireError, match=rf"KVLayout\.{field}"):
        layout_proto(dataclasses.replace(LAYOUT, **{field: value}))  # type: ignore[arg-type]
    proto = layout_proto(LAYOUT)
    setattr(proto, field, value)
    with pytest.raises(WireError, match=rf"KVLayout\.{field}"):
        parse_layout(proto)


def test_a_hello_needs_a_name_and_a_layout() -> None:
    with pytest.raises(WireError, match=r"TransferHello\.worker_id"):
        parse_prefill_frame(pb.PrefillFrame(hello=pb.TransferHello(layout=layout_proto(LAYOUT))))
    with pytest.raises(WireError, match=r"KVLayout"):
        parse_prefill_frame(pb.PrefillFrame(hello=pb.TransferHello(worker_id="p", layout=worker_pb2.KVLayout())))


@given(layouts)
def test_layouts_survive(layout: KVLayout) -> None:
    assert parse_layout(layout_proto(layout)) == layout
