"""The table of angles of rotary position embedding. Applying it is the attention backend's part."""

from __future__ import annotations

import torch


def cos_sin_table(max_positions: int, head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """Cosines, then sines: float32 [max_positions, head_dim]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32, device=device), 1.0 / theta**exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
