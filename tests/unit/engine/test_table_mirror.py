"""Gathered block tables are those of the requests, however they grow, come and go."""

from __future__ import annotations

import random

import pytest

from baton.common.sampling import SamplingParams
from baton.engine.cuda.block_tables import BlockTableRows
from baton.engine.request import Phase, Request
from baton.engine.table_mirror import TableMirror


def with_table(table: list[int]) -> Request:
    request = Request("same id", [1], SamplingParams(max_tokens=9), 0.0)
    request.block_table = table
    return request


@pytest.mark.parametrize("seed", range(5))
def test_against_the_tables_themselves(seed: int) -> None:
    numbers = random.Random(seed)
    mirror, running = TableMirror(), list[Request]()
    for _ in range(200):
        running = [request for request in running if numbers.random() > 0.1]
        running += [
            with_table(numbers.choices(range(1000), k=numbers.randint(1, 9))) for _ in range(numbers.choice((0, 8)))
        ]
        for request in running:
            request.block_table += numbers.choices(range(1000), k=numbers.choice((0, 0, 0, 1, 30)))
        chosen = numbers.sample(running, k=numbers.randint(0, len(running)))
        width = numbers.randint(1, max((len(request.block_table) for request in chosen), default=1))
        found = mirror.gather(chosen, width)
        assert found.shape == (len(chosen), width)
        for row, request in zip(found.tolist(), chosen, strict=True):
            count = min(width, len(request.block_table))
            assert row[:count] == request.block_table[:count]


def test_rows_of_requests_that_are_gone_are_used_again() -> None:
    mirror = TableMirror()
    for _ in range(100):
        requests = [with_table([7, 8]) for _ in range(16)]
        assert mirror.gather(requests, 2).tolist() == [[7, 8]] * 16
        del requests
    assert mirror.num_rows <= 64


def test_an_old_owner_shows_nowhere_in_a_table() -> None:
    mirror = TableMirror()
    old = with_table([5, 6, 7])
    mirror.gather([old], 3)
    del old
    new = [with_table([n]) for n in range(16)]
    assert mirror.gather(new, 1).tolist() == [[n] for n in range(16)]
    new[3].block_table.append(44)
    assert mirror.gather(new[3:4], 2).tolist() == [[3, 44]]


def test_an_id_that_is_used_again_has_nothing_of_its_first_owner() -> None:
    """On the device, tables stand in rows that requests have by their ids; both requests here have the same."""
    rows = BlockTableRows(max_rows=2, max_blocks=8)
    first, second = with_table([5, 6, 7]), with_table([8, 9])
    (row,) = rows.rows_of([first])
    assert rows.news([first])[1].tolist() == [5, 6, 7]
    assert rows.rows_of([first]) == [row]
    assert len(rows.news([first])[1]) == 0
    first.phase = Phase.FINISHED
    (row,) = rows.rows_of([second])
    indices, blocks = rows.news([second])
    assert (indices.tolist(), blocks.tolist()) == ([8 * row, 8 * row + 1], [8, 9])
