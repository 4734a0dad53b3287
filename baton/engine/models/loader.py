"""Filling a model's weights: from safetensors, or at random for measurements. Also the hash that names the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from baton.common.errors import ConfigError
from baton.engine.models.config import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WHOLE_FILE_BYTES = 64 * 1024 * 1024
SAMPLE_BYTES = 4096
NUM_SAMPLES = 256


class Loadable(Protocol):
    def checkpoint_views(self) -> dict[str, torch.Tensor]: ...


def load_checkpoint(model: Loadable, model_dir: Path) -> None:
    """Copy every tensor of the checkpoint to its place. Raises ConfigError naming what is missing or does not fit."""
    views = model.checkpoint_views()
    missing = set(views)
    unexpected: list[str] = []
    for file in checkpoint_files(model_dir):
        for name, tensor in _tensors(file):
            if name in views:
                _copy(views[name], tensor, name, file)
                missing.discard(name)
            elif not _is_derived(name, views):
                unexpected.append(name)
    if missing:
        raise ConfigError("model", f"{model_dir} lacks {_some(missing)}")
    if unexpected:
        raise ConfigError("model", f"{model_dir} holds tensors that this model does not have: {_some(unexpected)}")


def fill_random(model: Loadable, seed: int = 0) -> None:
    """Weights of a plausible scale, made on the model's device: for measurements, where the text does not matter."""
    for number, (name, view) in enumerate(sorted(model.checkpoint_views().items())):
        generator = torch.Generator(view.device).manual_seed(seed * 1_000_003 + number)
        if name.endswith("norm.weight"):
            view.fill_(1.0)
        else:
            view.normal_(0.0, 0.02, generator=generator)


def checkpoint_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in a fixed order. Raises ConfigError when there are none."""
    index = model_dir / INDEX
    if not index.exists():
        if not (model_dir / SINGLE).exists():
            raise ConfigError("model", f"{model_dir} holds neither {SINGLE} nor {INDEX}")
        return [model_dir / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError("model", f"{index} has no valid weight_map") from None
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise ConfigError("model", f"{index} names files outside its folder: {_some(map(str, strange))}")
    absent = [name for name in names if not (model_dir / name).exists()]
    if absent:
        raise ConfigError("model", f"{model_dir} lacks {_some(absent)}")
    return [model_dir / name for name in names]


def model_hash(config: ModelConfig, model_dir: Path) -> str:
    """Names weights and shape, so that two workers can tell whether their KV caches mean the same. Hexadecimal.

    Covers the parsed configuration and, of every file, its size and its whole content up to 64 MiB; of larger files the
    header and 256 evenly spread samples of 4 KiB, so that starting on a large checkpoint stays fast.
    """
    digest = hashlib.sha256(repr(config).encode())
    for file in checkpoint_files(model_dir):
        size = file.stat().st_size
        digest.update(f"\n{file.name} {size}\n".encode())
        for start, length in _hashed_ranges(file, size):
            _update(digest, file, start, length)
    return digest.hexdigest()


def random_hash(config: ModelConfig, seed: int = 0) -> str:
    """The name of the weights that `fill_random` makes."""
    return hashlib.sha256(f"{config!r} random {seed}".encode()).hexdigest()


def _hashed_ranges(file: Path, size: int) -> Iterator[tuple[int, int]]:
    if size <= WHOLE_FILE_BYTES:
        yield 0, size
        return
    with file.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    yield 0, min(header, WHOLE_FILE_BYTES)
    stride = (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1)
    for number in range(NUM_SAMPLES):
        yield number * stride, SAMPLE_BYTES


def _update(digest: hashlib._Hash, file: Path, start: int, length: int) -> None:
    with file.open("rb") as stream:
        stream.seek(start)
        digest.update(stream.read(length))


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(str(file), framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (not a mapping: it has keys() and no iteration)
                yield name, content.get_tensor(name)
    except SafetensorError as error:
        raise ConfigError("model", f"{file} is not a valid safetensors file: {error}") from None


def _copy(view: torch.Tensor, tensor: torch.Tensor, name: str, file: Path) -> None:
    if view.shape != tensor.shape:
        raise ConfigError("model", f"{file}: {name} is {list(tensor.shape)}, config.json says {list(view.shape)}")
    if not tensor.is_floating_point():
        raise ConfigError("model", f"{file}: {name} has type {tensor.dtype}, not a floating point type")
    view.copy_(tensor)


def _is_derived(name: str, views: dict[str, torch.Tensor]) -> bool:
    """Tensors that old checkpoints carry and that follow from others: rotary tables and a tied output matrix."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in views)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:5])
    return shown if len(ordered) <= 5 else f"{shown} and {len(ordered) - 5} more"
