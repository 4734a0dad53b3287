"""Each known bug, put back, must be caught by the explorer; a survivor means that the explorer is blind to it."""

from __future__ import annotations

import pytest

from tests.transfer.explorer.search import explore
from tests.transfer.mutants import MUTANTS, Mutant

LIMIT_S = 15.0  # of processor time


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_mutant_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, replacement in mutant.patches:
        monkeypatch.setattr(owner, name, replacement)
    result = explore(mutant.config, max_seconds=LIMIT_S)
    assert result.violation is not None, f"survived: {result}"
    assert result.trace
    print(f"killed in {result.seconds:.1f} s after {result.states} states: {mutant.name}: {result.violation}")


@pytest.mark.parametrize("config", sorted({mutant.config for mutant in MUTANTS}, key=repr), ids=repr)
def test_the_protocol_itself_passes_where_mutants_are_caught(config: object) -> None:
    result = explore(config, max_seconds=120.0)  # type: ignore[arg-type]
    assert result.violation is None, str(result)
    assert result.exhausted
