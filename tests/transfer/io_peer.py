"""A prefill worker's end of a connection in a process of its own: joins, sends one byte, then waits to be killed.

Run as `python -m tests.transfer.io_peer HOST PORT EPOCH`.
"""

from __future__ import annotations

import sys
import threading

import torch

from kv_transfer.connection import PREFILL_RANK
from kv_transfer.rendezvous import connect_store
from tests.transfer.io_support import join


def main(host: str, port: str, epoch: str) -> None:
    transport = join(connect_store(host, int(port), 20.0), epoch, PREFILL_RANK, host)
    transport.start_send(torch.ones(1, dtype=torch.uint8)).wait()
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
