"""The router as far as the hand-over sees it: opens, prefills, resubmits, cancels, fences.

Words from workers (`World.calls`) reach it at the end of the step that says them; its commands wait in an inbox for as
long as the search likes. A later word would only delay the commands that answer it, which the inbox does already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kv_transfer.events import AttemptKey
from kv_transfer.messages import LeaseKey
from tests.transfer.explorer.parts import (
    CancelCommand,
    Command,
    OpenCommand,
    Phase,
    PrefillCommand,
    RouterRequest,
    Violation,
)
from tests.transfer.explorer.world import TO_DECODE, TO_PREFILL, World


def active(request: RouterRequest) -> bool:
    return request.phase in (Phase.OPENING, Phase.PREFILLING)


def key_of(world: World, index: int) -> AttemptKey:
    return AttemptKey(world.model.request_names[index], world.requests[index].attempt)


def workers_of(world: World, index: int) -> tuple[int, int]:
    """The prefill and the decode worker of a request."""
    spec = world.model.config.requests[index]
    return spec.prefill, world.model.config.prefills + spec.decode


def put(world: World, index: int, request: RouterRequest) -> None:
    world.values[world.model.request_slot(index)] = request


def command(world: World, worker: int, what: Command) -> None:
    """Send it; a stream to a process that is gone swallows it."""
    index = world.model.request_index[what.key.request_id]
    role = TO_PREFILL if world.model.is_prefill(worker) else TO_DECODE
    if not world.requests[index].broken[role]:
        slot = world.model.inbox_slot(index, role)
        world.values[slot] = (*world.values[slot], what)


def open_request(world: World, index: int) -> None:
    request = world.requests[index]
    put(world, index, request._replace(phase=Phase.OPENING, base=request.emitted))
    _, decode = workers_of(world, index)
    command(world, decode, OpenCommand(key_of(world, index), request.emitted))


def _current(world: World, key: AttemptKey) -> int | None:
    """Index of the request if `key` is its attempt in progress: everything else is fenced off (I8)."""
    index = world.model.request_index[key.request_id]
    request = world.requests[index]
    return index if active(request) and request.attempt == key.attempt else None


def on_reserved(world: World, key: AttemptKey, lease: LeaseKey, first_block: int) -> None:
    index = _current(world, key)
    if index is None or world.requests[index].phase is not Phase.OPENING:
        return
    request = world.requests[index]
    put(world, index, request._replace(phase=Phase.PREFILLING))
    command(world, workers_of(world, index)[0], PrefillCommand(key, request.base, lease, first_block))


def on_failed(world: World, key: AttemptKey, worker: int) -> None:
    index = _current(world, key)
    if index is not None:
        abandon(world, index, worker, Phase.FAILED)


def abandon(world: World, index: int, informant: int | None, final: Phase) -> None:
    """Give the attempt up, tell whoever does not know, and try again unless `final` is the client's wish."""
    request = world.requests[index]
    for worker in workers_of(world, index):
        if worker != informant:
            command(world, worker, CancelCommand(key_of(world, index)))
    again = final is Phase.FAILED and request.attempt + 1 < world.model.config.attempts
    attempt = request.attempt + 1 if again else request.attempt
    put(world, index, request._replace(phase=Phase.IDLE if again else final, attempt=attempt))


def on_token(world: World, key: AttemptKey, position: int) -> None:
    index = _current(world, key)
    if index is None:
        return
    request = world.requests[index]
    if position != request.emitted:
        raise Violation(f"I8: {key} brings position {position} after {request.emitted} tokens")
    done = position + 1 == world.model.config.requests[index].tokens
    put(world, index, request._replace(emitted=position + 1, phase=Phase.OK if done else request.phase))


def on_worker_lost(world: World, index: int, role: int) -> None:
    """The router notices that the stream broke, and attaches to the successor."""
    request = world.requests[index]
    prefill, decode = request.broken
    put(world, index, request._replace(broken=(False, decode) if role == TO_PREFILL else (prefill, False)))
    if active(request):
        abandon(world, index, workers_of(world, index)[role], Phase.FAILED)


def on_crash(world: World, worker: int) -> None:
    """The stream breaks: what was on its way is gone, what is sent is swallowed until the router notices."""
    role = TO_PREFILL if world.model.is_prefill(worker) else TO_DECODE
    for index in world.model.requests_at(worker):
        request = world.requests[index]
        prefill, decode = request.broken
        put(world, index, request._replace(broken=(True, decode) if role == TO_PREFILL else (prefill, True)))
        world.values[world.model.inbox_slot(index, role)] = ()


def hear(world: World, what: str, *details: Any) -> None:
    """One word from a worker."""
    HEARD[what](world, *details)


HEARD: dict[str, Callable[..., None]] = {"reserved": on_reserved, "failed": on_failed, "token": on_token}
