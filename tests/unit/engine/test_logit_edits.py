"""Penalties, bias and the mask of early stop tokens: against the definition, spelt out token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from baton.common.sampling import SamplingParams
from baton.engine.logit_edits import LogitEditor
from baton.engine.request import Request
from baton.engine.sampler import sample, sampling_rows
from tests.unit.engine.test_sampler import draw_many

CPU = torch.device("cpu")
VOCAB = 40
NO_DRAWS = torch.zeros(0, dtype=torch.int64)


def a_request(token_ids: Sequence[int], num_emitted: int = 0, **params: Any) -> Request:
    sampling = SamplingParams(max_tokens=50, **params)
    return Request("a", list(token_ids), sampling, 0.0, num_emitted=num_emitted)


def edit(logits: torch.Tensor, *requests: Request, editor: LogitEditor | None = None) -> torch.Tensor:
    return (editor or LogitEditor()).edit(logits, requests, [len(r.token_ids) for r in requests], NO_DRAWS)


def spelt_out(logits: list[float], prompt: Sequence[int], output: Sequence[int], s: SamplingParams) -> list[float]:
    result = []
    for token, value in enumerate(logits):
        if token in prompt or token in output:
            value = value / s.repetition_penalty if value > 0 else value * s.repetition_penalty
        value -= s.frequency_penalty * output.count(token) + s.presence_penalty * (token in output)
        value += dict(s.logit_bias).get(token, 0.0)
        if len(output) < s.min_tokens and token in s.stop_token_ids:
            value = -math.inf
        result.append(value)
    return result


SETTINGS: list[dict[str, object]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.75},
    {"logit_bias": ((3, 100.0), (7, -2.5))},
    {"min_tokens": 6, "stop_token_ids": frozenset({1, 3, 999})},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.3,
        "logit_bias": ((1, 4.0), (2, -4.0)),
        "min_tokens": 6,
        "stop_token_ids": frozenset({1}),
    },
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_each_setting_and_all_together(settings: dict[str, Any]) -> None:
    prompt, output = [1, 2, 2, 5, 39], [2, 7, 7, 7, 0]
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    request = a_request(prompt, **settings)
    request.token_ids += output
    expected = spelt_out(logits[0].tolist(), prompt, output, request.sampling)
    before = logits.clone()
    torch.testing.assert_close(edit(logits, request)[0], torch.tensor(expected))
    assert torch.equal(logits, before)  # log-probabilities are those of the model


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))
    tokens = [4, 4, 9, 30]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), logits.clone())
    torch.testing.assert_close(edit(logits, a_request(tokens, repetition_penalty=1.3)), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_another_attempt_goes_on_as_the_first_would(settings: dict[str, Any]) -> None:
    """What was emitted comes back as the end of the prompt, and counts as output."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    first = a_request([1, 2, 3], **settings)
    first.token_ids += [7, 7, 1]
    min_tokens = first.sampling.min_tokens
    left = {**settings, "min_tokens": max(0, min_tokens - 2)}  # the router subtracts what was emitted
    second = a_request([1, 2, 3, 7, 7], num_emitted=2, **left)
    second.token_ids += [1]
    assert torch.equal(edit(logits, first), edit(logits, second))


def test_a_request_is_followed_from_step_to_step_and_rows_do_not_mix() -> None:
    editor = LogitEditor()
    generator = torch.Generator().manual_seed(4)
    requests = [
        a_request([1, 2], presence_penalty=1.0),
        a_request([3]),
        a_request([2, 2], repetition_penalty=2.0, frequency_penalty=0.5),
    ]
    for _ in range(5):
        logits = torch.randn(3, VOCAB, generator=generator)
        edited = edit(logits, *requests, editor=editor)
        assert torch.equal(edited[1], logits[1])
        for row, request in enumerate(requests):
            prompt, output = (
                request.token_ids[: request.num_prompt_tokens],
                request.token_ids[request.num_prompt_tokens :],
            )
            expected = spelt_out(logits[row].tolist(), prompt, output, request.sampling)
            torch.testing.assert_close(edited[row], torch.tensor(expected))
            request.token_ids.append(int(edited[row].argmax()))
    requests[0].token_ids += [5, 5]
    with pytest.raises(RuntimeError, match="knows 9 of the 8 tokens"):
        editor.edit(logits, requests[:1], [8], NO_DRAWS)


def test_a_token_that_only_the_draws_know_counts_once() -> None:
    """Each step is drawn before the token of the one before is known; the host learns of it one step later."""
    settings: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    prompt, generator = [1, 2, 2], torch.Generator().manual_seed(5)
    late, prompt_of_late = LogitEditor(), a_request(prompt, **settings)
    known = a_request(prompt, **settings)
    editor, draws = LogitEditor(), torch.zeros(4, dtype=torch.int64)
    for step in range(8):
        logits = torch.randn(1, VOCAB, generator=generator)
        expected = edit(logits, known, editor=editor)
        found = late.edit(logits, [prompt_of_late], [len(prompt) + step], draws)
        assert torch.equal(found, expected)
        token = int(expected.argmax()) if step % 3 else 2
        prompt_of_late.token_ids[:] = known.token_ids
        known.token_ids.append(token)
        prompt_of_late.draw_row = step % 4
        draws.fill_(39)[step % 4] = token
    with pytest.raises(RuntimeError, match="knows 10 of the 12 tokens"):
        late.edit(logits, [prompt_of_late], [12], draws)
    draws.fill_(-1)
    assert late.edit(logits, [prompt_of_late], [11], draws).isfinite().all(), "drawn from logits that were not finite"


def test_rows_without_a_setting_are_passed_through() -> None:
    logits = torch.randn(2, VOCAB).bfloat16()
    plain = [a_request([1], temperature=0.5, top_k=3), a_request([2], stop_token_ids=frozenset({3}))]
    assert LogitEditor().edit(logits, plain, [1, 1], NO_DRAWS) is logits


def test_a_bias_cannot_lift_the_mask() -> None:
    request = a_request([1], temperature=0.0, min_tokens=1, stop_token_ids=frozenset({3}), logit_bias=((3, 100.0),))
    edited = edit(torch.zeros(1, VOCAB), request)
    assert sample(edited, sampling_rows([request], VOCAB, CPU)).tolist() == [0]
    request.token_ids.append(0)
    edited = edit(torch.zeros(1, VOCAB), request)
    assert sample(edited, sampling_rows([request], VOCAB, CPU)).tolist() == [3]


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert set(draw_many(logits, 1000, min_p=0.8)) == {1}
    assert set(draw_many(logits, 1000, min_p=0.74)) == {1, 3}
    assert set(draw_many(logits, 1000, min_p=0.26)) == {1, 2, 3}
    assert set(draw_many(logits, 1000, min_p=0.24)) == {0, 1, 2, 3}
    assert set(draw_many(logits, 1000, min_p=1.0)) == {1}
    # Temperature comes first: at 2, the ratios' square roots count.
    assert set(draw_many(logits, 1000, min_p=0.55, temperature=2.0)) == {1, 2, 3}


def test_min_p_comes_after_top_p() -> None:
    """Top-p of the whole takes three; of what min-p leaves, it would take two."""
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert set(draw_many(logits, 1000, min_p=0.45, top_p=0.75)) == {1, 2, 3}
    assert set(draw_many(logits, 1000, min_p=0.6, top_p=0.75)) == {1, 3}


def test_min_p_does_not_change_the_noise_of_others() -> None:
    """A draw that min-p allows is the draw without it."""
    logits = torch.randn(200, 30, generator=torch.Generator().manual_seed(6))
    free = [a_request([0] * (n + 1), seed=9) for n in range(200)]
    bound = [a_request([0] * (n + 1), seed=9, min_p=0.1) for n in range(200)]
    without, within = (sample(logits, sampling_rows(r, 30, CPU)) for r in (free, bound))
    probabilities = logits.softmax(dim=-1)
    allowed = probabilities.gather(1, without[:, None])[:, 0] >= 0.1 * probabilities.amax(dim=-1)
    assert 20 < int(allowed.sum()) < 200
    assert torch.equal(without[allowed], within[allowed])


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": 1e9},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": ((1, 101.0),)},
        {"logprobs": -1},
        {"prompt_logprobs": 1000},
    ],
)
def test_settings_without_a_meaning_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(max_tokens=1, **wrong)  # type: ignore[arg-type]
