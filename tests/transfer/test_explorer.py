"""The protocol passes everything the explorer can do to it, and the explorer's own short cuts hide nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from kv_transfer import prefill_ends
from tests.transfer.explorer.config import Config, RequestSpec
from tests.transfer.explorer.many import walking
from tests.transfer.explorer.search import Result, Search, explore
from tests.transfer.explorer.standard import STANDARD


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Future[Result]]]:
    with walking(STANDARD, jobs=2) as futures:
        yield futures


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [config.name for config in STANDARD])
def test_standard_worlds_hold(name: str, results: dict[str, Future[Result]]) -> None:
    result = results[name].result()
    print(result)
    assert result.violation is None, str(result)
    assert result.exhausted


def test_an_unfinished_search_is_no_pass() -> None:
    result = explore(STANDARD[0], max_states=100)
    assert not result.exhausted
    assert "frontier exhausted: no" in str(result)


def test_a_violation_comes_with_a_shortest_readable_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_ends, "pack_in_flight", lambda *_: False)
    one = RequestSpec(0, 0, 1)
    result = explore(Config("broken", 1, 1, (one, one), 1, frozenset({"cancel"}), attempts=1))
    assert result.violation is not None
    assert result.violation.startswith("I1")
    text = [line.split(". ", 1)[1] for line in result.trace]
    assert text[0].startswith("router: open")
    assert any(line.startswith("FAULT router: cancel") for line in text)
    assert text[-1].endswith("<- here")
    assert len(text) == 7  # open, open command, reply, prefill command, compute, cancel, cancel command


def test_symmetry_is_found() -> None:
    one = RequestSpec(0, 0, 1)
    assert len(Search(Config("twins", 1, 1, (one, one), 0, attempts=1)).symmetry.group) == 1
    assert not Search(Config("odd", 1, 1, (one, RequestSpec(0, 0, 2)), 0)).symmetry.group
