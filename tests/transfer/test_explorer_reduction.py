"""What the explorer leaves out hides nothing: small worlds are compared with the search that leaves out nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kv_transfer import prefill_ends
from kv_transfer.messages import Abort
from tests.transfer.explorer.config import Config, RequestSpec
from tests.transfer.explorer.move import Key
from tests.transfer.explorer.parts import DecodeEngine
from tests.transfer.explorer.search import Search, explore
from tests.transfer.explorer.symmetry import Symmetry
from tests.transfer.explorer.world import BUDGET

ONE = RequestSpec(0, 0, 1)
FAN_OUT = (RequestSpec(0, 0, 1), RequestSpec(0, 1, 1))
FAN_IN = (RequestSpec(0, 0, 1), RequestSpec(1, 0, 1))


NAMES = re.compile(r"lease=\d+|generation=\d+|\d+(?=: Lease)|blocks=\(.*?\)|\d+\.0")


def pair(name: str, requests: tuple[RequestSpec, ...], faults: int, *kinds: str) -> Config:
    prefills, decodes = 1 + max(spec.prefill for spec in requests), 1 + max(spec.decode for spec in requests)
    return Config(name, prefills, decodes, requests, faults, frozenset(kinds), attempts=1, epochs=1, fine=False)


SMALL = (
    Config("crash", 1, 1, (ONE,), 1, frozenset({"crash", "cancel"}), attempts=2),
    Config("time", 1, 1, (ONE,), 1, frozenset({"tick", "lose"}), attempts=1, epochs=1),
    pair("fan-out", FAN_OUT, 1, "cancel", "suspect"),
    pair("fan-out-strikes", FAN_OUT, 1, "crash", "tick"),
    pair("fan-in-strikes", FAN_IN, 1, "crash", "tick"),
)


def unfolded(config: Config) -> Search:
    """A finished search in which every link keeps its own name."""
    search = Search(config)
    search.symmetry.canonical = lambda key: key  # type: ignore[method-assign]
    result = search.run()
    assert result.violation is None, str(result)
    assert result.exhausted
    return search


def quiet_links(config: Config) -> set[tuple[str, ...]]:
    """What every link looks like in every quiet state, but for names that are drawn in the order of arrival."""
    search = unfolded(config)
    return {name for key in quiet_keys(search) for name in of_each_link(search, key)}


def quiet_keys(search: Search) -> list[Key]:
    keys = map(search.unpack, search.keys)
    return [key for key in keys if not search.moves.of(key, search.config.epochs)[0]]


def of_each_link(search: Search, key: Key) -> Iterator[tuple[str, ...]]:
    slices, values = search.slices, search.model.values
    for link in slices.links:
        if values[key[link]] != values[slices.project(key, frozenset())[link]]:
            alone = slices.project(key, frozenset({link}))
            yield str(link), *(nameless(values[number]) for slot, number in enumerate(alone) if slot != BUDGET)


def nameless(value: Any) -> str:
    """Without numbers that follow the order of arrival: leases, generations, physical blocks, times."""
    if isinstance(value, DecodeEngine):
        value = value._replace(stamp=0, free=(), elsewhere=(), contents=())
    return NAMES.sub("", repr(value))


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.name)
def test_the_reduction_reaches_every_quiet_state(config: Config) -> None:
    assert quiet_links(config) == quiet_links(replace(config, reduce=False))


TWINS = Config("twins", 1, 1, (ONE, ONE), 1, frozenset({"crash"}), attempts=1, epochs=1, fine=False)
FOLDED = (TWINS, *SMALL[2:])


@pytest.mark.parametrize("config", FOLDED, ids=lambda config: config.name)
def test_symmetry_loses_no_quiet_state(config: Config) -> None:
    folded, plain = Search(config), unfolded(config)
    names = Symmetry(plain.model)
    assert folded.run().states < len(plain.keys)
    quiet = {names.canonical(key) for key in quiet_keys(plain)}
    assert folded.result.quiet == len(quiet)


def test_a_step_that_looks_at_another_link_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worlds come apart because links have nothing to do with each other; that is checked, not assumed."""

    def tell_all(turn: prefill_ends.Turn, attempt: Any, reason: str) -> None:
        for peer in turn.links:
            turn.tell(peer, Abort(attempt.lease, reason))

    monkeypatch.setattr(prefill_ends, "tell_abort", tell_all)
    result = explore(pair("fan-out", FAN_OUT, 1, "cancel"))
    assert result.violation is not None
    assert "another link" in result.violation
