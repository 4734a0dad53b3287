"""RMSNorm with residual, and SiLU times up, against float64."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels.rms_norm import rms_norm
from baton.engine.kernels.silu_mul import silu_mul
from tests.kernels.reference import assert_close


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 100), (2, 1500)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(rows: int, size: int, with_residual: bool, dtype: torch.dtype, device: torch.device) -> None:
    eps = 0.1  # large enough to show if it were left out
    # Rows of a wider tensor: strided, with NaN beside them.
    wide = torch.full((rows, size + 3), torch.nan, dtype=dtype, device=device)
    x = wide[:, :size]
    x.copy_(torch.randn(rows, size))
    weight = (torch.randn(size) + 2).to(dtype).to(device)
    residual = torch.randn(rows, size).to(dtype).to(device) if with_residual else None
    total = x.double() + (residual.double() if residual is not None else 0)
    expected = total * (total.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    x_before = x.clone()

    out = rms_norm(x, weight, eps, residual)

    assert_close(out, expected, dtype)
    assert torch.equal(x, x_before)
    if residual is not None:
        assert torch.equal(residual, total.to(dtype))


def test_rms_norm_normalises_the_rounded_sum(device: torch.device) -> None:
    """What goes on in the residual stream and what is normalised are the same values."""
    x = torch.full((1, 64), 1.0, dtype=torch.float16, device=device)
    residual = torch.full((1, 64), 2048.0, dtype=torch.float16, device=device)  # 2049 rounds to 2048
    out = rms_norm(x, torch.ones(64, dtype=torch.float16, device=device), 0.0, residual)
    assert (residual == 2048).all()
    assert (out == 1).all()


def test_rms_norm_of_no_rows(device: torch.device) -> None:
    assert rms_norm(torch.zeros(0, 8, device=device), torch.ones(8, device=device), 1e-5).shape == (0, 8)


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 100), (2, 1030)])
def test_silu_mul(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = torch.randn(rows, 2 * size).mul(4).to(dtype).to(device)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(
        silu_mul(gate_up), gate / (1 + (-gate).exp()) * up, dtype, tolerance=None if dtype != torch.bfloat16 else 0.1
    )


def test_silu_of_extreme_gates(device: torch.device) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 1e4, 1.0, 2.0, 3.0, 4.0]], device=device)
    assert torch.equal(silu_mul(gate_up), torch.tensor([[0.0, 0.0, 0.0, 4e4]], device=device))


def test_silu_of_no_rows_and_of_an_odd_width(device: torch.device) -> None:
    assert silu_mul(torch.zeros(0, 8, device=device)).shape == (0, 4)
    with pytest.raises(ValueError, match="gate_up"):
        silu_mul(torch.zeros(2, 7, device=device))
