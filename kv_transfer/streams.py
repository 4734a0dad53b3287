"""CUDA streams that serve one user after the other.

Torch has 32 streams of a priority and hands them out in turn, in use or not. Two users of one wait for each other: a
receive that waits for its peer would hold up what another pair does. So no epoch asks torch for streams while those of
an epoch before lie idle. The ones inside NCCL are not ours and go on by turns.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_idle: defaultdict[tuple[torch.device, int], list[torch.cuda.Stream]] = defaultdict(list)


def take(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """A stream that nobody else uses. Zero is the lowest priority, negative ones go first. Any thread."""
    with _lock:
        idle = _idle[device, priority]
        if idle:
            return idle.pop()
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]


def give_back(stream: torch.cuda.Stream, device: torch.device, priority: int = 0) -> None:
    """What was launched on it has ended, and its user launches no more. Any thread."""
    with _lock:
        _idle[device, priority].append(stream)


@contextmanager
def borrowed(device: torch.device) -> Iterator[None]:
    """What is launched inside goes by a stream of its own, and has ended at the end. After an exception it is lost."""
    stream = take(device)
    with torch.cuda.stream(stream):
        yield
    give_back(stream, device)
