"""What must hold of single components in every state. Checked once per distinct value."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from kv_transfer.decode_state import DecodeState, LeasePhase
from kv_transfer.frozen_map import FrozenTable
from kv_transfer.prefill_chunks import has_room
from kv_transfer.prefill_state import Phase, PrefillState
from kv_transfer.slots import SlotPool
from tests.transfer.explorer.config import Config
from tests.transfer.explorer.parts import DecodeEngine, PrefillEngine, Violation


def require(holds: bool, text: str) -> None:
    if not holds:
        raise Violation(text)


def check_component(config: Config, value: object) -> None:
    match value:
        case PrefillState():
            check_prefill_state(config, value)
        case DecodeState():
            check_decode_state(config, value)
        case PrefillEngine():
            check_prefill_engine(config, value)
        case DecodeEngine():
            check_decode_engine(config, value)
        case _:
            pass


def check_prefill_engine(config: Config, engine: PrefillEngine) -> None:
    held = sum(num_blocks(config, work.key.request_id) for work in engine.work if work.holds)
    require(engine.free + held == config.prefill_blocks, f"I4: {engine.free} free + {held} held")
    require(engine.free >= 0, "I4: the prefill pool is overdrawn")


def num_blocks(config: Config, request: str) -> int:
    return config.requests[int(request[1:])].num_blocks


def check_decode_engine(config: Config, engine: DecodeEngine) -> None:
    known = (engine.free, engine.elsewhere)
    held = chain(*known, *(lease.blocks for lease in engine.reserved), *(run.blocks for run in engine.running))
    blocks = sorted(held)
    require(blocks == list(range(config.decode_blocks)), f"I4: free + leased + running is {blocks}")


def check_slots(config: Config, slots: SlotPool[Any], in_use: Iterable[int]) -> None:
    """Every slot of the window is in exactly one place; a dead epoch's slot is nowhere else."""
    live = sorted([*slots.free, *in_use])
    quarantined = [slot for lost in slots.dying for slot in lost.slots]
    require(len(set(live)) == len(live), f"I1: a slot is in two places: {live}")
    if slots.window:
        require(not set(live) & set(quarantined), f"I1: slots {live} are usable, {quarantined} quarantined")
        require(set(live) | set(quarantined) >= set(range(config.window)), f"I4: a slot is lost: {live}")


def check_prefill_state(config: Config, state: PrefillState) -> None:
    for link in state.links.values():
        check_slots(config, link.slots, [flight.slot for flight in link.flights])
        require(link.next_seq - link.done_through <= max(link.slots.window, 0), "the window is exceeded")
        seqs = [flight.seq for flight in link.flights]
        require(seqs == sorted(set(seqs)), f"chunks out of order: {seqs}")
    check_aliases(state)
    for peer in state.waiting:
        require(not has_room(state.link(peer)), f"a chunk to {peer} waits though there is room")
    queued = {attempt.key for attempt in state.attempts.values() if attempt.queue}
    require(queued == {key for keys in state.waiting.values() for key in keys}, "a queue that is never served")
    for attempt in state.attempts.values():
        alive = state.link(attempt.peer).epoch is not None
        require(alive or attempt.phase is Phase.DRAINING, f"I3: {attempt.key} lives on without a connection")


def check_decode_state(config: Config, state: DecodeState) -> None:
    for link in state.links.values():
        check_slots(config, link.slots, [flight.slot for flight in link.flights if flight.slot >= 0])
        seqs = [flight.chunk.seq for flight in link.flights]
        require(seqs == list(range(link.done_through, link.next_seq)), f"chunks received out of order: {seqs}")
    check_aliases(state)
    for lease in state.leases.values():
        alive = state.link(lease.peer).epoch is not None
        require(alive or lease.phase is LeasePhase.DRAINING, f"I3: lease of {lease.key} lives on without a connection")


def check_aliases(state: PrefillState | DecodeState) -> None:
    aliases = {holder.alias: name for name, holder in state.holders.items()}
    require(state.aliases == FrozenTable(aliases), f"{state.aliases} are aliases of {aliases}")


def check_deadlines(world: Any, workers: Iterable[int]) -> None:
    """No lease or attempt outlives the deadline that its first command brought, whatever is heard later."""
    for worker in workers:
        first = dict(world.engine(worker).deadlines)
        for holder in world.state(worker).holders.values():
            if holder.deadline > first[holder.key]:
                raise Violation(f"I3: the deadline of {holder.key} was put off")
