"""All measurements of one engine, as rows of a table. Each part stands alone: one that fails is a row that says why."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from benchmarks.engine.drive import DrivenEngine
from benchmarks.engine.floors import Floors
from benchmarks.engine.workloads import WORKLOADS

CONTEXTS = (512, 2048, 8192)
BATCHES = (1, 8, 32, 64, 128, 256)
PROMPTS = (512, 2048, 8192, 32768)
PROFILED = ((1, 2048), (8, 2048), (64, 2048), (256, 2048))
PROFILED_PROMPT = 8192
NUM_PREFILLS = 5

# vLLM 0.26 on one H200 with the same limits, 2026-11-21: milliseconds per decode step and to the first token, tokens/s.
PEER_DECODE_MS = {(1, 2048): 4.83, (8, 2048): 5.30, (64, 2048): 9.08, (128, 2048): 14.23, (256, 2048): 25.55}
PEER_PREFILL_MS = {512: 16.6, 2048: 52.5, 8192: 214.7}
PEER_TOKENS_S = {"mixed": 10_302, "fixed": 35_343, "spread": 5_258}


@dataclass
class Row:
    """`ratio`: floor over measured. `peer`: vLLM's figure in `unit`."""

    work: str
    value: float | None
    unit: str
    floor: float | None = None
    ratio: float | None = None
    peer: float | None = None
    details: dict[str, object] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        return asdict(self)


class Session:
    def __init__(self, engine: DrivenEngine, floors: Floors, max_tokens: int) -> None:
        self._engine = engine
        self._floors = floors
        self._max_tokens = max_tokens

    def rows(self, parts: list[str]) -> Iterator[Row]:
        for part in parts:
            yield from PARTS[part](self)

    def decode(self) -> Iterator[Row]:
        for context in CONTEXTS:
            for batch in BATCHES:
                work = f"decode, batch {batch}, context {context}"
                if batch * (context + 64) > self._max_tokens:
                    yield Row(work, None, "ms", details={"left out": f"more than the {self._max_tokens} tokens of KV"})
                    continue
                yield _guarded(work, "ms", lambda b=batch, c=context, w=work: self._decode(w, b, c))  # type: ignore[misc]

    def _decode(self, work: str, batch: int, context: int) -> Row:
        times = self._engine.decode(batch, context)
        floor = self._floors.decode(batch, context)
        device_ms = None if times.device_seconds is None else times.device_seconds * 1e3
        details: dict[str, object] = {"tokens_s": batch / times.seconds, "device_ms": device_ms}
        if times.device_seconds is not None:
            details["host_gap"] = 1 - times.device_seconds / times.seconds
        peer = PEER_DECODE_MS.get((batch, context))
        return Row(work, times.seconds * 1e3, "ms", floor * 1e3, floor / times.seconds, peer, details)

    def prefill(self) -> Iterator[Row]:
        for num_tokens in PROMPTS:
            work = f"prefill of {num_tokens}"
            yield _guarded(work, "ms", lambda n=num_tokens, w=work: self._prefill(w, n))  # type: ignore[misc]

    def _prefill(self, work: str, num_tokens: int) -> Row:
        self._engine.first_token_seconds(num_tokens)
        times = [self._engine.first_token_seconds(num_tokens) for _ in range(NUM_PREFILLS)]
        seconds = statistics.median(times)
        floor = self._floors.prefill(num_tokens)
        details: dict[str, object] = {"tokens_s": num_tokens / seconds, "all_ms": [1e3 * t for t in times]}
        return Row(work, seconds * 1e3, "ms", floor * 1e3, floor / seconds, PEER_PREFILL_MS.get(num_tokens), details)

    def throughput(self) -> Iterator[Row]:
        for name in WORKLOADS:
            yield _guarded(name, "tok/s", lambda n=name: self._throughput(n))  # type: ignore[misc]

    def _throughput(self, name: str) -> Row:
        jobs = WORKLOADS[name]()
        seconds, num_out = self._engine.run(jobs)
        num_in = sum(job.num_in for job in jobs)
        # `fixed` counts what goes in as well, as its peer's figure does.
        counted = num_out + (num_in if name == "fixed" else 0)
        details: dict[str, object] = {"seconds": seconds, "num_in": num_in, "num_out": num_out}
        return Row(name, counted / seconds, "tok/s", peer=PEER_TOKENS_S[name], details=details)

    def profile(self) -> Iterator[Row]:
        """Last: a profiler may slow down what is measured after it."""
        for batch, context in PROFILED:
            yield _guarded(
                f"profile of decode, batch {batch}, context {context}",
                "ms",
                lambda b=batch, c=context: self._profiled_decode(b, c),  # type: ignore[misc]
            )
        work = f"profile of a prefill of {PROFILED_PROMPT}"
        yield _guarded(work, "ms", lambda: _profile_row(work, self._engine.profiled_prefill(PROFILED_PROMPT)))

    def _profiled_decode(self, batch: int, context: int) -> Row:
        kernels = self._engine.decode(batch, context, profiled=True).kernels
        return _profile_row(f"profile of decode, batch {batch}, context {context}", kernels)


PARTS: dict[str, Callable[[Session], Iterator[Row]]] = {
    "decode": Session.decode,
    "prefill": Session.prefill,
    "throughput": Session.throughput,
    "profile": Session.profile,
}


def _profile_row(work: str, kernels: dict[str, float]) -> Row:
    return Row(work, sum(kernels.values()) / 1e3, "ms", details={"kernels_us": kernels})


def _guarded(work: str, unit: str, measure: Callable[[], Row]) -> Row:
    try:
        return measure()
    except RuntimeError as error:
        return Row(work, None, unit, details={"failed": str(error).splitlines()[0] if str(error) else repr(error)})
