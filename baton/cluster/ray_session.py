"""Joins a Ray cluster or starts one of our own on this machine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import ray

from baton.common.config import BatonConfig
from baton.common.errors import BatonError

log = logging.getLogger(__name__)

# The object store carries nothing of ours: tokens travel over gRPC, KV over torch.distributed.
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
# Ray runs its workers at niceness 15: beside any other work a whole server would starve, heartbeats included. And it
# ends all processes of a cluster, this one too, a minute after its GCS is gone: requests need no GCS, so they go on.
_SYSTEM_CONFIG = {"worker_niceness": 0, "gcs_rpc_server_reconnect_timeout_s": 7 * 24 * 3600}


@contextlib.contextmanager
def ray_session(config: BatonConfig, show_worker_logs: bool) -> Iterator[None]:
    """Ray is up inside the block. Raises BatonError when it does not start, or `cluster.ray_address` is out of reach.

    `show_worker_logs`: what workers log appears on this process's stderr as well as in Ray's log files.
    A cluster of our own always gets `address="local"`: a plain init would attach to whatever another program left.
    """
    if config.cluster.ray_address is None:
        _start(config, show_worker_logs)
    else:
        try:
            ray.init(address=config.cluster.ray_address, logging_level=logging.ERROR, log_to_driver=show_worker_logs)
        except (ConnectionError, TimeoutError) as error:
            raise BatonError(f"cannot reach the Ray cluster at {config.cluster.ray_address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _start(config: BatonConfig, show_worker_logs: bool) -> None:
    try:
        # Logical CPUs only place actors; each takes one, however few cores the machine has.
        ray.init(
            address="local",
            num_cpus=(config.cluster.prefill or 0) + (config.cluster.decode or 0) + 8,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=show_worker_logs,
            _system_config=_SYSTEM_CONFIG,
        )
    except Exception as error:  # the class that Ray raises when a machine is too busy to start a node within 30 s
        ray.shutdown()
        raise BatonError(f"Ray did not start on this machine: {error}") from error


def count_gpus() -> int:
    """GPUs that the joined Ray cluster offers."""
    return int(ray.cluster_resources().get("GPU", 0))
