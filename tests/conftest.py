"""A run that is ended from outside, for taking too long say, tells where it stood. No example fails for being slow.

Tests that are coroutines run on the event loop that Baton's own processes run on.
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


def pytest_configure(config: pytest.Config) -> None:
    """Called while standard error is not captured."""
    hypothesis.settings.register_profile("shared cores", deadline=None)
    hypothesis.settings.load_profile("shared cores")
    faulthandler.register(signal.SIGTERM, file=os.dup(2), chain=True)


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}
