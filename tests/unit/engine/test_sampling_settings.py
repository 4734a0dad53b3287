"""Sampling settings in the running engine: against transformers' generate, in company, with overlap, handed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from baton.common.sampling import SamplingParams
from baton.engine.ports import Admission
from baton.engine.request import Request
from tests.support.engine_harness import Harness, RecordingPorts, greedy, make_harness, make_request, random_prompt
from tests.support.tiny_model import make_tiny_llama

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 0.0, "frequency_penalty": 0.8, "presence_penalty": -0.3},
    {"temperature": 1.2, "seed": 5, "min_p": 0.02, "repetition_penalty": 1.1},
    {"temperature": 0.8, "seed": 6, "logit_bias": ((3, 5.0), (200, -9.0)), "top_p": 0.9},
    {"temperature": 0.7, "seed": 7, "min_tokens": 12, "stop_token_ids": frozenset(range(0, 258, 3))},
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2)


def wanting(name: str, prompt: list[int], max_tokens: int, params: dict[str, Any], **fields: Any) -> Request:
    return make_request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), **fields)


def generate(model_dir: Path, prompt: list[int], **settings: Any) -> list[int]:
    model: Any = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    out = model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0, **settings)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def test_a_repetition_penalty_is_that_of_transformers(model_dir: Path) -> None:
    prompt = random_prompt(30)
    params = {"temperature": 0.0, "repetition_penalty": 1.5}
    tokens = make_harness(model_dir).generate(wanting("a", prompt, 64, params))["a"]
    assert tokens == generate(model_dir, prompt, max_new_tokens=64, repetition_penalty=1.5)
    assert tokens != make_harness(model_dir).generate(greedy("b", prompt, 64))["b"]


def test_min_tokens_is_min_new_tokens_of_transformers(model_dir: Path) -> None:
    prompt = random_prompt(30)
    plain = make_harness(model_dir).generate(greedy("a", prompt, 20))["a"]
    eos = plain[3]
    for least in (0, plain.index(eos), plain.index(eos) + 1, 15):
        params = {"temperature": 0.0, "min_tokens": least, "stop_token_ids": frozenset({eos})}
        tokens = make_harness(model_dir).generate(wanting("a", prompt, 40, params))["a"]
        expected = generate(model_dir, prompt, max_new_tokens=40, min_new_tokens=least, eos_token_id=eos)
        assert tokens == expected
        assert eos not in tokens[:least]


def test_company_and_overlap_change_nothing(model_dir: Path) -> None:
    def requests() -> list[Request]:
        return [wanting(f"r{n}", random_prompt(9 + 13 * n, seed=n), 40, params) for n, params in enumerate(SETTINGS)]

    alone = {r.request_id: make_harness(model_dir).generate(r)[r.request_id] for r in requests()}
    for overlap in (False, True):
        company = [greedy(f"g{n}", random_prompt(40, seed=n), 30 + n) for n in range(3)]
        harness = make_harness(model_dir, overlap=overlap, max_num_batched_tokens=24)
        together = harness.generate(*requests(), *company)
        assert {name: together[name] for name in alone} == alone
        harness.assert_at_rest()
    for request in requests():
        s = request.sampling
        unset = {"temperature": s.temperature, "seed": s.seed}
        bare = wanting("bare", request.token_ids, 40, unset)
        assert make_harness(model_dir).generate(bare)["bare"] != alone[request.request_id]


@pytest.mark.parametrize(
    ("params", "overlap"), [*((params, True) for params in SETTINGS), (SETTINGS[1], False), (SETTINGS[4], False)]
)
def test_a_first_token_from_elsewhere_counts_as_output(model_dir: Path, params: dict[str, Any], overlap: bool) -> None:
    """The first token is drawn by another engine, which the admission brings along."""
    prompt = random_prompt(40)
    harness = make_harness(model_dir)
    whole = harness.generate(wanting("whole", prompt, 20, params))["whole"]
    harness.add(wanting("prefill", prompt, 20, params, hand_over=True))
    harness.run()
    assert [done.first_token for done in harness.ports.prefills] == whole[:1]
    decode = make_harness(model_dir, overlap=overlap)
    decode.generate(greedy("fills the cache", prompt, 1))
    reservation = decode.reserve("lease", prompt, len(prompt) + 20)
    sent = harness.engine.kv_cache[:, :, blocks_of(harness.ports)]
    decode.engine.kv_cache[:, :, list(reservation.block_table)] = sent
    decode.post(Admission("lease", wanting("a", prompt, 20, params), whole[0]))
    decode.run()
    assert [whole[0], *decode.ports.tokens["a"]] == whole


def blocks_of(ports: RecordingPorts) -> list[int]:
    """The physical blocks of the one hand-over, in logical order."""
    segments = sorted((s for s in ports.segments if s.layer_start == 0), key=lambda s: s.block_start)
    return [block for segment in segments for block in segment.block_ids]


def test_later_choices_share_the_prompt_of_the_first_and_draw_their_own(model_dir: Path) -> None:
    prompt = random_prompt(40)

    def choice(number: int) -> Request:
        return wanting(f"c{number}", prompt, 20, {"temperature": 1.0, "seed": 9, "choice": number})

    alone = [make_harness(model_dir).generate(choice(n))[f"c{n}"] for n in range(4)]
    assert len({tuple(tokens) for tokens in alone}) == 4
    assert len({tokens[0] for tokens in alone}) > 1
    for overlap in (False, True):
        harness = make_harness(model_dir, overlap=overlap)
        requests = [choice(n) for n in range(4)]
        begin(harness, requests[0])
        before = harness.blocks.running
        harness.add(*requests[1:])
        harness.turn()
        assert [request.num_cached_tokens for request in requests] == [0, 32, 32, 32]
        assert harness.blocks.running == before + 3
        harness.run()
        assert [harness.ports.tokens[f"c{n}"] for n in range(4)] == alone
        harness.assert_at_rest()


def begin(harness: Harness, request: Request) -> None:
    harness.add(request)
    harness.run(until=lambda: bool(harness.ports.tokens[request.request_id]))
