"""The whole configuration of a cluster: one YAML file, one pydantic model, every command line flag a key of it.

Nothing here is mutated after validation; "auto" values are resolved by pure functions that return a new object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.common.errors import ConfigError
from baton.common.yaml_file import read_yaml

Device = Literal["auto", "cuda", "cpu"]
DType = Literal["auto", "bfloat16", "float16", "float32"]
PathPolicy = Literal["local", "remote", "auto"]
LoadFormat = Literal["safetensors", "random"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerConfig(_Section):
    """Where clients reach the router, and what it accepts."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    grpc_port: int = Field(8001, ge=0, le=65535)
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    request_timeout_s: float = Field(600.0, gt=0)


class ClusterConfig(_Section):
    """How many workers of each role, and where. None: chosen from the machine (see baton.cluster.layout).

    `ray_address` None starts a Ray cluster of its own on this machine; its workers then listen on loopback only.
    Otherwise workers listen on `worker_host`, by default the address under which Ray knows their node.
    The resources are Ray custom resources that a worker of the role takes, to place it on nodes that offer them.
    """

    prefill: int | None = Field(None, ge=0)
    decode: int | None = Field(None, ge=1)
    device: Device = "auto"
    ray_address: str | None = None
    worker_host: str | None = None
    prefill_resources: dict[str, float] = {}
    decode_resources: dict[str, float] = {}
    start_timeout_s: float = Field(300.0, gt=0)
    drain_timeout_s: float = Field(30.0, ge=0)


class EngineConfig(_Section):
    """One worker's engine. Lengths count tokens.

    `overlap`: plan and launch a step while the one before still computes; None: on a GPU only. `launch_lead_s`: with
    overlap, and while a hand-over is expected, a step is launched so long before the one before should end, to take in
    what arrives meanwhile; None: at once. `decode_graphs`: run steps that only decode as captured CUDA graphs where
    there is a GPU. `prefill_graph_tokens`: the same for steps of at most so many tokens that hold a prompt or a part of
    one, whose KV is then announced at the end of the step; 0: none. `stall_timeout_s`: a worker
    whose engine has work and ends no step for so long ends its process, which is then started anew; None: never. It
    must exceed the longest step. `load_format` random: the weights are drawn, the model's directory needs none; for
    measurements.
    """

    dtype: DType = "auto"
    load_format: LoadFormat = "safetensors"
    block_size: Literal[16, 32, 64] = 16
    max_model_len: int | None = Field(None, ge=1)
    num_blocks: int | None = Field(None, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    max_num_seqs: int = Field(64, ge=1, le=1024)
    max_num_batched_tokens: int = Field(2048, ge=1)
    prefix_cache: bool = True
    overlap: bool | None = None
    launch_lead_s: float | None = Field(None, ge=0)
    stall_timeout_s: float | None = Field(None, gt=0)
    decode_graphs: bool = True
    prefill_graph_tokens: int = Field(1024, ge=0, le=4096)
    cpu_threads: int = Field(1, ge=1)


class TransferConfig(_Section):
    """The KV connection of a prefill/decode pair. Times in seconds, sizes in bytes.

    `backend` "auto" is NCCL between GPUs and gloo between CPUs; the decode worker's choice counts. `window` chunks of
    `slot_bytes` may be in flight, which is the staging memory of a pair at either end; NCCL cuts what is larger than
    32 MiB into messages of that size.
    `layer_groups`: in how many parts a prefill step's KV is announced; 0 adapts them to compute and link.
    `max_ctas` bounds the multiprocessors that NCCL takes. `num_pairs` connections of a worker are made when workers
    register, and on a GPU memory is set aside for them; further ones are made at their first hand-over.
    `peer_share`: how much of its KV a prefill worker holds at most for one decode worker while it has several.
    """

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    window: int = Field(6, ge=1, le=64)
    slot_bytes: int = Field(64 * 1024 * 1024, ge=4096, le=128 * 1024 * 1024)
    layer_groups: int = Field(0, ge=0)
    max_ctas: int = Field(2, ge=1, le=32)
    num_pairs: int = Field(4, ge=0)
    peer_share: float = Field(0.5, gt=0, le=1)
    connect_timeout_s: float = Field(20.0, gt=0)
    operation_timeout_s: float = Field(2.0, gt=0)
    lease_s: float = Field(30.0, gt=0)


class RouterConfig(_Section):
    """Dispatch, admission and liveness. Times in seconds.

    A silent worker is given up after `heartbeat_timeout_s`, noticed at most one `heartbeat_interval_s` later.
    """

    policy: PathPolicy = "auto"
    max_concurrent: int = Field(256, ge=1)
    max_queued: int = Field(1024, ge=0)
    max_attempts: int = Field(3, ge=1)
    prefill_queue_s: float = Field(0.5, gt=0)
    heartbeat_interval_s: float = Field(0.25, gt=0)
    heartbeat_timeout_s: float = Field(1.75, gt=0)
    recent_requests: int = Field(1000, ge=0)


class FaultSettings(_Section):
    """Faults of a worker's KV connections and of its routers' streams; all zero is none.

    Probabilities are per frame or per received chunk. `frame_*` act on the control frames that the worker reads from a
    peer, in their order: delay plus up to `frame_jitter_s`, loss, duplication. `bytes_per_s` slows what it sends, 0 is
    unlimited. Of received chunks `corruption` flips one bit, `stale` leaves what the slot held before, `truncation` the
    second half of that. `router_*` act on the frames that it reads from routers: delay, jitter, and a break of the
    stream (per frame), which is what loss is on a stream.
    """

    frame_delay_s: float = Field(0.0, ge=0)
    frame_jitter_s: float = Field(0.0, ge=0)
    frame_loss: float = Field(0.0, ge=0, le=1)
    frame_duplication: float = Field(0.0, ge=0, le=1)
    bytes_per_s: float = Field(0.0, ge=0)
    corruption: float = Field(0.0, ge=0, le=1)
    stale: float = Field(0.0, ge=0, le=1)
    truncation: float = Field(0.0, ge=0, le=1)
    router_delay_s: float = Field(0.0, ge=0)
    router_jitter_s: float = Field(0.0, ge=0)
    router_break: float = Field(0.0, ge=0, le=1)


class ChaosConfig(_Section):
    """For tests only: lets workers disturb their own hand-overs. Unless `enabled`, nothing can switch a fault on."""

    enabled: bool = False
    seed: int = 0
    faults: FaultSettings = FaultSettings()


class BatonConfig(_Section):
    """Everything `baton serve` needs.

    `model` is a directory in Hugging Face format, or the id of a model on the hub; then `revision` is its commit,
    branch or tag, by default the newest commit. `generation_config` "none": the sampling defaults that the model
    recommends are not used, but those of the API (its EOS ids always are). `chat_template`: a file whose jinja
    template is used instead of all that come with the model.
    """

    model: str
    revision: str | None = None
    served_model_name: str | None = None
    generation_config: Literal["auto", "none"] = "auto"
    chat_template: Path | None = None
    server: ServerConfig = ServerConfig()
    cluster: ClusterConfig = ClusterConfig()
    engine: EngineConfig = EngineConfig()
    transfer: TransferConfig = TransferConfig()
    router: RouterConfig = RouterConfig()
    chaos: ChaosConfig = ChaosConfig()

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).name


def load_config(file: Path | None, overrides: dict[str, object]) -> BatonConfig:
    """Merge a YAML file with overrides given as dotted keys ("engine.block_size"); overrides win.

    Raises ConfigError naming the first wrong key.
    """
    values = _read_values(file) if file is not None else {}
    for dotted, value in overrides.items():
        _set(values, dotted, value)
    try:
        return BatonConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(".".join(str(part) for part in first["loc"]) or "config", first["msg"]) from None


def _read_values(file: Path) -> dict[str, object]:
    content = read_yaml(file, "config")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError("config", f"{file} must hold a mapping, not a {type(content).__name__}")
    return content


def _set(values: dict[str, object], dotted: str, value: object) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        child = values.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(section, "must hold a mapping")
        values = child
    values[key] = value
