"""Kernels run on the GPU if there is one, else in Triton's interpreter, which computes bfloat16 wrongly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when the modules of the kernels are imported, so it must be set before the test modules are.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param == "bfloat16" and not torch.cuda.is_available():
        pytest.skip("the interpreter computes bfloat16 wrongly")
    found: torch.dtype = getattr(torch, request.param)
    return found


@pytest.fixture(autouse=True)
def _one_thread_and_fresh_numbers() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(f"seed {torch.seed()}")  # shown when a test fails
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty holds NaN (or -1), so that a value that was never written shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -1 if tensor.dtype.is_signed else 0xEE)

    monkeypatch.setattr(torch, "empty", poisoned)
