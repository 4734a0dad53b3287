"""Drawing tokens with the Triton kernels. Imported by name, on a GPU only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from baton.engine.kernels.greedy import greedy_tokens
from baton.engine.kernels.sampling import sample
from baton.engine.request import Request
from baton.engine.sampler import max_distance
from baton.engine.staging import CudaStaging


class TritonSampler:
    """Implements `TokenSampler`. Greedy rows alone take one pass over the logits."""

    def __init__(self, device: torch.device) -> None:
        self._staging = CudaStaging(device, 0)

    def sample(
        self, logits: torch.Tensor, requests: Sequence[Request], positions: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        settings = [request.sampling for request in requests]
        if all(s.temperature <= 0 for s in settings):
            tokens = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
            greedy_tokens(logits, tokens)
            return tokens
        temperature, top_p, distance, top_k, seed, choice, position = self._staging.upload(
            (
                np.array([s.temperature for s in settings], dtype=np.float32),
                np.array([s.top_p for s in settings], dtype=np.float32),
                np.array([max_distance(s.min_p) for s in settings], dtype=np.float32),
                np.array([s.top_k for s in settings], dtype=np.int64),
                np.array([s.seed for s in settings], dtype=np.uint64).view(np.int64),
                np.array([s.choice for s in settings], dtype=np.int64),
                positions,
            )
        )
        return sample(logits, temperature, top_k, top_p, distance, seed, choice, position)
