"""Where the two ends of a KV connection meet: a TCPStore that listens on one address only.

A decode worker owns one StoreServer for its lifetime; a prefill worker keeps one client store per decode worker.
Every epoch uses its own key prefix (see `kv_transfer.connection`), so stores are shared between epochs.
"""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from kv_transfer.transport import TransferError, first_line

_TIMEOUT_S = 20.0


class StoreServer:
    """A TCPStore server on exactly `host`, at a free port. `store` is the server's own handle on it."""

    def __init__(self, host: str) -> None:
        # Left alone, TCPStore listens on every interface whatever its host name; it takes over a socket bound here.
        listener = _listen(host)
        self.host = host
        self.port: int = listener.getsockname()[1]
        self._lock = threading.Lock()
        self._idle: list[Store] = []
        self._store: TCPStore | None = TCPStore(
            host,
            self.port,
            is_master=True,
            timeout=timedelta(seconds=_TIMEOUT_S),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    @property
    def store(self) -> Store:
        """Raises TransferError after `close`."""
        return self._open_store()

    def take(self) -> Store:
        """A handle for one connection's set-up: a wait in it for a peer that died holds up nobody else. Blocks."""
        self._open_store()
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return connect_store(self.host, self.port, _TIMEOUT_S)

    def give_back(self, handle: Store) -> None:
        """A handle that nobody waits in any more."""
        with self._lock:
            if self._store is not None:
                self._idle.append(handle)

    def forget(self, epoch: str) -> None:
        """Delete what the set-up of a dead epoch has left. Blocks; what cannot be reached is gone with the server."""
        store = self._open_store()
        for key in store.list_keys():
            if key.startswith(f"{epoch}/"):
                store.delete_key(key)

    def close(self) -> None:
        """Stop serving once no connection uses `store` any more. Idempotent."""
        with self._lock:
            self._store = None
            self._idle.clear()

    def _open_store(self) -> TCPStore:
        if self._store is None:
            raise TransferError(f"the store server on {self.host}:{self.port} is closed")
        return self._store


def connect_store(host: str, port: int, timeout_s: float) -> Store:
    """A client of the StoreServer at this address. Blocks; raises TransferError.

    Make one per peer and keep it: the constructor looks the peer's address up in the DNS, and where queries get lost
    that takes the resolver's timeout (5 s by default, RES_OPTIONS="timeout:1 attempts:1" in the environment of the
    process shortens it). So `timeout_s` is best 20 s or more.
    """
    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        raise TransferError(f"store at {host}:{port}: {first_line(error)}") from None


def _listen(host: str) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise TransferError(f"store on {host}: {error}") from None
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise TransferError(f"store on {host}: {error}") from None
    return listener
