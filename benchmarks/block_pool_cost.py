"""What the blocks of one prompt cost the engine's thread, from the admission to the release.

    python -m benchmarks.block_pool_cost [--tokens N] [--repeats N]

Medians in microseconds: a prompt that nothing is cached of, and the same again, all of it cached. A hand-over's blocks
are registered and moved after its first token is drawn, which decode waits for.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

from baton.engine.block_pool import BlockPool, Use

BLOCK_SIZE = 16
NUM_BLOCKS = 20_000


def measure(num_tokens: int) -> list[dict[str, float]]:
    """Microseconds of each call, fresh and cached."""
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, prefix_cache=True)
    tokens = random.Random(num_tokens).choices(range(128_000), k=num_tokens)
    num_blocks = pool.blocks_for(num_tokens)
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: pool.open("a", num_blocks, pool.match_prefix(tokens, num_tokens - 1), Use.RUNNING),
        "grow": lambda: pool.grow("a", num_blocks),
        "register_soon": lambda: pool.register_soon("a", tokens, num_tokens),
        "register": lambda: pool.register("a", tokens, num_tokens),
        "move": lambda: pool.move("a", Use.LEASED),
        "release": lambda: pool.release("a"),
    }
    found = []
    for _ in ("fresh", "cached"):
        took = {}
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            took[name] = (time.perf_counter() - before) * 1e6
        found.append(took)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    runs = [measure(options.tokens) for _ in range(options.repeats)]
    for index, kind in enumerate(("fresh", "cached")):
        medians = {name: statistics.median(run[index][name] for run in runs) for name in runs[0][index]}
        print(kind, ", ".join(f"{name} {value:.0f}" for name, value in medians.items()))


if __name__ == "__main__":
    main()
