"""The measured speed of a link."""

from __future__ import annotations

import pytest

from kv_transfer.link_meter import LinkMeter

MIB = 1 << 20


def test_messages_in_a_row_are_measured_from_end_to_end() -> None:
    meter = LinkMeter()
    meter.add(8 * MIB, started=0.0, ended=5.0)  # how long the peer let it wait, who knows
    assert meter.bytes_per_s is None
    meter.add(8 * MIB, started=0.1, ended=6.0)
    assert meter.bytes_per_s == 8 * MIB


def test_a_message_after_a_pause_and_a_small_one_say_nothing() -> None:
    meter = LinkMeter()
    meter.add(8 * MIB, started=0.0, ended=1.0)
    meter.add(8 * MIB, started=2.0, ended=9.0)
    meter.add(100, started=2.0, ended=10.0)
    assert meter.bytes_per_s is None


def test_ends_that_are_seen_late_do_not_make_a_link_faster() -> None:
    """True gaps of half a second, seen as nearly none and nearly a whole one in turn, or two ends at once."""
    for late in (0.45, 0.5):
        meter = LinkMeter()
        for number in range(60):
            meter.add(8 * MIB, started=0.0, ended=1.0 + number / 2 + late * (number % 2))
        assert meter.bytes_per_s == pytest.approx(16 * MIB, rel=0.15)


def test_it_follows_a_link_that_becomes_slower() -> None:
    meter = LinkMeter()
    for number in range(10):
        meter.add(8 * MIB, started=0.0, ended=1.0 + number)
    for number in range(40):
        meter.add(8 * MIB, started=0.0, ended=20.0 + 2 * number)
    assert meter.bytes_per_s == pytest.approx(4 * MIB, rel=0.01)
