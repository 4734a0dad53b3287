"""Which path a request takes, and on which workers. Pure: facts in, decision and its reason out.

The dispatcher calls `decide` for every attempt. The decode worker is the one with the fewest requests; whether another
worker prefills is decided by the predicted time to the first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from baton.common.config import PathPolicy
from router.types import Path


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A worker's fitted step time in seconds: base + per_prefill_token * n + per_decode_seq * m."""

    base_s: float
    per_prefill_token_s: float
    per_decode_seq_s: float


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One attached worker as the router sees it now. Lengths count tokens.

    `can_decode`: its role lets it take whole requests. `capacity`: the longest sequence that its pool and model hold.
    `has_room` is False for a while after it refused as busy. `step` is None until it has measured any.
    """

    worker_id: str
    can_decode: bool
    capacity: int
    max_num_batched_tokens: int
    step: StepTimes | None
    queued_prefill_tokens: int
    num_requests: int
    has_room: bool = True


@dataclass(frozen=True, slots=True)
class Cluster:
    """All attached workers, and the (prefill, decode) ids of every pair whose KV connection stands."""

    workers: Sequence[WorkerSnapshot]
    connected: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """`keep_local` is empty, or says why this request must not be handed over (a hand-over of it just failed)."""

    num_prompt_tokens: int
    max_tokens: int
    keep_local: str = ""


@dataclass(frozen=True, slots=True)
class Predicted:
    """Predicted seconds to the first token; None where it cannot be predicted or the path does not exist."""

    local_s: float | None = None
    remote_s: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """`worker` generates; `prefill_worker` computes the prompt first when the path is remote."""

    path: Path
    reason: str
    predicted: Predicted
    worker: str
    prefill_worker: str | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can start now. `no_worker`: none that could take it is attached, as opposed to all being full."""

    reason: str
    no_worker: bool = False


@dataclass(frozen=True, slots=True)
class _Pair:
    prefill: WorkerSnapshot
    decode: WorkerSnapshot
    predicted_s: float | None


def decide(policy: PathPolicy, facts: RequestFacts, cluster: Cluster, prefill_queue_s: float) -> Decision | Wait:
    """Choose path and workers. Unknown times and ties go local; a full prefill worker makes the request wait."""
    reference = _reference(cluster.workers)
    fitting = [w for w in cluster.workers if facts.num_prompt_tokens + facts.max_tokens <= w.capacity]
    decoders = [w for w in fitting if w.can_decode] or fitting
    if not decoders:
        return Wait("no worker that could hold this request is attached", no_worker=True)
    decoders = [w for w in decoders if w.has_room]
    if not decoders:
        return Wait("every worker refused as busy")
    local = min(decoders, key=_load)
    local_s = _first_token_s(local, facts.num_prompt_tokens, reference)
    pair = _best_pair(facts, cluster, decoders, reference)
    predicted = Predicted(local_s, pair.predicted_s if pair else None)
    keep_local = _why_local(policy, facts, pair, predicted)
    if pair is None or keep_local:
        return Decision("local", keep_local, predicted, local.worker_id)
    backlog_s = _first_token_s(pair.prefill, 0, reference)
    if backlog_s is not None and backlog_s >= prefill_queue_s:
        return Wait(f"prefill worker {pair.prefill.worker_id} has {backlog_s:.3f} s of work queued")
    reason = "remote asked for" if policy == "remote" else f"auto: {_numbers(predicted)}"
    return Decision("remote", reason, predicted, pair.decode.worker_id, pair.prefill.worker_id)


def _why_local(policy: PathPolicy, facts: RequestFacts, pair: _Pair | None, predicted: Predicted) -> str:
    """Why this request stays on one worker; empty when it is to be handed over."""
    if policy == "local":
        return "local asked for"
    if facts.keep_local:
        return facts.keep_local
    if pair is None:
        return f"{policy} asked for, no prefill worker connected"
    if policy == "remote":
        return ""
    if predicted.local_s is None or predicted.remote_s is None:
        return "auto: no step timings yet"
    return "" if predicted.remote_s < predicted.local_s else f"auto: {_numbers(predicted)}"


def _numbers(predicted: Predicted) -> str:
    return f"predicted first token after {predicted.local_s:.4f} s local, {predicted.remote_s:.4f} s remote"


def _best_pair(
    facts: RequestFacts, cluster: Cluster, decoders: Iterable[WorkerSnapshot], reference: StepTimes | None
) -> _Pair | None:
    prefillers = [w for w in cluster.workers if not w.can_decode and facts.num_prompt_tokens <= w.capacity]
    for decode in sorted(decoders, key=_load):
        pairs = [
            _Pair(prefill, decode, _remote_first_token_s(prefill, decode, facts.num_prompt_tokens, reference))
            for prefill in prefillers
            if (prefill.worker_id, decode.worker_id) in cluster.connected and prefill.has_room
        ]
        if pairs:
            return min(pairs, key=lambda pair: (pair.predicted_s or 0.0, _load(pair.prefill)))
    return None


def _reference(workers: Iterable[WorkerSnapshot]) -> StepTimes | None:
    """What is assumed of a worker that has not measured itself yet, or not with prompts: all run one model."""
    measured = [
        (not worker.step.per_prefill_token_s, worker.worker_id, worker.step) for worker in workers if worker.step
    ]
    return min(measured, key=lambda entry: entry[:2])[2] if measured else None


def _step_times(worker: WorkerSnapshot, reference: StepTimes | None) -> StepTimes | None:
    """A worker that only decodes has no cost of a prompt's token: that is not 0, but another worker's."""
    step = worker.step or reference
    if step is None or reference is None or step.per_prefill_token_s:
        return step
    return replace(step, per_prefill_token_s=reference.per_prefill_token_s)


def _first_token_s(worker: WorkerSnapshot, num_tokens: int, reference: StepTimes | None) -> float | None:
    """Seconds until `worker` has computed what it has queued and `num_tokens` more."""
    step = _step_times(worker, reference)
    if step is None:
        return None
    tokens = worker.queued_prefill_tokens + num_tokens
    steps = ceil(tokens / worker.max_num_batched_tokens)
    return steps * _decode_step_s(worker, step) + tokens * step.per_prefill_token_s


def _remote_first_token_s(
    prefill: WorkerSnapshot, decode: WorkerSnapshot, num_tokens: int, reference: StepTimes | None
) -> float | None:
    """A reservation is answered between two steps of the decode worker, so a loaded one adds a step."""
    prefill_s = _first_token_s(prefill, num_tokens, reference)
    step = _step_times(decode, reference)
    if prefill_s is None or step is None:
        return None
    return prefill_s + (_decode_step_s(decode, step) if decode.num_requests else 0.0)


def _decode_step_s(worker: WorkerSnapshot, step: StepTimes) -> float:
    return step.base_s + step.per_decode_seq_s * worker.num_requests


def _load(worker: WorkerSnapshot) -> tuple[int, int, str]:
    return worker.num_requests, worker.queued_prefill_tokens, worker.worker_id
