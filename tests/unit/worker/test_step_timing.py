"""The step time fit: recovers a known law, stays non-negative, follows change, remembers prefill."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.worker.step_timing import StepTimeModel

STEPS = [(0, 1), (0, 4), (0, 16), (128, 0), (512, 3), (2048, 8), (64, 1)]


def law(base: float, per_token: float, per_seq: float, prefill: int, decode: int) -> float:
    return base + per_token * prefill + per_seq * decode


def test_recovers_a_known_law() -> None:
    model = StepTimeModel()
    for prefill, decode in STEPS * 5:
        model.add(prefill, decode, law(0.004, 3e-5, 2e-4, prefill, decode))
    fitted = model.fit()
    assert fitted.base_s == pytest.approx(0.004, rel=1e-4)
    assert fitted.per_prefill_token_s == pytest.approx(3e-5, rel=1e-4)
    assert fitted.per_decode_seq_s == pytest.approx(2e-4, rel=1e-4)
    assert fitted.samples == len(STEPS) * 5
    assert fitted.seconds(100, 2) == pytest.approx(0.004 + 3e-3 + 4e-4, rel=1e-4)


def test_no_step_gives_zeros() -> None:
    assert StepTimeModel().fit() == (0.0, 0.0, 0.0, 0)


def test_an_empty_step_is_not_a_sample() -> None:
    model = StepTimeModel()
    model.add(0, 0, 5.0)
    assert model.fit() == (0.0, 0.0, 0.0, 0)


def test_one_step_is_predicted_exactly() -> None:
    model = StepTimeModel()
    model.add(100, 0, 0.02)
    assert model.fit().seconds(100, 0) == pytest.approx(0.02)


def test_a_coefficient_that_would_be_negative_is_zero_and_the_others_are_refitted() -> None:
    model = StepTimeModel(forgetting=1.0)
    for decode in (1, 2, 4, 8):
        model.add(0, decode, 0.01 - 0.001 * decode)
    fitted = model.fit()
    assert fitted.per_decode_seq_s == 0.0
    assert fitted.base_s == pytest.approx(0.01 - 0.001 * 15 / 4)


def test_follows_a_machine_that_becomes_slower() -> None:
    model = StepTimeModel(forgetting=0.9)
    for prefill, decode in STEPS * 20:
        model.add(prefill, decode, law(0.001, 1e-5, 1e-4, prefill, decode))
    for prefill, decode in STEPS * 20:
        model.add(prefill, decode, law(0.002, 2e-5, 2e-4, prefill, decode))
    assert model.fit().seconds(1000, 10) == pytest.approx(0.002 + 0.02 + 0.002, rel=1e-2)


def test_long_decoding_does_not_forget_the_price_of_prefill() -> None:
    model = StepTimeModel(forgetting=0.9)
    for prefill, decode in STEPS * 5:
        model.add(prefill, decode, law(0.004, 3e-5, 2e-4, prefill, decode))
    for index in range(5000):
        model.add(0, 1 + index % 16, law(0.004, 3e-5, 2e-4, 0, 1 + index % 16))
    assert model.fit().per_prefill_token_s == pytest.approx(3e-5, rel=1e-3)


@pytest.mark.parametrize("forgetting", [0.0, -1.0, 1.5])
def test_rejects_a_meaningless_forgetting_factor(forgetting: float) -> None:
    with pytest.raises(ValueError, match="forgetting"):
        StepTimeModel(forgetting)


@given(
    st.lists(
        st.tuples(st.integers(0, 4096), st.integers(0, 256), st.floats(1e-6, 10.0)),
        min_size=1,
        max_size=30,
    )
)
def test_is_never_negative_and_never_worse_than_nothing(steps: list[tuple[int, int, float]]) -> None:
    model = StepTimeModel(forgetting=1.0)
    for prefill, decode, seconds in steps:
        model.add(prefill, decode, seconds)
    fitted = model.fit()
    assert min(fitted[:3]) >= 0.0
    counted = [step for step in steps if step[0] or step[1]]
    error = sum((fitted.seconds(p, d) - seconds) ** 2 for p, d, seconds in counted)
    assert error <= sum(seconds**2 for *_, seconds in counted) + 1e-9
