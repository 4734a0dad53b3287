"""The measurements of the transfer bench, each as rows of its table. A part that fails is a row that says why."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Callable
from typing import Any

from benchmarks.transfer.children import ProbeFailed
from benchmarks.transfer.figures import Row, percentiles, phases
from benchmarks.transfer.session import Session
from benchmarks.transfer.steps import steps
from kv_transfer.nccl import MESSAGE_BYTES

MIB = 1 << 20
RAW_MIN_BYTES = 256 * MIB
LONGEST_BESIDE_BATCH = 32768
LONGEST_QUICK = 8192
PACKED_LAYERS = 4
STREAMING = {"stream": "layer groups", "bulk": "after the compute"}
Part = Callable[[Session], AsyncIterator[Row]]


async def setup(session: Session) -> AsyncIterator[Row]:
    """Connects the workers' pairs, one after the other. Always the first part."""
    staging = session.options.window * session.options.slot_bytes
    for number, sender in enumerate(STREAMING):
        before = [await session.children[name].ask("memory") for name in ("decode", sender)]
        seconds = await session.connect(sender)
        after = [await session.children[name].ask("memory") for name in ("decode", sender)]
        which = "first" if number == 0 else "next"
        taken = [b - a - staging for b, a in zip(before, after, strict=True)]
        yield Row(f"pair set-up, {which} of decode", seconds, "s")
        if any(before):
            details = {"decode": taken[0] / MIB, "prefill": taken[1] / MIB, "staging": staging / MIB}
            yield Row(f"memory of the {which} pair beside staging", max(taken) / MIB, "MiB", details=details)


async def raw(session: Session) -> AsyncIterator[Row]:
    """One group of torch's own beside ours, with messages of a slot."""
    await session.meet()
    await session.raw_link()
    size = min(session.options.slot_bytes, MESSAGE_BYTES)
    for num_bytes in sorted({size, *(_message_bytes(session, tokens) for tokens in session.options.tokens)}):
        count = max(4, min(RAW_MIN_BYTES, _kv_bytes(session, max(session.options.tokens))) // num_bytes)
        seconds = min([max(await session.both("raw_move", count=count, num_bytes=num_bytes)) for _ in range(3)])
        session.raw_rates[num_bytes] = count * num_bytes / seconds
        details = {"messages": count, "seconds": seconds}
        yield Row(f"raw, messages of {_size(num_bytes)}", session.raw_rates[num_bytes] / 1e9, "GB/s", details=details)


async def packing(session: Session) -> AsyncIterator[Row]:
    """Of one full slot at each end, while nothing else runs."""
    group = min(PACKED_LAYERS, session.about["stream"]["num_layers"])
    for name, calls in (("stream", ("pack", "gather")), ("decode", ("unpack", "scatter"))):
        times = await session.children[name].ask("pack_seconds", layers=group)
        ours, bare = (times[f"{call}_call"] for call in calls)
        rate = session.raw_rates.get(min(session.options.slot_bytes, MESSAGE_BYTES))
        details: dict[str, Any] = {f"{calls[1]}_us": bare * 1e6, "bytes": times["bytes"], "layers": group}
        if rate is not None:
            details["send_us"] = times["bytes"] / rate * 1e6
            details["share_of_send"] = ours / (times["bytes"] / rate)
            details["fingerprint_share_of_send"] = (ours - bare) / (times["bytes"] / rate)
        yield Row(f"{calls[0]} with fingerprints, one slot", ours * 1e6, "us", details=details)


async def idle(session: Session) -> AsyncIterator[Row]:
    """Hand-overs while decode has nothing else to do."""
    async for row in _idle(session, [n for n in session.options.tokens if n <= LONGEST_QUICK]):
        yield row


async def batch(session: Session) -> AsyncIterator[Row]:
    """Hand-overs while decode runs a batch."""
    delays: dict[str, list[float]] = {way: [] for way in STREAMING.values()}
    async for row in _beside_batch(session, [n for n in session.options.tokens if n <= LONGEST_QUICK]):
        (way,) = (way for way in delays if way in row.work)
        delays[way] += row.details.pop("chunk_delays")
        yield row
    for way, of_way in delays.items():
        found = percentiles(of_way)
        is_served = way == STREAMING["stream"]  # the other is here to compare with: its chunks come in bursts
        yield Row(
            f"Chunk received to receive posted, decoding, {way}, p99",
            found["p99"] * 1e3,
            "ms",
            at_most=2.0 if is_served else None,
            wanted=1.0 if is_served else None,
            details={name: value * 1e3 for name, value in found.items()} | {"chunks": len(of_way)},
        )


async def long(session: Session) -> AsyncIterator[Row]:
    """The same for prompts that take seconds each. The last part."""
    lengths = [n for n in session.options.tokens if n > LONGEST_QUICK]
    async for row in _idle(session, lengths):
        yield row
    async for row in _beside_batch(session, [n for n in lengths if n <= LONGEST_BESIDE_BATCH]):
        row.details.pop("chunk_delays")
        yield row


async def _idle(session: Session, lengths: list[int]) -> AsyncIterator[Row]:
    for tokens in lengths:
        for sender in STREAMING:
            row = await _exposed(session, sender, tokens, "decode idle")
            row.details.pop("chunk_delays")
            yield row
        yield await _bulk(session, tokens)


async def _beside_batch(session: Session, lengths: list[int]) -> AsyncIterator[Row]:
    if not lengths:
        return
    async with session.batch():
        for tokens in lengths:
            for sender in STREAMING:
                yield await _exposed(session, sender, tokens, f"decode at batch {session.options.batch}")


async def epochs(session: Session) -> AsyncIterator[Row]:
    """Connect, abort with a receive in flight, connect again: a pair of its own beside the workers' pairs."""
    await session.meet()
    for which in ("a further pair", "rejoin"):
        before = [await session.children[name].ask("memory") for name in ("decode", "stream")]
        seconds = await session.both("join", epoch=f"bench {which}", operation_timeout_s=3.0)
        after = [await session.children[name].ask("memory") for name in ("decode", "stream")]
        details = {"decode_mib": (before[0] - after[0]) / MIB, "prefill_mib": (before[1] - after[1]) / MIB}
        yield Row(f"connect, {which}", max(seconds), "s", details=details)
        if any(before):
            yield Row(
                f"communicator memory, {which}",
                max(details.values()),
                "MiB",
                at_most=64.0,
                details=details,
            )
        seconds = [await session.children["decode"].ask("close", with_receive=True)]
        yield Row(f"abort with a receive in flight, {which}", seconds[0], "s")
        await session.children["stream"].ask("close", with_receive=False)


PARTS: dict[str, Part] = {
    "setup": setup,
    "raw": raw,
    "idle": idle,
    "batch": batch,
    "steps": steps,
    "packing": packing,
    "epochs": epochs,
    "long": long,
}


async def rows(session: Session, names: list[str]) -> AsyncIterator[Row]:
    """The rows of the named parts, in the order of PARTS; `setup` always."""
    for name, part in PARTS.items():
        if name != "setup" and name not in names:
            continue
        try:
            async for row in part(session):
                yield row
        except (ProbeFailed, RuntimeError, TimeoutError, KeyError, TypeError, ValueError) as error:
            yield Row(name, None, "", details={"failed": f"{type(error).__name__}: {error}"})


# ---- hand-overs


async def _exposed(session: Session, sender: str, tokens: int, beside: str) -> Row:
    repeats = session.options.repeats if tokens <= LONGEST_QUICK else 2 if tokens <= LONGEST_BESIDE_BATCH else 1
    specs = [session.spec(tokens) for _ in range(repeats + 1)]
    if tokens <= LONGEST_BESIDE_BATCH:
        await session.hand_over(sender, specs[0])
    done, log = await session.measured(sender, specs[1:])
    exposed = statistics.median(one.exposed for one in done)
    prefill = statistics.median(one.prefill for one in done)
    details: dict[str, Any] = {
        "all_ms": [one.exposed * 1e3 for one in done],
        "prefill_ms": prefill * 1e3,
        "share_of_prefill": exposed / prefill,
        "boundary_ms": statistics.median(one.boundary for one in done) * 1e3,
        "span_ms": statistics.median(one.span for one in done) * 1e3,
        "bytes": done[0].num_bytes,
    }
    details["chunk_us"] = phases(log["chunks"])
    if session.options.hops:
        details["hops"] = log["hops"]
    details["chunk_delays"] = [chunk["posted_at"] - chunk["announced_at"] for chunk in log["chunks"]]
    at_most, wanted = None, None
    if sender == "stream" and tokens == 512:
        at_most, wanted = 2.0, 1.0
    if sender == "stream" and tokens == 8192:
        at_most, wanted = 0.03 * prefill * 1e3, 0.01 * prefill * 1e3
    work = f"exposed, {tokens} tokens, {STREAMING[sender]}, {beside}"
    return Row(work, exposed * 1e3, "ms", at_most=at_most, wanted=wanted, details=details)


async def _bulk(session: Session, tokens: int) -> Row:
    """All KV of a prompt lies ready: the sender has its prefix cached and computes one block."""
    spec = session.spec(tokens)
    await session.hand_over("bulk", spec)
    done, log = await session.measured("bulk", [spec] * session.options.repeats)
    num_bytes = done[0].num_bytes
    rate = num_bytes / statistics.median(one.span for one in done)
    size = _message_bytes(session, tokens)
    raw_rate = session.raw_rates.get(size)
    details = {"bytes": num_bytes, "all_ms": [one.span * 1e3 for one in done], "gb_s": rate / 1e9}
    details["cpu_us_per_chunk"] = log["cpu_us"]
    if session.options.hops:
        details["hops"] = log["hops"]
    if raw_rate is None:
        return Row(f"bulk, {tokens} tokens", rate / 1e9, "GB/s", details=details)
    details["raw_gb_s"] = raw_rate / 1e9
    work = f"bulk, {tokens} tokens, ready to admissible, of raw"
    at_least, wanted = (85.0, 95.0) if tokens >= 8192 else (None, None)
    return Row(work, 100 * rate / raw_rate, "%", at_least=at_least, wanted=wanted, details=details)


def _message_bytes(session: Session, tokens: int) -> int:
    return min(session.options.slot_bytes, MESSAGE_BYTES, _kv_bytes(session, tokens))


def _kv_bytes(session: Session, tokens: int) -> int:
    about = session.about["decode"]
    return int(-(-tokens // session.options.block_size) * about["block_bytes"])


def _size(num_bytes: int) -> str:
    return f"{num_bytes / MIB:g} MiB" if num_bytes >= MIB else f"{num_bytes / 1024:g} KiB"
