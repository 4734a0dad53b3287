"""Small arrays on their way to the device and drawn tokens on their way back. Owned by the runner, engine thread only.

On a GPU everything passes through pinned memory, so that no copy waits for the device. A pinned buffer is written again
only when the copy out of it has ended, which its event tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16
_NUM_BUFFERS = 3  # one more than steps can be in flight
_TORCH_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A list as a tensor there, for callers that may call any number of times a step: none waits for the device.

    On a GPU it passes through pinned memory of torch's own, which is given out again only when the copy has ended.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def start_fetch(x: torch.Tensor) -> torch.Tensor:
    """The same on the host, complete when all that is launched on the current stream by now has ended.

    Without a copy where it is there already.
    """
    if x.device.type != "cuda":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class PendingTokens(Protocol):
    """The draws of a launched step."""

    def is_ready(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> list[int]:
        """Block until the step has ended; its tokens. Raises what the device reports."""
        ...


class Staging(Protocol):
    def upload(self, arrays: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        """The arrays on the device, in order. They may be changed once this returns."""
        ...

    def read_back(self, tokens: torch.Tensor) -> PendingTokens:
        """Start to fetch int64 [n]; `tokens` may be overwritten by later work on the current stream."""
        ...


def make_staging(device: torch.device, max_draws: int) -> Staging:
    return CudaStaging(device, max_draws) if device.type == "cuda" else HostStaging()


class KnownTokens:
    """Tokens that are here already."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def is_ready(self) -> bool:
        return True

    def wait(self) -> list[int]:
        return self._tokens


class HostStaging:
    """Nothing has to travel."""

    def upload(self, arrays: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        return [torch.from_numpy(array.copy()) for array in arrays]

    def read_back(self, tokens: torch.Tensor) -> PendingTokens:
        return KnownTokens([int(token) for token in tokens.tolist()])


class CudaStaging:
    """Everything that a step needs goes up in one copy."""

    def __init__(self, device: torch.device, max_draws: int) -> None:
        self._device = device
        self._up = [_PinnedBuffer(1 << 16) for _ in range(_NUM_BUFFERS)]
        self._down = [torch.empty(max_draws, dtype=torch.int64, pin_memory=True) for _ in range(_NUM_BUFFERS)]

    def upload(self, arrays: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
        buffer = self._up.pop(0)
        self._up.append(buffer)
        buffer.reserve(starts[-1])
        for array, (start, end) in zip(arrays, pairwise(starts), strict=True):
            buffer.array[start : min(end, start + array.nbytes)] = (
                np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            )
        on_device = buffer.tensor[: starts[-1]].to(self._device, non_blocking=True)
        buffer.sent.record()
        return [
            on_device[start : start + array.nbytes].view(_TORCH_DTYPES[array.dtype]).view(array.shape)
            for array, start in zip(arrays, starts, strict=False)
        ]

    def read_back(self, tokens: torch.Tensor) -> PendingTokens:
        target = self._down.pop(0)
        self._down.append(target)
        target = target[: len(tokens)]
        target.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _CopiedTokens(target, event)


class _PinnedBuffer:
    """`sent` fires when the last copy out of the buffer has ended."""

    def __init__(self, size: int) -> None:
        self.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._allocate(size)

    def reserve(self, size: int) -> None:
        self.sent.synchronize()
        if size > len(self.array):
            self._allocate(2 * size)

    def _allocate(self, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.array: npt.NDArray[np.uint8] = self.tensor.numpy()


class _CopiedTokens:
    def __init__(self, tokens: torch.Tensor, event: torch.cuda.Event) -> None:
        self._tokens = tokens
        self._event = event

    def is_ready(self) -> bool:
        """A failed device is ready to say so."""
        try:
            return bool(self._event.query())  # type: ignore[no-untyped-call]
        except RuntimeError:
            return True

    def wait(self) -> list[int]:
        self._event.synchronize()
        return [int(token) for token in self._tokens.tolist()]
