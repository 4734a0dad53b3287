"""Any order of commands, steps and faults: every token is what the request would draw alone, and no block gets lost.

Fresh blocks hold NaN, so KV that is read before it is written shows as a failure; KV that another request has written
over shows as another token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.common.sampling import SamplingParams
from baton.engine.ports import Abort, Admission, Refusal, Release, Reservation, Reserve
from baton.engine.request import Request
from tests.support.engine_harness import Harness, make_harness, make_request, random_prompt
from tests.support.tiny_model import make_tiny_llama

BLOCK = 16
MAX_TOKENS = 24
SHARED = random_prompt(64, seed=99)
PROMPTS = (SHARED[:1], SHARED[:16], SHARED[:17], SHARED[:40], SHARED, [*SHARED[:32], *random_prompt(18, seed=1)])
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"temperature": 1.0, "seed": 6, "choice": 2, "frequency_penalty": 0.5},
)
FAULT = "an injected fault"
_models: list[Path] = []

prompts = st.integers(0, len(PROMPTS) - 1)
samplings = st.integers(0, len(SAMPLINGS) - 1)
lengths = st.integers(1, MAX_TOKENS)
picks = st.integers(0, 10**6)


@pytest.fixture(scope="module", autouse=True)
def _model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)
    _models.append(make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2))
    yield
    _models.clear()


@cache
def alone(prompt: int, sampling: int) -> tuple[int, ...]:
    """All tokens that a request may ever draw, by an engine that serves nothing else."""
    params = SamplingParams(max_tokens=MAX_TOKENS, **SAMPLINGS[sampling])
    return tuple(make_harness(_models[-1]).generate(make_request("r", PROMPTS[prompt], params))["r"])


@cache
def kv_of(prompt: int) -> torch.Tensor:
    """[num_layers, 2, num_blocks, ...] as a prefill worker would send it; what is not of the prompt stays NaN."""
    harness = make_harness(_models[-1], prefix_cache=False)
    request = make_request("r", PROMPTS[prompt], SamplingParams(max_tokens=2, temperature=0.0), hand_over=True)
    harness.add(request)
    harness.run()
    return harness.engine.kv_cache[:, :, request.block_table].clone()


class EngineMachine(RuleBasedStateMachine):
    """`live`: prompt and sampling of every request that was added. `leases`: prompts of reservations."""

    @initialize(
        overlap=st.booleans(),
        prefix_cache=st.booleans(),
        num_blocks=st.sampled_from((16, 20, 40)),
        max_num_seqs=st.integers(1, 5),
        budget=st.sampled_from((7, 24, 64)),
    )
    def make(self, overlap: bool, prefix_cache: bool, num_blocks: int, max_num_seqs: int, budget: int) -> None:
        self.harness: Harness = make_harness(
            _models[-1],
            overlap=overlap,
            prefix_cache=prefix_cache,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
        )
        self.runner: Any = self.harness.engine._runner
        self.launch: Any = self.runner.launch
        self.live: dict[str, tuple[int, int]] = {}
        self.requests: dict[str, Request] = {}
        self.hand_overs: list[str] = []
        self.leases: dict[str, tuple[int, int, Reservation | None]] = {}
        self.number = 0

    def _name(self, kind: str) -> str:
        self.number += 1
        return f"{kind}{self.number}"

    def _request(self, name: str, prompt: int, sampling: int, max_tokens: int, **fields: object) -> Request:
        params = SamplingParams(max_tokens=max_tokens, **SAMPLINGS[sampling])
        request = make_request(name, PROMPTS[prompt], params, **fields)
        self.live[name], self.requests[name] = (prompt, sampling), request
        return request

    # ---- commands

    @rule(prompt=prompts, sampling=samplings, max_tokens=lengths)
    def add(self, prompt: int, sampling: int, max_tokens: int) -> None:
        self.harness.add(self._request(self._name("r"), prompt, sampling, max_tokens))

    @precondition(lambda self: bool(self.live))
    @rule(pick=picks, sampling=samplings, max_tokens=lengths)
    def fork(self, pick: int, sampling: int, max_tokens: int) -> None:
        parent = list(self.live)[pick % len(self.live)]
        self.harness.add(self._request(self._name("f"), self.live[parent][0], sampling, max_tokens, fork_of=parent))

    @rule(prompt=prompts, sampling=samplings, skip=st.booleans())
    def hand_over(self, prompt: int, sampling: int, skip: bool) -> None:
        name = self._name("h")
        first = len(PROMPTS[prompt]) // BLOCK if skip else 0
        request = self._request(name, prompt, sampling, MAX_TOKENS, hand_over=True, first_block_to_send=first)
        self.harness.add(request)
        self.hand_overs.append(name)

    @rule(prompt=prompts, max_tokens=lengths)
    def reserve(self, prompt: int, max_tokens: int) -> None:
        name = self._name("lease")
        self.leases[name] = (prompt, max_tokens, None)

        def reply(answer: Reservation | Refusal) -> None:
            if isinstance(answer, Refusal):
                del self.leases[name]
            else:
                self.leases[name] = (prompt, max_tokens, answer)

        self.harness.post(Reserve(name, PROMPTS[prompt], len(PROMPTS[prompt]) + max_tokens, reply))

    @precondition(lambda self: any(answer is not None for *_, answer in self.leases.values()))
    @rule(pick=picks, sampling=samplings)
    def admit(self, pick: int, sampling: int) -> None:
        """All of the prompt's KV that was not cached has arrived."""
        ready = [name for name, (*_, answer) in self.leases.items() if answer is not None]
        lease = ready[pick % len(ready)]
        prompt, max_tokens, answer = self.leases.pop(lease)
        assert answer is not None
        blocks = list(answer.block_table[answer.first_block :])
        self.harness.engine.kv_cache[:, :, blocks] = kv_of(prompt)[:, :, answer.first_block :]
        request = self._request(self._name("a"), prompt, sampling, max_tokens)
        self.harness.post(Admission(lease, request, alone(prompt, sampling)[0]))

    @precondition(lambda self: bool(self.leases))
    @rule(pick=picks)
    def expire(self, pick: int) -> None:
        """Also before the engine has answered."""
        name = list(self.leases)[pick % len(self.leases)]
        if self.leases[name][2] is not None:
            del self.leases[name]
            self.harness.post(Release(name))

    @precondition(lambda self: bool(self.hand_overs))
    @rule(pick=picks, abort=st.booleans())
    def release(self, pick: int, abort: bool) -> None:
        name = self.hand_overs.pop(pick % len(self.hand_overs))
        self.harness.post(*([Abort(name)] if abort else []), Release(name))

    @precondition(lambda self: bool(self.live))
    @rule(pick=picks)
    def abort(self, pick: int) -> None:
        self.harness.post(Abort(list(self.live)[pick % len(self.live)]))

    # ---- time

    @rule(count=st.integers(1, 6))
    def turn(self, count: int) -> None:
        for _ in range(count):
            self.harness.turn()

    @rule()
    def failed_launch(self) -> None:
        self.harness.engine._failures_in_a_row = 0  # ten of them would end the engine
        self.runner.launch = lambda *_: _raise()
        self.harness.turn()
        self.runner.launch = self.launch

    @rule()
    def failed_landing(self) -> None:
        """What the device says when the step's tokens are fetched."""
        self.harness.engine._failures_in_a_row = 0

        def launch(*args: Any) -> Any:
            launched = self.launch(*args)
            launched.tokens.wait = _raise
            return launched

        self.runner.launch = launch
        self.harness.turn()
        self.runner.launch = self.launch

    # ---- what must hold

    @invariant()
    def blocks_are_conserved(self) -> None:
        if not hasattr(self, "harness"):
            return
        counts, pool = self.harness.blocks, self.harness.engine._pool
        assert counts.free + counts.cached + counts.running + counts.leased + counts.quarantined == counts.total
        assert pool.committed <= pool.num_blocks

    @invariant()
    def tokens_are_those_of_a_request_alone(self) -> None:
        if not hasattr(self, "harness"):
            return
        ports = self.harness.ports
        for failure in ports.failures:
            assert FAULT in failure.reason, failure
        for done in ports.prefills:
            assert done.first_token == alone(*self.live[done.request_id])[0]
        for name, tokens in ports.tokens.items():
            start = ports.first_position[name]
            assert tuple(tokens) == alone(*self.live[name])[start : start + len(tokens)], name

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        self.turn(1)
        self.harness.post(*(Release(name) for name in (*self.hand_overs, *self.leases)))
        self.harness.run()
        ended = self.harness.ports.finish_reasons.keys()
        for name, tokens in self.harness.ports.tokens.items():
            if name in ended and name[0] != "a":
                assert len(tokens) == self.requests[name].sampling.max_tokens
        self.harness.assert_at_rest()
        engine = self.harness.engine
        assert engine._pool.committed == 0
        assert not engine._pool._holdings
        assert not engine._scheduler._seats  # type: ignore[attr-defined]
        for known in (engine._book._requests, engine._book._reserved, engine._book._retiring):
            assert not known


def _raise() -> Any:
    raise RuntimeError(FAULT)


EngineMachine.TestCase.settings = settings(
    max_examples=20, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestEngine = EngineMachine.TestCase
