"""What a chaos run does: PLAN.yaml as a pydantic model. Times in seconds from the start of the load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from baton.common.config import FaultSettings
from baton.common.errors import ConfigError
from baton.common.yaml_file import read_yaml

WorkerRole = Literal["any", "prefill", "decode"]
Range = tuple[int, int]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoadPlan(_Section):
    """`concurrency` clients, each with one request at a time, until `requests` were sent and `duration_s` has passed.

    Lengths are drawn evenly from their range, both ends included. Shares of the requests: `sampled` with a temperature,
    `with_stop` with stop strings, `with_logprobs` asking for them, `cancelled` by their client amid the stream.
    `think_s`: a client's pause between two requests. `timeout_s`: a request that takes longer is lost.
    """

    requests: int = Field(100, ge=0)
    duration_s: float = Field(0.0, ge=0)
    concurrency: int = Field(8, ge=1)
    prompt_tokens: Range = (1, 200)
    output_tokens: Range = (4, 64)
    sampled: float = Field(0.3, ge=0, le=1)
    with_stop: float = Field(0.0, ge=0, le=1)
    with_logprobs: float = Field(0.0, ge=0, le=1)
    cancelled: float = Field(0.0, ge=0, le=1)
    think_s: float = Field(0.0, ge=0)
    timeout_s: float = Field(90.0, gt=0)

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> LoadPlan:
        for low, high in (self.prompt_tokens, self.output_tokens):
            if not 1 <= low <= high:
                raise ValueError(f"a range must satisfy 1 <= low <= high, got {low} to {high}")
        return self


class _Timed(_Section):
    """At `at_s`, and then every `every_s`: `count` times, or until the load ends where `count` is null."""

    at_s: float = Field(1.0, ge=0)
    every_s: float = Field(10.0, gt=0)
    count: int | None = Field(1, ge=1)


class Kill(_Timed):
    """SIGKILL to a random worker of a role."""

    kind: Literal["kill"]
    role: WorkerRole = "any"


class Pause(_Timed):
    """SIGSTOP to a random worker of a role, SIGCONT `for_s` later."""

    kind: Literal["pause"]
    role: WorkerRole = "any"
    for_s: float = Field(3.0, gt=0)


class Aborts(_Timed):
    """`clients` more requests at once, whose clients disconnect at random points."""

    kind: Literal["aborts"]
    clients: int = Field(100, ge=1)


class Inject(_Timed):
    """Disturb every worker's KV connections or routers' streams for `for_s`. `name` is the label in the report."""

    kind: Literal["inject"]
    name: str = "inject"
    settings: FaultSettings
    for_s: float = Field(5.0, gt=0)


class KillProcess(_Timed):
    """SIGKILL to Ray's GCS server, or to the cluster's controller."""

    kind: Literal["kill_gcs", "kill_controller"]


Fault = Annotated[Kill | Pause | Aborts | Inject | KillProcess, Field(discriminator="kind")]


class Limits(_Section):
    """`recover_s`: every worker attached and every pair connected again after the last fault. `at_rest_s`: I4.

    `near_tie`: a token whose logit is below the best by less than this is not wrong. The default is for float32 (I7).
    """

    recover_s: float = Field(60.0, gt=0)
    at_rest_s: float = Field(10.0, gt=0)
    near_tie: float = Field(1e-4, gt=0)


class ChaosPlan(_Section):
    """`attach`: URL of a running server; else a cluster is started from `config`, dotted keys of BatonConfig.

    `model` null is a tiny random one. With `attach` it is the directory of the model that is served there.
    """

    seed: int = 0
    model: Path | None = None
    attach: str | None = None
    config: dict[str, object] = {}
    load: LoadPlan = LoadPlan()
    faults: list[Fault] = []
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _attached_cluster_is_only_disturbed_from_outside(self) -> ChaosPlan:
        if self.attach is None:
            return self
        if self.model is None:
            raise ValueError("attach needs the directory of the served model as `model`")
        for fault in self.faults:
            if isinstance(fault, Inject | KillProcess):
                raise ValueError(f"an attached cluster takes no {fault.kind}: let chaos start one")
        return self


def load_plan(file: Path) -> ChaosPlan:
    """Raises ConfigError naming the first wrong key."""
    return checked_plan(read_yaml(file, "plan"))


def checked_plan(content: object) -> ChaosPlan:
    """Raises ConfigError naming the first wrong key."""
    try:
        return ChaosPlan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(".".join(str(part) for part in first["loc"]) or "plan", first["msg"]) from None


def label(fault: Fault) -> str:
    """The fault's row in the report."""
    match fault:
        case Kill(role=role):
            return f"kill -9 {role} worker"
        case Pause(role=role, for_s=for_s):
            return f"SIGSTOP {role} worker {for_s:g} s"
        case Aborts(clients=clients):
            return f"{clients} disconnects"
        case Inject(name=name):
            return name
        case KillProcess(kind=kind):
            return kind.replace("_", " -9 ").replace("kill -9 gcs", "kill -9 Ray GCS")
