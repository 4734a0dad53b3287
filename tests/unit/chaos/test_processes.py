"""Processes are only found where they are: a worker's port on another machine says nothing of this one's."""

from __future__ import annotations

import os
import socket

import pytest

from baton.chaos.cluster import Worker
from baton.chaos.processes import listener_pid


def test_the_process_that_listens_on_an_address_of_this_machine_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert listener_pid("127.0.0.1", port) == os.getpid()
        assert listener_pid("localhost", port) == os.getpid()
        assert Worker("d0", "decode", f"127.0.0.1:{port}").pid == os.getpid()
    assert listener_pid("127.0.0.1", port) is None


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no-such-host.invalid"])
def test_a_worker_of_another_machine_is_never_taken_for_a_process_of_this_one(host: str) -> None:
    """Its port may be in use here: whoever listens there is not to be killed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert listener_pid(host, port) is None
        assert Worker("d0", "decode", f"[{host}]:{port}" if ":" in host else f"{host}:{port}").pid is None
