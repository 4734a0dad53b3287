"""Options of the cluster tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-kill", action="store_true", help="All kills of test_kills.py also on CPUs (minutes).")
