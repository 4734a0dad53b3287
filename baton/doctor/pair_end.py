"""One end of a connection that the doctor tries: `python -m baton.doctor.pair_end RANK HOST PORT DEVICE TIMEOUT_S`.

Prints one JSON line: seconds to connect, GB/s, bytes of GPU memory that the connection took.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from baton.common.errors import BatonError
from kv_transfer.connection import connect
from kv_transfer.rendezvous import connect_store
from kv_transfer.transport import TransferError

MESSAGE_BYTES = {"cuda": 32 << 20, "cpu": 4 << 20}
_MESSAGES = 16


def main(rank: int, host: str, port: int, kind: str, timeout_s: float) -> dict[str, float]:
    """Rank 0 receives. Raises TransferError."""
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    size = MESSAGE_BYTES[kind]
    pattern = (torch.arange(size, dtype=torch.int32) % 251).to(torch.uint8)
    buffer = pattern.to(device) if rank == 1 else torch.zeros(size, dtype=torch.uint8, device=device)
    store = connect_store(host, port, timeout_s)
    before, started = _free(device), time.monotonic()
    transport = connect(
        "nccl" if kind == "cuda" else "gloo",
        store,
        "doctor",
        rank,
        host=host,
        device=device,
        connect_timeout_s=timeout_s,
        operation_timeout_s=timeout_s,
    )
    connected = time.monotonic()
    memory = before - _free(device)
    start = transport.start_recv if rank == 0 else transport.start_send
    start(buffer).wait()
    moving = time.monotonic()
    for transfer in [start(buffer) for _ in range(_MESSAGES)]:
        transfer.wait()
    seconds = time.monotonic() - moving
    if not torch.equal(buffer.cpu(), pattern):
        raise TransferError("the data that arrived is not what was sent")
    transport.close()
    return {"connect_s": connected - started, "gb_s": _MESSAGES * size / seconds / 1e9, "memory": memory}


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return int(torch.cuda.mem_get_info(device)[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        print(json.dumps(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))))
    except BatonError as error:
        sys.exit(str(error))
