"""The table of angles of rotary position embedding. Applying it is the attention backend's part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are squeezed: all angles are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: slow dimensions are squeezed by `factor`, fast ones are not, those between are blended.

    A dimension is slow when it turns fewer than `low_freq_factor` times within `original_max_positions`, fast when it
    turns more than `high_freq_factor` times.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


RopeScaling = LinearScaling | Llama3Scaling


def cos_sin_table(
    max_positions: int, head_dim: int, theta: float, device: torch.device, scaling: RopeScaling | None = None
) -> torch.Tensor:
    """Cosines, then sines: float32 [max_positions, head_dim]."""
    frequencies = inverse_frequencies(head_dim, theta, scaling).to(device)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32, device=device), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Radians per position of each pair of dimensions: float32 [head_dim / 2], on the CPU."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling():
            return _llama3(frequencies, scaling)


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # share of a dimension that is not squeezed
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies
