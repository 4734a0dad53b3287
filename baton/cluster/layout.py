"""How many workers of each role run where: a pure function of the configuration and the machine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import Literal

from baton.common.config import BatonConfig
from baton.common.errors import ConfigError

Role = Literal["prefill", "decode"]
PREFILL: Role = "prefill"
DECODE: Role = "decode"


@dataclass(frozen=True, slots=True)
class ClusterLayout:
    """`reason` says in words why it is so; printed at start."""

    num_prefill: int
    num_decode: int
    device: Literal["cuda", "cpu"]
    reason: str

    @property
    def num_workers(self) -> int:
        return self.num_prefill + self.num_decode

    def roles(self) -> list[Role]:
        """One entry per worker. Decode first: a cluster without prefill workers serves, the reverse does not."""
        return [*repeat(DECODE, self.num_decode), *repeat(PREFILL, self.num_prefill)]

    def describe(self) -> str:
        kind = "colocated" if self.num_prefill == 0 else "disaggregated"
        return f"{kind}: {self.num_prefill} prefill + {self.num_decode} decode on {self.device} ({self.reason})"


def choose_layout(config: BatonConfig, num_gpus: int) -> ClusterLayout:
    """Resolve `cluster.prefill`, `cluster.decode` and `cluster.device` against `num_gpus` GPUs of the Ray cluster.

    Without numbers: no GPU gives 1 + 1 on the CPU, one GPU a colocated server, more GPUs half prefill (rounded down)
    and half decode. Raises ConfigError when the request exceeds the machine.
    """
    device = _resolve_device(config, num_gpus)
    prefill, decode, reason = _resolve_counts(config, device, num_gpus)
    if device == "cuda" and prefill + decode > num_gpus:
        raise ConfigError(
            "cluster.decode",
            f"{prefill} prefill and {decode} decode workers need {prefill + decode} GPUs, the cluster has {num_gpus}",
        )
    return ClusterLayout(prefill, decode, device, reason)


def _resolve_device(config: BatonConfig, num_gpus: int) -> Literal["cuda", "cpu"]:
    if config.cluster.device == "auto":
        return "cuda" if num_gpus else "cpu"
    if config.cluster.device == "cuda" and not num_gpus:
        raise ConfigError("cluster.device", "cuda was asked for, but Ray sees no GPU; use --device cpu")
    return config.cluster.device


def _resolve_counts(config: BatonConfig, device: str, num_gpus: int) -> tuple[int, int, str]:
    prefill, decode = config.cluster.prefill, config.cluster.decode
    if prefill is not None and decode is not None:
        return prefill, decode, "as asked"
    if device == "cpu":
        return _or(prefill, 1), _or(decode, 1), "no GPU in use"
    if prefill is not None:
        return prefill, max(1, num_gpus - prefill), f"the rest of {num_gpus} GPUs decodes"
    if decode is not None:
        return max(0, num_gpus - decode), decode, f"the rest of {num_gpus} GPUs prefills"
    if num_gpus == 1:
        return 0, 1, "one GPU"
    return num_gpus // 2, num_gpus - num_gpus // 2, f"{num_gpus} GPUs"


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
