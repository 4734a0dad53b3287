"""What decode workers say of the KV they received, as Prometheus series per worker. Written on the event loop only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from protos import worker_pb2 as pb

_COUNTERS = (
    ("num_bytes", "baton_transfer_bytes", "KV bytes received"),
    ("num_chunks", "baton_transfer_chunks", "KV messages received"),
    ("num_hand_overs", "baton_transfer_hand_overs", "Hand-overs admitted"),
)
_HISTOGRAMS = (
    ("receive_posted", "baton_transfer_receive_posted_seconds", "From a chunk's announcement to its receive"),
    ("exposed", "baton_transfer_exposed_seconds", "From the end of prefill's last layer to admissible at decode"),
)


class TransferMetrics(Collector):
    """The latest totals of every attached worker that receives KV."""

    def __init__(self) -> None:
        self._totals: dict[str, pb.TransferTotals] = {}

    def update(self, worker_id: str, totals: pb.TransferTotals) -> None:
        self._totals[worker_id] = totals

    def remove(self, worker_id: str) -> None:
        self._totals.pop(worker_id, None)

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        for field, name, text in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["worker"])
            for worker_id, totals in self._totals.items():
                counter.add_metric([worker_id], getattr(totals, field))
            yield counter
        for field, name, text in _HISTOGRAMS:
            histogram = HistogramMetricFamily(name, text, labels=["worker"])
            for worker_id, totals in self._totals.items():
                values: pb.SecondsHistogram = getattr(totals, field)
                histogram.add_metric([worker_id], _buckets(values), values.total)
            yield histogram


def _buckets(histogram: pb.SecondsHistogram) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
