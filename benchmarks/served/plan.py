"""What to measure: a YAML file of a model shape, configuration that all layouts share, layouts, loads for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.common.config import BatonConfig
from baton.common.errors import ConfigError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Load(_Strict):
    """One load on a running cluster: `rate` in requests/s (open loop, Poisson) or `concurrency` (closed loop).

    `input` and `output` are lengths as `baton bench serve` takes them. `peer`: what another server was measured to do
    under the same load, by the name of the figure in the summary, to be printed beside ours.
    """

    name: str
    input: str
    output: str
    requests: int = Field(ge=1)
    rate: float | None = Field(None, gt=0)
    concurrency: int | None = Field(None, ge=1)
    warmup: int = Field(2, ge=0)
    seed: int = 0
    peer: dict[str, float] = {}


class Layout(_Strict):
    """`config` overrides the plan's."""

    name: str
    config: dict[str, Any] = {}
    loads: tuple[Load, ...]


class ServedPlan(_Strict):
    """`shape`: see `baton model shape`; `model` a directory instead, then with its weights."""

    shape: str | None = None
    model: str | None = None
    peer: str = ""
    config: dict[str, Any] = {}
    layouts: tuple[Layout, ...]

    def config_of(self, layout: Layout, model: Path) -> BatonConfig:
        """The configuration of the cluster in `layout`. Raises ConfigError naming the wrong key."""
        values = merged(self.config, layout.config, {"model": str(model), "server": {"port": 0, "grpc_port": 0}})
        if self.shape is not None:
            values = merged(values, {"engine": {"load_format": "random"}})
        try:
            return BatonConfig.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"layout {layout.name}", _first_line(error)) from None


def read_plan(file: Path) -> ServedPlan:
    """Raises ConfigError naming what is wrong in the file."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        plan = ServedPlan.model_validate(content)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("plan", f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        raise ConfigError("plan", f"{file}: {_first_line(error)}") from None
    if (plan.shape is None) == (plan.model is None):
        raise ConfigError("plan", f"{file}: give a shape or a model")
    for load in (load for layout in plan.layouts for load in layout.loads):
        if (load.rate is None) == (load.concurrency is None):
            raise ConfigError("plan", f"{file}: load {load.name!r} takes a rate or a concurrency")
    return plan


def merged(*mappings: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings put together; later ones win."""
    result: dict[str, Any] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
