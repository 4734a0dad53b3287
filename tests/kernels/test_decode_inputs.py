"""The inputs of a decode step from records, and the largest logit of every row."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels import decode_inputs as module
from baton.engine.kernels import greedy
from baton.engine.kernels.decode_inputs import DecodeInputs, decode_inputs
from baton.engine.kernels.greedy import greedy_tokens


def test_inputs_come_from_records_tables_and_draws(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", 4)
    tables = torch.arange(100, 160, dtype=torch.int32).view(5, 12).to(device)
    draws = torch.tensor([7, -1, 9], device=device)
    records = torch.tensor(
        [
            [4, 0, 2, 1, 0],  # table row
            [33, 16, 1, 180, 0],  # context length, the last row is padding
            [50, 51, 52, 53, 0],  # token
            [-1, 2, 0, 1, -1],  # row among the draws
        ],
        device=device,
    )
    out = DecodeInputs.allocate(6, 12, device)
    out.block_tables.fill_(-5)
    decode_inputs(records, tables, draws, out, 16)
    assert out.input_ids[:5].tolist() == [50, 9, 7, 0, 0]
    assert out.positions[:5].tolist() == [32, 15, 0, 179, 0]
    assert out.context_lens[:5].tolist() == [33, 16, 1, 180, 0]
    assert out.slot_mapping[:5].tolist() == [150 * 16, 100 * 16 + 15, 124 * 16, 123 * 16 + 3, -1]
    assert out.block_tables[0, :3].tolist() == [148, 149, 150]
    assert out.block_tables[3].tolist() == list(range(112, 124))
    assert (out.block_tables[5] == -5).all()


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    out = DecodeInputs.allocate(2, 4, device)
    tables, draws = (
        torch.zeros(2, 4, dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
    )
    with pytest.raises(ValueError, match="records"):
        decode_inputs(torch.zeros(3, 2, dtype=torch.int64, device=device), tables, draws, out, 16)
    with pytest.raises(ValueError, match="do not fit"):
        decode_inputs(torch.zeros(4, 3, dtype=torch.int64, device=device), tables, draws, out, 16)


def test_greedy_takes_the_largest_and_the_lowest_of_equals(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy, "_TILE", 128)
    logits = torch.randn(6, 900).to(dtype).to(device)
    logits[1, [300, 301, 700]] = 50.0
    logits[2] = 0.0
    logits[3, 899] = 50.0
    logits[4, 5] = torch.nan
    logits[5] = -torch.inf
    expected = [int(logits[0].float().argmax()), 300, 0, 899, -1, -1]
    tokens = torch.full((6,), -7, dtype=torch.int64, device=device)
    greedy_tokens(logits, tokens)
    assert tokens.tolist() == expected


def test_greedy_refuses_other_tokens(device: torch.device) -> None:
    with pytest.raises(ValueError, match="int64"):
        greedy_tokens(torch.zeros(2, 4, device=device), torch.zeros(2, dtype=torch.int32, device=device))
