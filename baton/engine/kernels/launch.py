"""Launching a kernel again and again at little cost to the host.

Triton's own way binds and classifies every argument at every launch, which takes longer than many kernels do. Here a
wrapper settles all but the tensors once per class of tensors (see `signature`) and keeps the result with `lru_cache`.
Any thread; the cached launches hold no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from triton.runtime import driver

# Of one launcher function: a prompt's length makes a class of its own.
NUM_PLANS = 1024

# Shape, strides, dtype, and how far the address is from a multiple of 16: all that a compiled kernel depends on.
Signature = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, int]


def signature(x: torch.Tensor) -> Signature:
    """Tensors of one signature, on one device, can be given to one `Launch`."""
    return x.shape, x.stride(), x.dtype, x.data_ptr() & 15


def is_packed(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether such a tensor is contiguous."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def cdiv(a: int, b: int) -> int:
    """Triton's own is a hundred times as slow on the host, as is its `next_power_of_2`."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is at least `n`, which is positive."""
    return 1 << (n - 1).bit_length()


class Launch:
    """A kernel, its grid, and all of its arguments but the tensors, which come first among its parameters.

    Grid and numbers may also be given with each call (`sized`), where they are no part of what the kernel is compiled
    for: integers that it does not specialize on.
    The kernel is compiled, or found, by the first call. Tensors of later calls must have the signatures of the first
    one's and be on its device. `options`: num_warps and the like. Legal in a CUDA graph from the second call on.
    Triton's hooks around launches, which profilers may set, hear of the first call only.
    """

    __slots__ = ("_constants", "_grid", "_head", "_kernel", "_numbers", "_options", "_run", "_tail", "_values")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[float, ...],
        constants: Mapping[str, object],
        **options: int,
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._numbers = numbers
        self._constants = constants
        self._options = options
        self._run: Callable[..., object] | None = None
        self._head: tuple[object, ...] = ()
        self._values: tuple[object, ...] = ()
        self._tail: tuple[object, ...] = ()

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """On the current stream."""
        if self._run is not None:
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            self._run(*self._grid, stream, *self._head, *tensors, *self._tail)
            return
        self._settle(self._grid, self._numbers, tensors)

    def sized(self, grid: tuple[int, int, int], numbers: tuple[int, ...], *tensors: torch.Tensor) -> None:
        """With this grid and these numbers, as many as were given at first."""
        if self._run is not None:
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            self._run(*grid, stream, *self._head, *tensors, *numbers, *self._values)
            return
        self._settle(grid, numbers, tensors)

    def _settle(
        self, grid: tuple[int, ...], numbers: tuple[float, ...], tensors: tuple[torch.Tensor | None, ...]
    ) -> None:
        """Launch by Triton's own way, and keep what it found."""
        compiled = self._kernel[grid](*tensors, *numbers, **self._constants, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            names = self._kernel.arg_names[len(tensors) + len(numbers) :]
            self._values = tuple(self._constants[name] for name in names)
            self._tail = (*self._numbers, *self._values)
            run = compiled.run  # which loads the kernel, so it comes first
            self._head = (compiled.function, compiled.packed_metadata, None, None, None)
            self._run = run  # last: another thread may call this now
