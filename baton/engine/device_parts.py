"""What differs between a CPU and a GPU, chosen once by the engine's builder."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.common.config import EngineConfig
from baton.engine.attention.base import AttentionBackend
from baton.engine.attention.factory import make_backend
from baton.engine.decode_path import DecodePath
from baton.engine.prefill_path import PrefillPath
from baton.engine.runner import Runner
from baton.engine.sampler import TokenSampler, TorchSampler


@dataclass(frozen=True, slots=True)
class StepPaths:
    """Faster ways for some steps, None where there is none."""

    decode: DecodePath | None
    prefill: PrefillPath | None


class MakeStepPaths(Protocol):
    def __call__(self, runner: Runner, config: EngineConfig, max_model_len: int) -> StepPaths: ...


@dataclass(frozen=True, slots=True)
class DeviceParts:
    backend: AttentionBackend
    sampler: TokenSampler
    make_step_paths: MakeStepPaths


def make_device_parts(device: torch.device) -> DeviceParts:
    """Triton kernels and CUDA graphs on a GPU, plain torch elsewhere."""
    backend = make_backend(device)
    if device.type != "cuda":
        return DeviceParts(backend, TorchSampler(), _no_step_paths)
    # Imported by name: a CPU build of torch comes without Triton, and only this branch needs it.
    sampler: TokenSampler = importlib.import_module("baton.engine.cuda.sampler").TritonSampler(device)
    make_step_paths: MakeStepPaths = importlib.import_module("baton.engine.cuda.step_paths").make_step_paths
    return DeviceParts(backend, sampler, make_step_paths)


def _no_step_paths(runner: Runner, config: EngineConfig, max_model_len: int) -> StepPaths:
    del runner, config, max_model_len
    return StepPaths(None, None)
