"""What the limits kernel leaves of a row is what the engine's sampler leaves, bit for bit."""

from __future__ import annotations

import torch

from baton.engine import sampler
from baton.engine.kernels.sampling_limits import limits_kernel

VOCAB = 96
TILE = 64

Setting = tuple[int, float, float]  # top_k, top_p, min_p


def kept(
    rows: torch.Tensor,
    settings: list[Setting],
    temperature: float,
    device: torch.device,
    maxima: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of each of the rows' tokens, whether it stays: bool [num_rows, vocabulary's size], by the kernel."""
    num_rows, vocab = rows.shape
    top_k, top_p, min_p = zip(*settings, strict=True)
    farthest = [sampler.max_distance(value) for value in min_p]
    found = torch.full((2, num_rows), -7, dtype=torch.int32, device=device)
    limits_kernel[(num_rows,)](
        rows.to(device),
        (rows.amax(dim=-1) if maxima is None else maxima).to(device),
        torch.full((num_rows,), temperature, device=device),
        torch.tensor(top_k, device=device),
        torch.tensor(top_p, device=device),
        torch.tensor(farthest, device=device),
        *found,
        rows.stride(0),
        VOCAB_SIZE=vocab,
        NUM_PARTS=1,
        PARTS_PAD=1,
        TILE=TILE,
        num_warps=1,
    )
    limit, last_token = (x.unsqueeze(-1) for x in found.cpu())
    bits = scaled(rows, temperature).abs().view(torch.int32)
    stays: torch.Tensor = (bits < limit) | ((bits == limit) & (torch.arange(vocab) <= last_token))
    return stays


def scaled(rows: torch.Tensor, temperature: float) -> torch.Tensor:
    return (rows - rows.amax(dim=-1, keepdim=True)) / temperature


def check(
    rows: torch.Tensor,
    settings: list[Setting],
    device: torch.device,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """That the kernel keeps what the engine's sampler does, but for tokens at minus infinity. Returns what is kept."""
    logits = scaled(rows, temperature)
    top_k, top_p, min_p = zip(*settings, strict=True)
    k = torch.tensor([value if value > 0 else rows.shape[1] for value in top_k])
    expected = sampler._restrict(logits, k.unsqueeze(-1), torch.tensor(top_p).unsqueeze(-1))
    farthest = torch.tensor([sampler.max_distance(value) for value in min_p]).unsqueeze(-1)
    expected = expected.masked_fill(expected < -farthest, -torch.inf)
    found = kept(rows, settings, temperature, device) & logits.isfinite()
    assert torch.equal(found, expected.isfinite())
    return found


def test_by_count_and_by_probability(device: torch.device) -> None:
    settings = [(40, 1.0, 0.0), (60, 0.8, 0.02)]
    check(torch.randn(2, VOCAB) * 2, settings, device, temperature=0.8)


def test_ends_of_the_settings(device: torch.device) -> None:
    settings = [(1, 1.0, 0.0), (VOCAB - 1, 1.0, 0.0), (-1, 1e-9, 0.0), (-1, 0.9999, 0.0)]
    found = check(torch.randn(4, VOCAB) * 2, settings, device)
    assert found.sum(dim=-1)[:3].tolist() == [1, VOCAB - 1, 1]


def test_many_equal_tokens(device: torch.device) -> None:
    """Of those at the limit the lower ids stay."""
    rows = torch.zeros(2, VOCAB)
    rows[1:, 20:50] = 1.5
    found = check(rows, [(37, 1.0, 0.0), (45, 1.0, 0.0)], device)
    assert found[0].nonzero().flatten().tolist() == list(range(37))
    assert found[1].nonzero().flatten().tolist() == [*range(15), *range(20, 50)]


def test_few_equal_tokens(device: torch.device) -> None:
    """Over the border of two tiles."""
    rows = torch.full((2, VOCAB), -9.0)
    rows[:, 1::16] = 2.0
    rows[:, 70] = 4.0
    found = check(rows, [(4, 1.0, 0.0), (6, 0.8, 0.0)], device)
    assert found[0].nonzero().flatten().tolist() == [1, 17, 33, 70]


def test_excluded_tokens(device: torch.device) -> None:
    """Fewer tokens than top-k asks for."""
    rows = torch.randn(2, VOCAB)
    rows[0, 5:] = -torch.inf
    rows[1, ::2] = -torch.inf
    check(rows, [(50, 0.6, 0.0), (60, 1.0, 0.0)], device)


def test_long_and_short_distances(device: torch.device) -> None:
    rows = torch.randn(2, VOCAB).abs() * torch.tensor([[1e3], [1e-7]])
    check(rows, [(30, 1.0, 0.0), (-1, 0.501, 0.0)], device)


def test_zeros_of_either_sign_are_equal(device: torch.device) -> None:
    rows = torch.zeros(1, VOCAB)
    rows[0, ::2] = -0.0
    found = kept(rows, [(5, 1.0, 0.0)], 1.0, device, torch.tensor([-0.0]))
    assert found[0].nonzero().flatten().tolist() == list(range(5))
