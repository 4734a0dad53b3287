"""What a client sees across the seam where one worker's tokens end and another's begin: all that is not just tokens."""

from __future__ import annotations

import itertools
import os
import signal
import time
from dataclasses import replace

import pytest

from baton.chaos.load import Job, Stream
from tests.chaos.harness import Harness, Running, job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="session")]
NUM_TOKENS = 300
MAX_LOGPROB_DIFFERENCE = 1e-4  # float32: prefill and decode add in another order


def usage(stream: Stream) -> tuple[int, int]:
    return stream.prompt_tokens, stream.completion_tokens


async def killed_after(harness: Harness, one: Job, num_tokens: int) -> tuple[Running, int]:
    """The job's stream, whose decode worker is killed after so many tokens, and at which token the seam is."""
    running = harness.start(one)
    await running.tokens(num_tokens)
    worker, pid = await harness.worker_of(running, "decode")
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    stream = await running.end()
    outcomes = await harness.attempts(running)
    assert outcomes[0].startswith("failed"), outcomes
    assert outcomes[-1] == "finished", outcomes
    await harness.complete(worker)
    # One token per chunk: the seam is where the wait was longest.
    waits = [(after - before, n) for n, (before, after) in enumerate(_pairs(stream.arrivals), 1) if after > killed_at]
    return running, max(waits)[1]


def _pairs(times: list[float]) -> list[tuple[float, float]]:
    return list(itertools.pairwise(times))


async def test_a_stop_string_of_which_each_worker_made_a_part(harness: Harness) -> None:
    """The stop string is the text of some 200 tokens, and the worker dies amid them."""
    plain = job(80, NUM_TOKENS, seed=21)
    text = (await harness.client.run(plain)).text
    first, last = len(text) // 10, len(text) - 20
    stopping = replace(plain, stop=(text[first:last],))
    undisturbed = await harness.client.run(stopping)
    assert undisturbed.finish_reason == "stop"
    assert undisturbed.text == text[:first]
    running, seam = await killed_after(harness, stopping, 60)
    stream = running.stream
    print(f"{len(stream.token_ids)} tokens, the stop string begins near {NUM_TOKENS // 10}, the seam is at {seam}")
    assert NUM_TOKENS // 10 < seam < len(stream.token_ids) - 20
    assert stream.token_ids == undisturbed.token_ids
    assert (stream.text, stream.finish_reason) == (text[:first], "stop")
    assert usage(stream) == usage(undisturbed) == (80, len(stream.token_ids))


async def test_log_probabilities_of_a_sampled_stream(harness: Harness) -> None:
    one = replace(job(80, NUM_TOKENS, seed=22, temperature=0.9), logprobs=True)
    undisturbed = await harness.client.run(one)
    running, seam = await killed_after(harness, one, 60)
    await harness.check(running)
    stream = running.stream
    differences = [abs(a - b) for a, b in zip(stream.logprobs, undisturbed.logprobs, strict=True)]
    print(f"seam at {seam} of {NUM_TOKENS}: log-probabilities differ by {max(differences):.1e}")
    assert stream.token_ids == undisturbed.token_ids
    assert len(differences) == NUM_TOKENS
    assert max(differences) < MAX_LOGPROB_DIFFERENCE
    for mine, theirs in zip(stream.top_logprobs, undisturbed.top_logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=MAX_LOGPROB_DIFFERENCE)
    assert usage(stream) == usage(undisturbed) == (80, NUM_TOKENS)
