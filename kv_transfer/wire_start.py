"""How a KV connection begins: the first frames of either end, to and from `protos/transfer.proto`.

Used by `kv_transfer.wire` only, from which they are imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.kv_layout import KVLayout
from kv_transfer.wire_fields import U16, U32, U64, layout_proto, one_of, parse_layout, text, within
from protos import transfer_pb2 as pb

BACKENDS = ("gloo", "nccl")
# Raised with every change by which two ends would misunderstand each other: of messages, of what fingerprints are made
# of, of the order of operations. While a cluster is upgraded, workers of both kinds meet.
VERSION = 1


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of the prefill end. `clock_domain`: see `kv_transfer.timeline`.

    `join_when_used`: it would rather make the process group at the first chunk than now.
    """

    worker_id: str
    layout: KVLayout
    clock_domain: str = ""
    join_when_used: bool = False
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Welcome:
    """First frame of the decode end: where, how and when to join the pair's process group."""

    worker_id: str
    epoch: str
    store_host: str
    store_port: int
    window: int
    slot_bytes: int
    backend: str
    join_when_used: bool = False
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Refused:
    """First and last frame of a decode end that cannot exchange blocks with this peer."""

    message: str


def hello_to_proto(hello: Hello) -> pb.TransferHello:
    worker_id = text("TransferHello.worker_id", hello.worker_id)
    return pb.TransferHello(
        worker_id=worker_id,
        layout=layout_proto(hello.layout),
        clock_domain=hello.clock_domain,
        join_when_used=hello.join_when_used,
        version=hello.version,
    )


def parse_hello(proto: pb.TransferHello) -> Hello:
    worker_id = text("TransferHello.worker_id", proto.worker_id)
    layout = parse_layout(proto.layout)
    return Hello(worker_id, layout, proto.clock_domain, proto.join_when_used, proto.version)


def welcome_to_proto(welcome: Welcome) -> pb.TransferWelcome:
    _check_welcome(welcome)
    return pb.TransferWelcome(
        worker_id=welcome.worker_id,
        epoch=welcome.epoch,
        store_host=welcome.store_host,
        store_port=welcome.store_port,
        window=welcome.window,
        slot_bytes=welcome.slot_bytes,
        backend=welcome.backend,
        join_when_used=welcome.join_when_used,
        version=welcome.version,
    )


def parse_welcome(proto: pb.TransferWelcome) -> Welcome:
    welcome = Welcome(
        proto.worker_id,
        proto.epoch,
        proto.store_host,
        proto.store_port,
        proto.window,
        proto.slot_bytes,
        proto.backend,
        proto.join_when_used,
        proto.version,
    )
    _check_welcome(welcome)
    return welcome


def _check_welcome(welcome: Welcome) -> None:
    for name in ("worker_id", "epoch", "store_host"):
        text(f"TransferWelcome.{name}", getattr(welcome, name))
    within("TransferWelcome.store_port", welcome.store_port, 1, U16)
    within("TransferWelcome.window", welcome.window, 1, U32)
    within("TransferWelcome.slot_bytes", welcome.slot_bytes, 1, U64)
    one_of("TransferWelcome.backend", welcome.backend, BACKENDS)
