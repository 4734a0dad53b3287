"""The workers of one run and the requests that the bench sends through them. Asyncio thread of the bench."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.shapes import write_shape
from benchmarks.transfer.children import Child, gpus
from benchmarks.transfer.figures import HandOver, hand_over, merged_hops
from benchmarks.transfer.router_stream import WorkerStream
from protos import worker_pb2 as pb

ROLES = {"decode": "decode", "stream": "prefill", "bulk": "prefill"}
OUTPUT_TOKENS = 2
_START_S = 300.0
_REST_S = 30.0
_SPARE_BLOCKS = 64


@dataclass(frozen=True)
class Options:
    """One run. `tokens`: prompt lengths; `repeats` of each. `batch` sequences decode around `context` tokens."""

    shape: str
    device: str
    backend: str
    dtype: str
    tokens: tuple[int, ...]
    repeats: int
    batch: int
    context: int
    block_size: int
    prefill_budget: int
    layer_groups: int
    window: int
    slot_bytes: int
    max_ctas: int
    window_s: float
    hops: bool

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def batch_tokens(self) -> int:
        """Tokens that each sequence of the batch may grow by: more than the steps of all windows."""
        return max(256, int(self.window_s * (1500 if self.device == "cuda" else 4000)))

    def config(self, name: str, model: Path) -> dict[str, Any]:
        """The worker's whole configuration. `bulk` announces all layers at once and computes long prompts in one."""
        longest = max(self.tokens) + OUTPUT_TOKENS
        blocks = -(-longest // self.block_size) + _SPARE_BLOCKS
        engine: dict[str, Any] = {
            "dtype": self.dtype,
            "block_size": self.block_size,
            "max_model_len": max(longest, self.context + self.batch_tokens),
            "max_num_seqs": 4,
            "max_num_batched_tokens": self.prefill_budget,
            "prefix_cache": name == "bulk",
            "num_blocks": 2 * blocks,
        }
        if name == "decode":
            per_sequence = -(-(self.context + self.batch_tokens) // self.block_size)
            engine |= {"max_num_seqs": self.batch + 8, "num_blocks": 2 * blocks + self.batch * per_sequence}
        if name == "bulk":
            engine["max_num_batched_tokens"] = max(self.prefill_budget, min(longest, 32768))
        engine["num_blocks"] = max(engine["num_blocks"], -(-engine["max_model_len"] // self.block_size))
        transfer = {
            "backend": self.backend,
            "window": self.window,
            "slot_bytes": self.slot_bytes,
            "max_ctas": self.max_ctas,
            "layer_groups": 1 if name == "bulk" else self.layer_groups,
        }
        cluster = {"device": self.device, "worker_host": "127.0.0.1"}
        return {"model": str(model), "engine": engine, "transfer": transfer, "cluster": cluster}


class Session:
    """Three workers: `decode`, and two prefill workers on one other GPU, of which `stream` hands over layer group by
    layer group and `bulk` everything at once, after the compute."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.children: dict[str, Child] = {}
        self.streams: dict[str, WorkerStream] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.raw_rates: dict[int, float] = {}  # bytes per second by message size, once measured
        self._has_store = self._has_raw = False
        self._names = itertools.count()
        self._numbers = random.Random(1)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Session]:
        """Workers up and attached, not connected with each other."""
        async with contextlib.AsyncExitStack() as stack:
            model = write_shape(self.options.shape, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            await asyncio.gather(*(self._start(name, model, stack) for name in ROLES))
            for name in ROLES:
                self.streams[name] = await stack.enter_async_context(
                    WorkerStream(self.about[name]["address"], f"bench-{name}")
                )
            yield self

    async def _start(self, name: str, model: Path, stack: contextlib.AsyncExitStack) -> None:
        gpu = self._gpu(name)
        child = await Child.start(name, ROLES[name], gpu)
        stack.push_async_callback(child.end)
        self.children[name] = child
        config = self.options.config(name, model)
        self.about[name] = await child.ask(
            "start", _START_S, config=config, max_ctas=self.options.max_ctas, hops=self.options.hops
        )

    def _gpu(self, name: str) -> str | None:
        if self.options.device == "cpu":
            return None
        return gpus()[0 if ROLES[name] == "prefill" else len(gpus()) > 1]

    # ---- requests

    def spec(self, num_tokens: int, max_tokens: int = OUTPUT_TOKENS) -> pb.RequestSpec:
        prompt = self._numbers.choices(range(self.options.vocab_size), k=num_tokens)
        return pb.RequestSpec(token_ids=prompt, max_tokens=max_tokens, top_p=1.0)

    async def connect(self, sender: str) -> float:
        """Seconds until the pair is connected."""
        decode = self.about["decode"]
        return await self.streams[sender].connect(decode["worker_id"], decode["transfer_address"], 60.0)

    async def hand_over(self, sender: str, spec: pb.RequestSpec) -> str:
        """One hand-over to its end; the name under which the workers noted it."""
        name = f"{sender}-{next(self._names)}"
        reserved = await self.streams["decode"].open(name, spec, self.about[sender]["worker_id"])
        await self.streams[sender].prefill(name, spec, self.about["decode"]["worker_id"], reserved)
        await self.streams["decode"].finished(name)
        return name

    async def measured(self, sender: str, specs: Sequence[pb.RequestSpec]) -> tuple[list[HandOver], dict[str, Any]]:
        """Hand-overs one after the other, and decode's log of them. The sender must be idle.

        `cpu_us` in the log: of each end's asyncio thread and of its process, per chunk.
        """
        await self.children[sender].ask("reset")
        await self.children["decode"].ask("clear_log")
        names = [await self.hand_over(sender, spec) for spec in specs]
        sent, taken = await asyncio.gather(self.children[sender].ask("log"), self.children["decode"].ask("log"))
        count = max(1, len(taken["chunks"]))
        taken["cpu_us"] = {
            f"{end} {part}": round(1e6 * seconds / count, 1)
            for end, log in (("prefill", sent), ("decode", taken))
            for part, seconds in log["cpu"].items()
        }
        taken["hops"] = merged_hops(sent, taken)
        return [hand_over(sent["requests"][name], taken["requests"][name]) for name in names], taken

    @contextlib.asynccontextmanager
    async def batch(self) -> AsyncIterator[None]:
        """Inside, `options.batch` sequences decode."""
        options, decode = self.options, self.streams["decode"]
        names = [f"batch-{next(self._names)}" for _ in range(options.batch)]
        for name in names:
            await decode.generate(name, self.spec(options.context, options.batch_tokens))
        for name in names:
            await decode.first_token(name)
        try:
            yield
        finally:
            for name in names:
                await decode.cancel(name)
            await self.at_rest()

    async def at_rest(self) -> None:
        """Wait until decode runs nothing. Raises TimeoutError."""
        async with asyncio.timeout(_REST_S):
            while True:
                health = await self.children["decode"].ask("health")
                if not health["num_running"] and not health["num_waiting"]:
                    return
                await asyncio.sleep(0.05)

    # ---- further pairs between `decode` and `stream`

    async def both(self, call: str, **arguments: Any) -> list[Any]:
        """Ask both ends at once."""
        return list(
            await asyncio.gather(*(self.children[name].ask(call, **arguments) for name in ("decode", "stream")))
        )

    async def meet(self) -> None:
        """Both ends share a store of the bench's own."""
        if not self._has_store:
            where = await self.children["decode"].ask("open_store")
            await self.both("join_store", **where)
            self._has_store = True

    async def raw_link(self) -> None:
        """Both ends have a pair of torch's own."""
        if not self._has_raw:
            await self.meet()
            await self.both("raw_join", name="raw")
            self._has_raw = True
