"""A run that is ended from outside, for taking too long say, tells where it stood. No example fails for being slow."""

from __future__ import annotations

import faulthandler
import os
import signal

import hypothesis
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Called while standard error is not captured."""
    hypothesis.settings.register_profile("shared cores", deadline=None)
    hypothesis.settings.load_profile("shared cores")
    faulthandler.register(signal.SIGTERM, file=os.dup(2), chain=True)
