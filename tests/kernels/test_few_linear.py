"""Products of a few rows through the tensor cores against float64."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels.few_linear import few_gated_linear, few_linear
from baton.engine.kernels.rms_norm import rms_norm
from baton.engine.kernels.tuning import FewConfig
from tests.kernels.reference import assert_close


def few_config(splits: int = 1) -> FewConfig:
    return FewConfig(block_out=64, block_in=32, num_warps=4, num_stages=3, splits=splits)


@pytest.fixture(autouse=True)
def _no_float32_on_a_gpu(request: pytest.FixtureRequest, device: torch.device) -> None:
    if "dtype" in request.fixturenames and device.type == "cuda" and request.getfixturevalue("dtype") == torch.float32:
        pytest.skip("float32 products go to cuBLAS")


@pytest.mark.parametrize(
    ("rows", "out_size", "splits", "has_bias"),
    [
        (2, 64, 4, True),
        (16, 100, 1, True),
        (16, 64, 2, False),
        (33, 100, 4, True),
        (64, 100, 2, False),
        (64, 64, 1, True),
    ],
)
def test_few_linear(
    rows: int, out_size: int, splits: int, has_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    size = 256
    wide = torch.full((rows, size + 8), torch.nan, dtype=dtype, device=device)
    x = wide[:, :size]
    x.copy_(torch.randn(rows, size))
    weight = (torch.randn(out_size, size) * size**-0.5).to(dtype).to(device)
    bias = torch.randn(out_size).to(dtype).to(device) if has_bias else None
    out = few_linear(x, weight, bias, few_config(splits))
    assert out.shape == ((rows, out_size) if splits == 1 else (splits, rows, out_size))
    assert out.dtype == (dtype if splits == 1 else torch.float32)
    total = out if splits == 1 else out.sum(0)
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    assert_close(total, expected, dtype)


@pytest.mark.parametrize("out_size", [64, 100])
def test_gate_and_up_in_one(out_size: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(5, 128).to(dtype).to(device)
    weight = (torch.randn(2 * out_size, 128) * 128**-0.5).to(dtype).to(device)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    assert_close(few_gated_linear(x, weight, few_config()), gate / (1 + (-gate).exp()) * up, dtype)
    for weights, splits in ((weight[1:], 1), (weight, 2)):
        with pytest.raises(ValueError, match="even number"):
            few_gated_linear(x, weights, few_config(splits))


@pytest.mark.parametrize("splits", [2, 3])
def test_the_norm_behind_sums_the_parts(splits: int, dtype: torch.dtype, device: torch.device) -> None:
    parts = torch.randn(splits, 3, 100, device=device)
    residual = torch.randn(3, 100).to(dtype).to(device)
    weight = (torch.randn(100) + 2).to(dtype).to(device)
    total = (parts.double().sum(0) + residual.double()).to(dtype).double()
    out = rms_norm(parts, weight, 0.1, residual)
    assert out.dtype == dtype
    assert_close(residual, total, dtype)
    total = residual.double()
    assert_close(out, total * (total.square().mean(-1, keepdim=True) + 0.1).rsqrt() * weight.double(), dtype)


def test_refuses_many_rows_and_other_shapes(device: torch.device) -> None:
    weight = torch.zeros(4, 64, device=device)
    for x, config, message in (
        (torch.zeros(65, 64), few_config(), "not few"),
        (torch.zeros(2, 32), few_config(), "do not fit"),
        (torch.zeros(2, 64), few_config(splits=3), "no multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            few_linear(x.to(device), weight, None, config)
    assert few_linear(torch.zeros(0, 64, device=device), weight, None, few_config(2)).shape == (2, 0, 4)
    with pytest.raises(ValueError, match="the dtype of the result"):
        rms_norm(torch.zeros(2, 4, dtype=torch.float16), torch.ones(4), 1e-5)
