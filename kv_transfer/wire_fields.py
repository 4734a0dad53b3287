"""Checked fields of the transfer frames, and the KV layout that two workers compare before they exchange blocks."""

from __future__ import annotations

from baton.common.errors import BatonError
from baton.engine.kv_layout import DTYPES, KVLayout
from protos import worker_pb2

U16, U32, U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1


class WireError(BatonError):
    """A frame or one of its fields is not valid. `field` names it, for instance `Chunk.num_bytes`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


def within(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise WireError(field, f"is {value}, not in [{low}, {high}]")
    return value


def text(field: str, value: str) -> str:
    if not value:
        raise WireError(field, "is empty")
    return value


def one_of(field: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise WireError(field, f"is {value!r}, not one of {', '.join(known)}")
    return value


def layout_proto(layout: KVLayout) -> worker_pb2.KVLayout:
    """The layout as both protos carry it."""
    _check_layout(layout)
    return worker_pb2.KVLayout(
        model_hash=layout.model_hash,
        dtype=layout.dtype,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
    )


def parse_layout(proto: worker_pb2.KVLayout) -> KVLayout:
    """The layout in a message. Raises WireError for an unknown dtype or a dimension of zero."""
    layout = KVLayout(
        proto.model_hash, proto.dtype, proto.block_size, proto.num_layers, proto.num_kv_heads, proto.head_dim
    )
    _check_layout(layout)
    return layout


def _check_layout(layout: KVLayout) -> None:
    text("KVLayout.model_hash", layout.model_hash)
    one_of("KVLayout.dtype", layout.dtype, tuple(DTYPES))
    for name in ("block_size", "num_layers", "num_kv_heads", "head_dim"):
        within(f"KVLayout.{name}", getattr(layout, name), 1, U32)
