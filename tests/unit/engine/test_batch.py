"""A step as arrays: order of rows, positions, slots, and which rows are sampled."""

from __future__ import annotations

from baton.common.sampling import SamplingParams
from baton.engine.batch import PrefillSegment, ScheduledStep, build_batch
from baton.engine.request import Request


def a_request(name: str, tokens: list[int], computed: int, table: list[int]) -> Request:
    request = Request(name, tokens, SamplingParams(max_tokens=9), 0.0)
    request.num_computed_tokens, request.block_table = computed, table
    return request


def test_decodes_come_first_then_segments() -> None:
    decoding = a_request("d", list(range(100, 117)), 17, [7, 3])
    decoding.token_ids.append(55)
    whole = a_request("w", [1, 2, 3], 0, [9])
    part = a_request("p", list(range(40)), 15, [4, 5, 6])
    step = ScheduledStep((decoding,), (PrefillSegment(part, 15, 18), PrefillSegment(whole, 0, 3)))
    batch = build_batch(step, 16)
    assert batch.input_ids.tolist() == [55, 15, 16, 17, 1, 2, 3]
    assert batch.positions.tolist() == [17, 15, 16, 17, 0, 1, 2]
    assert batch.slot_mapping.tolist() == [3 * 16 + 1, 4 * 16 + 15, 5 * 16, 5 * 16 + 1, 9 * 16, 9 * 16 + 1, 9 * 16 + 2]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4, 7]
    assert batch.context_lens.tolist() == [18, 18, 3]
    assert batch.block_tables.tolist() == [[7, 3], [4, 5], [9, 0]]
    assert batch.sample_rows.tolist() == [0, 6]
    assert step.sampled() == [decoding, whole]
    assert (batch.num_decodes, batch.num_prefills, batch.num_prefill_tokens, batch.max_seqlen_q) == (1, 2, 6, 3)


def test_only_decodes() -> None:
    requests = []
    for number in range(3):
        request = a_request(str(number), [1] * 16, 16, [number, 10 + number])
        request.token_ids.append(number)
        requests.append(request)
    batch = build_batch(ScheduledStep(tuple(requests)), 16)
    assert batch.input_ids.tolist() == [0, 1, 2]
    assert batch.slot_mapping.tolist() == [160, 176, 192]
    assert batch.sample_rows.tolist() == [0, 1, 2]
    assert batch.max_seqlen_q == 1


def test_a_step_without_a_sampled_row() -> None:
    batch = build_batch(ScheduledStep((), (PrefillSegment(a_request("p", [1] * 40, 0, [0, 1, 2]), 0, 20),)), 16)
    assert batch.sample_rows.tolist() == []
    assert batch.block_tables.shape == (1, 2)
