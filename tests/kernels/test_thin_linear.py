"""Products of one row against float64."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels.thin_linear import thin_gated_linear, thin_linear
from baton.engine.kernels.tuning import ThinConfig
from tests.kernels.reference import assert_close


@pytest.mark.parametrize(("size", "out_size"), [(64, 32), (128, 37), (100, 37)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_thin_linear(size: int, out_size: int, has_bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    wide = torch.full((1, size + 8), torch.nan, dtype=dtype, device=device)
    x = wide[:, :size]
    x.copy_(torch.randn(1, size))
    weight = (torch.randn(out_size, size) * size**-0.5).to(dtype).to(device)
    bias = torch.randn(out_size).to(dtype).to(device) if has_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    assert_close(thin_linear(x, weight, bias, ThinConfig(16, 32, 4, 3)), expected, dtype)


def test_refuses_more_rows_and_other_shapes(device: torch.device) -> None:
    config = ThinConfig(16, 32, 4, 3)
    for x in (torch.zeros(2, 8, device=device), torch.zeros(1, 9, device=device)):
        with pytest.raises(ValueError, match="do not fit"):
            thin_linear(x, torch.zeros(4, 8, device=device), None, config)


@pytest.mark.parametrize(("size", "out_size"), [(64, 32), (100, 37)])
def test_gate_and_up_in_one(size: int, out_size: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(1, size).to(dtype).to(device)
    weight = (torch.randn(2 * out_size, size) * size**-0.5).to(dtype).to(device)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    config = ThinConfig(8, 32, 4, 3)
    assert_close(thin_gated_linear(x, weight, config), gate / (1 + (-gate).exp()) * up, dtype)
    with pytest.raises(ValueError, match="even number"):
        thin_gated_linear(x, weight[1:], config)
