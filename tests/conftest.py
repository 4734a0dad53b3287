"""A run that is ended from outside, for taking too long say, tells where it stood. No example fails for being slow.

Coroutine tests run on the event loop that is deployed: a worker is a Ray actor, whose loop is uvloop's, while a router
and all tools have asyncio's own.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
from collections.abc import Callable

import hypothesis
import pytest
import uvloop

_OF_WORKERS = {"transfer", "worker"}  # folders


def pytest_configure(config: pytest.Config) -> None:
    """Called while standard error is not captured."""
    hypothesis.settings.register_profile("shared cores", deadline=None)
    hypothesis.settings.load_profile("shared cores")
    faulthandler.register(signal.SIGTERM, file=os.dup(2), chain=True)


@pytest.hookimpl(optionalhook=True)  # a GPU machine may have an older plugin: there it is asyncio's own for all
def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    if _OF_WORKERS & set(item.path.parts):
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
