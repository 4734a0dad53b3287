"""What receiving costs the decoding beside it: step times while something goes on, and idle ones before and after."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from benchmarks.transfer.figures import Row, step_ratio
from benchmarks.transfer.session import Session
from kv_transfer.nccl import MESSAGE_BYTES

During = Callable[[Session], Awaitable[dict[str, float]]]


async def steps(session: Session) -> AsyncIterator[Row]:
    """Decode's step time while KV arrives, beside idle steps before and after."""
    tokens = min(8192, max(session.options.tokens))
    for work, bound, during in (
        (f"receiving prompts of {tokens} from one prefill worker", 1.05, _one_prefill_worker(tokens)),
        ("a posted, unmatched receive", None, _posted_receive),
        ("receiving flat out", None, _flat_out),
    ):
        async with session.batch():
            yield await _steps(session, f"decode step, {work}", bound, during)


async def _steps(session: Session, work: str, bound: float | None, during: During) -> Row:
    decode, window_s = session.children["decode"], session.options.window_s
    await asyncio.sleep(window_s / 4)
    await decode.ask("clear_log")
    await asyncio.sleep(window_s / 2)
    begin = time.monotonic()
    detail = await during(session)
    end = time.monotonic()
    await asyncio.sleep(window_s / 2)
    log = await decode.ask("log")
    found = step_ratio(log["steps"], session.options.batch, (begin, end))
    details = {
        "idle_p50_ms": found.idle_p50 * 1e3,
        "busy_p50_ms": found.busy_p50 * 1e3,
        "busy_p99_ms": found.busy_p99 * 1e3,
        "steps": [found.num_idle, found.num_busy],
        **detail,
    }
    return Row(work, found.ratio, "x idle", at_most=bound, wanted=1.02 if bound else None, details=details)


def _one_prefill_worker(tokens: int) -> During:
    async def during(session: Session) -> dict[str, float]:
        """Hand-overs of which the next always waits, so that the sender computes without a pause."""
        sender, window_s = "stream", session.options.window_s
        specs = [session.spec(tokens) for _ in range(4)]
        started, names = time.monotonic(), []

        async def feed(offset: int) -> None:
            number = offset
            while time.monotonic() < started + window_s:
                names.append(await session.hand_over(sender, specs[number % len(specs)]))
                number += 2

        await asyncio.gather(feed(0), feed(1))
        seconds = time.monotonic() - started
        log = await session.children[sender].ask("log")
        sent = sum(size for name in names for size, _ in log["requests"][name]["written"])
        return {"prompts": len(names), "gb_s": sent / seconds / 1e9}

    return during


async def _posted_receive(session: Session) -> dict[str, float]:
    await session.raw_link()
    decode, sender = session.children["decode"], session.children["stream"]
    await decode.ask("raw_post")
    await asyncio.sleep(session.options.window_s)
    await sender.ask("raw_post")
    await asyncio.gather(decode.ask("raw_finish"), sender.ask("raw_finish"))
    return {}


async def _flat_out(session: Session) -> dict[str, float]:
    await session.raw_link()
    size, window_s = min(session.options.slot_bytes, MESSAGE_BYTES), session.options.window_s
    count = max(4, int(window_s / 4 * session.raw_rates.get(size, 1e9) / size))
    started, seconds, num_bytes = time.monotonic(), 0.0, 0
    while time.monotonic() < started + window_s:
        seconds += max(await session.both("raw_move", count=count, num_bytes=size))
        num_bytes += count * size
    return {"gb_s": num_bytes / seconds / 1e9}
