"""A run that is ended from outside, for taking too long say, tells where it stood."""

from __future__ import annotations

import faulthandler
import os
import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Called while standard error is not captured."""
    faulthandler.register(signal.SIGTERM, file=os.dup(2), chain=True)
