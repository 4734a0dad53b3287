"""Products of a few rows against float64."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels.thin_linear import thin_gated_linear, thin_linear
from baton.engine.kernels.tuning import ThinConfig
from tests.kernels.reference import assert_close


@pytest.mark.parametrize("rows", [1, 2, 16, 20])
@pytest.mark.parametrize(("size", "out_size"), [(64, 32), (100, 37)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_thin_linear(
    rows: int, size: int, out_size: int, has_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.float32 and device.type == "cuda" and rows > 1:
        pytest.skip("float32 products of more rows go to cuBLAS")
    wide = torch.full((rows, size + 5), torch.nan, dtype=dtype, device=device)
    x = wide[:, :size]
    x.copy_(torch.randn(rows, size))
    weight = (torch.randn(out_size, size) * size**-0.5).to(dtype).to(device)
    bias = torch.randn(out_size).to(dtype).to(device) if has_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    out = thin_linear(x, weight, bias, ThinConfig(16, 32, 4, 3))
    assert_close(out, expected, dtype)


def test_refuses_many_rows_and_other_shapes(device: torch.device) -> None:
    config = ThinConfig(16, 32, 4, 3)
    with pytest.raises(ValueError, match="not few"):
        thin_linear(torch.zeros(65, 8, device=device), torch.zeros(4, 8, device=device), None, config)
    with pytest.raises(ValueError, match="do not fit"):
        thin_linear(torch.zeros(1, 8, device=device), torch.zeros(4, 9, device=device), None, config)
    assert thin_linear(torch.zeros(0, 8, device=device), torch.zeros(4, 8, device=device), None, config).shape == (0, 4)


@pytest.mark.parametrize(("size", "out_size"), [(64, 32), (100, 37)])
def test_gate_and_up_in_one(size: int, out_size: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(1, size).to(dtype).to(device)
    weight = (torch.randn(2 * out_size, size) * size**-0.5).to(dtype).to(device)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    assert_close(thin_gated_linear(x, weight, ThinConfig(8, 32, 4, 3)), gate / (1 + (-gate).exp()) * up, dtype)
    with pytest.raises(ValueError, match="one row"):
        thin_gated_linear(torch.cat((x, x)), weight, ThinConfig(8, 32, 4, 3))
