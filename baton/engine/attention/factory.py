"""Choice of the attention backend; called once by the engine's builder."""

from __future__ import annotations

import importlib

import torch

from baton.engine.attention.base import AttentionBackend
from baton.engine.attention.torch_reference import TorchBackend


def make_backend(device: torch.device) -> AttentionBackend:
    """Triton kernels on a GPU, torch elsewhere."""
    if device.type != "cuda":
        return TorchBackend()
    # The one import by name: a CPU build of torch comes without Triton, and only this branch needs it.
    module = importlib.import_module("baton.engine.attention.triton_backend")
    backend: AttentionBackend = module.TritonBackend(device)
    return backend
