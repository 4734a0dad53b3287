"""Totals of KV transfers from heartbeats to Prometheus."""

from __future__ import annotations

from protos import worker_pb2 as pb
from router.metrics import Metrics


def beat(chunks: int) -> pb.WorkerHeartbeat:
    exposed = pb.SecondsHistogram(bounds=[0.001, 0.01], counts=[1, 2, 1], total=0.5)
    empty = pb.SecondsHistogram(bounds=[0.001], counts=[0, 0], total=0.0)
    totals = pb.TransferTotals(num_bytes=64, num_chunks=chunks, num_hand_overs=4, receive_posted=empty, exposed=exposed)
    return pb.WorkerHeartbeat(transfers=totals)


def test_the_latest_totals_of_each_worker_are_shown() -> None:
    metrics = Metrics()
    metrics.on_worker("d", "decode")
    metrics.on_heartbeat("d", beat(5))
    metrics.on_heartbeat("d", beat(6))
    metrics.on_heartbeat("p", pb.WorkerHeartbeat())
    text = metrics.render().decode()
    assert 'baton_transfer_chunks_total{worker="d"} 6.0' in text
    assert 'baton_transfer_exposed_seconds_bucket{le="0.01",worker="d"} 3.0' in text
    assert 'baton_transfer_exposed_seconds_count{worker="d"} 4.0' in text
    assert 'baton_transfer_exposed_seconds_sum{worker="d"} 0.5' in text
    assert 'baton_transfer_chunks_total{worker="p"}' not in text


def test_a_lost_worker_takes_its_series_with_it() -> None:
    metrics = Metrics()
    metrics.on_worker("d", "decode")
    metrics.on_heartbeat("d", beat(5))
    metrics.on_worker_lost("d", "decode")
    assert 'worker="d"' not in metrics.render().decode()
