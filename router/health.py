"""Is this router alive and is it ready? Pure over the dispatcher and the registry.

Health means: it made progress lately, or has nothing to do. One worker that is lost or stuck does not make the router
unhealthy; the detail names it.
"""

from __future__ import annotations

from router.dispatcher import Dispatcher
from router.registry import Registry

STUCK_AFTER_S = 30.0


def health(dispatcher: Dispatcher, registry: Registry) -> tuple[bool, dict[str, object]]:
    """(healthy, detail). Progress is a token, an ended request, or a step of some worker."""
    last = max(dispatcher.last_progress_at, registry.last_step_at)
    age_s = 0.0 if dispatcher.is_idle else dispatcher.clock.now() - last
    healthy = age_s < STUCK_AFTER_S
    detail: dict[str, object] = {
        "status": "ok" if healthy else "stuck",
        "progress_age_s": round(age_s, 3),
        "running": dispatcher.admission.running,
        "queued": dispatcher.admission.queued,
        "draining": dispatcher.draining,
        "workers": [
            {
                "id": session.worker_id,
                "role": session.hello.role,
                "progress_age_s": round(session.beat.idle_or_progress_age_s, 3) if session.beat else None,
            }
            for session in registry.sessions
        ],
    }
    return healthy, detail


def is_ready(dispatcher: Dispatcher, registry: Registry) -> bool:
    """A decode worker is attached and new requests are taken."""
    return registry.is_ready and not dispatcher.draining


def workers(registry: Registry, now: float) -> dict[str, object]:
    """For the operator: every member, whether it is attached and if not why, and the state of every pair.

    A pair that rests, or on which one hand-over is trying whether it works again, gets no others; `failure` says why.
    """
    attached = {session.address: session for session in registry.sessions}
    members = []
    for member in registry.members:
        session = attached.get(member.address)
        entry: dict[str, object] = {"address": member.address, "role": member.role, "attached": session is not None}
        if session is None:
            entry["error"] = registry.link_error(member.address)
        else:
            snapshot = session.snapshot()
            entry |= {
                "id": session.worker_id,
                "device": session.hello.device,
                "max_model_len": session.capacity,
                "requests": snapshot.num_requests,
                "queued_prefill_tokens": snapshot.queued_prefill_tokens,
                "has_room": snapshot.has_room,
            }
        members.append(entry)
    pairs = [
        {
            "prefill": pair.prefill,
            "decode": pair.decode,
            "state": pair.state,
            "message": pair.message,
            "failures": pair.failures,
            "failure": pair.failure,
            "resting_s": round(max(pair.resting_until - now, 0.0), 3),
            "probing": pair.probing,
        }
        for pair in registry.pairs.all()
    ]
    return {"workers": members, "pairs": pairs}
