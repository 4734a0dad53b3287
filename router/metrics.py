"""Prometheus metrics of one router, on a registry of its own. Never labelled by request id or by client text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from protos import worker_pb2 as pb
from router.transfer_metrics import TransferMetrics

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 10)
_BLOCK_STATES = ("free", "cached", "running", "leased", "quarantined", "total")


class Metrics:
    """Owned by the router; written on the event loop only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests_and_tokens()
        self._latencies()
        self._workers()

    def _requests_and_tokens(self) -> None:
        registry = self.registry
        self.requests = Counter("baton_requests", "Requests that ended", ["path", "finish_reason"], registry=registry)
        self.running = Gauge("baton_requests_running", "Requests that hold a slot", registry=registry)
        self.queued = Gauge("baton_requests_queued", "Requests that wait for a slot or a worker", registry=registry)
        self.prompt_tokens = Counter("baton_prompt_tokens", "Prompt tokens of accepted requests", registry=registry)
        self.output_tokens = Counter("baton_generation_tokens", "Tokens sent to clients", registry=registry)
        self.attempts = Counter("baton_attempts", "Attempts that ended", ["path", "outcome"], registry=registry)
        self.fenced_frames = Counter(
            "baton_fenced_frames", "Worker frames about attempts that were over", registry=registry
        )
        self.ignored_fields = Counter(
            "baton_ignored_fields", "Unknown request fields that were ignored", registry=registry
        )

    def _latencies(self) -> None:
        self.ttft = Histogram(
            "baton_time_to_first_token_seconds", "Per request", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self.tpot = Histogram(
            "baton_time_per_output_token_seconds",
            "Per request: (last - first) / (n - 1)",
            ["path"],
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.itl = Histogram(
            "baton_inter_token_latency_seconds", "Per token", buckets=_TOKEN_SECONDS, registry=self.registry
        )
        self.e2e = Histogram(
            "baton_e2e_request_latency_seconds", "Per request", ["path"], buckets=_SECONDS, registry=self.registry
        )

    def _workers(self) -> None:
        registry = self.registry
        self.worker_up = Gauge("baton_worker_up", "1 while attached", ["worker", "role"], registry=registry)
        self.worker_lost = Counter("baton_worker_lost", "Attached workers that were lost", ["role"], registry=registry)
        self.blocks = Gauge("baton_kv_blocks", "KV blocks by state", ["worker", "state"], registry=registry)
        self.staging = Gauge("baton_staging_slots_in_use", "Staging slots in use", ["worker"], registry=registry)
        self.worker_running = Gauge("baton_worker_requests_running", "In the batch", ["worker"], registry=registry)
        self.worker_waiting = Gauge("baton_worker_requests_waiting", "In its queue", ["worker"], registry=registry)
        self.transfers = TransferMetrics()
        registry.register(self.transfers)

    def on_worker(self, worker_id: str, role: str) -> None:
        self.worker_up.labels(worker_id, role).set(1)

    def on_heartbeat(self, worker_id: str, beat: pb.WorkerHeartbeat) -> None:
        for state in _BLOCK_STATES:
            self.blocks.labels(worker_id, state).set(getattr(beat.blocks, state))
        self.staging.labels(worker_id).set(beat.blocks.staging_in_use)
        self.worker_running.labels(worker_id).set(beat.num_running)
        self.worker_waiting.labels(worker_id).set(beat.num_waiting)
        if beat.HasField("transfers"):
            self.transfers.update(worker_id, beat.transfers)

    def on_worker_lost(self, worker_id: str, role: str) -> None:
        """Drop the worker's series: a restarted one has a new id, and old ids must not pile up."""
        self.worker_lost.labels(role).inc()
        self.worker_up.remove_by_labels({"worker": worker_id})
        for gauge in (self.blocks, self.staging, self.worker_running, self.worker_waiting):
            gauge.remove_by_labels({"worker": worker_id})
        self.transfers.remove(worker_id)

    def render(self) -> bytes:
        return generate_latest(self.registry)
