"""The protocol passes everything the explorer can do to it, and the explorer's own short cuts hide nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kv_transfer import prefill_ends
from tests.transfer.explorer.config import Config, RequestSpec
from tests.transfer.explorer.search import Search, explore, unpack
from tests.transfer.explorer.standard import QUICK, STANDARD
from tests.transfer.explorer.symmetry import renamings

SLOW = [config for config in STANDARD if config not in QUICK]


@pytest.mark.parametrize("config", QUICK, ids=lambda config: config.name)
def test_quick_worlds_hold(config: Config) -> None:
    result = explore(config)
    print(result)
    assert result.violation is None, str(result)
    assert result.exhausted


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("config", SLOW, ids=lambda config: config.name)
def test_standard_worlds_hold(config: Config) -> None:
    result = explore(config)
    print(result)
    assert result.violation is None, str(result)
    assert result.exhausted


def test_an_unfinished_search_is_no_pass() -> None:
    result = explore(QUICK[0], max_states=100)
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


SMALL = (
    Config("crash", 1, 1, (RequestSpec(0, 0, 1),), 1, frozenset({"crash", "cancel"}), attempts=2),
    Config("time", 1, 1, (RequestSpec(0, 0, 1),), 1, frozenset({"tick", "lose"}), attempts=1, epochs=1),
    Config(
        "links", 1, 2, (RequestSpec(0, 0, 1), RequestSpec(0, 1, 1)), 1, frozenset({"cancel", "suspect"}), attempts=1
    ),
)


def quiet_keys(config: Config) -> set[tuple[str, ...]]:
    search = Search(config)
    assert search.run().violation is None
    quiet = set()
    for packed in search.keys:
        key = unpack(packed)
        if not search.moves.of(key, config.epochs)[0]:
            quiet.add(tuple(repr(search.model.values[number]) for number in key))
    return quiet


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.name)
def test_the_reduction_reaches_every_quiet_state(config: Config) -> None:
    assert quiet_keys(config) == quiet_keys(replace(config, reduce=False))


def test_symmetry_is_found_and_folds_states() -> None:
    one = RequestSpec(0, 0, 1)
    twins = Config("twins", 1, 1, (one, one), 0, attempts=1)
    folded = Search(twins)
    assert len(folded.group) == 1
    plain = Search(twins)
    plain.group = []
    assert folded.run().states < plain.run().states
    assert not renamings(Search(Config("odd", 1, 1, (one, RequestSpec(0, 0, 2)), 0)).model)
