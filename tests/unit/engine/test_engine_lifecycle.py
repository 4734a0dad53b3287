"""From command to last token: finish reasons, refusals, aborts in every phase, faults. Blocks always return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.common.sampling import SamplingParams
from baton.engine.ports import Abort, AddRequest, Admission, Refusal, Release, Reserve, TokenOutput
from baton.engine.request import Phase, Request
from tests.support.engine_harness import Harness, greedy, make_harness, make_request, random_prompt, seeded
from tests.support.tiny_model import make_tiny_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=3, std=0.2)


@pytest.fixture
def harness(model_dir: Path) -> Harness:
    return make_harness(model_dir, max_num_batched_tokens=24)


# ---- finishing


def test_length_and_stop(harness: Harness) -> None:
    prompt = random_prompt(10)
    tokens = harness.generate(greedy("a", prompt, 8))["a"]
    assert len(tokens) == 8
    assert harness.ports.finish_reasons["a"] == "length"
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    until = tokens[: tokens.index(stop) + 1]
    sampling = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=frozenset({stop}))
    assert harness.generate(make_request("b", prompt, sampling))["b"] == until
    assert harness.ports.finish_reasons["b"] == "stop"
    harness.assert_at_rest()


def test_one_token(harness: Harness) -> None:
    harness.generate(greedy("a", random_prompt(30), 1))
    (output,) = (output for report in harness.ports.reports for output in report.outputs)
    assert output == TokenOutput("a", 0, (harness.ports.tokens["a"][0],), "length")
    assert harness.ports.events_of("a") == ["queued", "prefill_start", "prefill_end", "first_token", "finished"]


def test_events_once_and_in_order(harness: Harness) -> None:
    harness.generate(greedy("a", random_prompt(70), 5))
    assert harness.ports.events_of("a") == [
        "queued",
        "prefill_start",
        "prefill_end",
        "first_token",
        "second_token",
        "finished",
    ]


def test_reports_count_the_batch(harness: Harness) -> None:
    harness.add(greedy("a", random_prompt(30), 3))
    harness.turn()
    harness.add(greedy("b", random_prompt(10, seed=1), 3))
    harness.run()
    counts = [(report.num_prefill_tokens, report.num_decode_seqs) for report in harness.ports.reports]
    assert counts == [(24, 0), (16, 0), (0, 2), (0, 2)]


# ---- the same draw everywhere


def test_seeded_draws_do_not_depend_on_company(model_dir: Path) -> None:
    requests = [
        ("a", random_prompt(30), {"seed": 5}),
        ("b", random_prompt(30), {"seed": 6, "temperature": 0.8, "top_p": 0.9}),
        ("c", random_prompt(41), {"seed": 5, "choice": 1, "top_k": 20}),
    ]
    together = make_harness(model_dir, max_num_batched_tokens=17).generate(
        *(seeded(name, prompt, 40, **params) for name, prompt, params in requests)  # type: ignore[arg-type]
    )
    for name, prompt, params in requests:
        alone = make_harness(model_dir).generate(seeded(name, prompt, 40, **params))[name]  # type: ignore[arg-type]
        assert together[name] == alone
        assert len(set(alone)) > 10
    assert together["a"] != together["b"]


@pytest.mark.parametrize("cut", [1, 7, 22, 39])
@pytest.mark.parametrize("make", [greedy, seeded])
def test_a_resubmitted_request_goes_on_the_same(model_dir: Path, cut: int, make: Callable[..., Request]) -> None:
    prompt = random_prompt(25)
    whole = make_harness(model_dir).generate(make("a", prompt, 40))["a"]
    harness = make_harness(model_dir)
    again = make("a", prompt + whole[:cut], 40 - cut)
    again.num_emitted = cut
    rest = harness.generate(again)["a"]
    assert rest == whole[cut:]
    assert harness.ports.first_position["a"] == cut


# ---- refusals


@pytest.mark.parametrize(
    ("length", "max_tokens", "token", "reason"),
    [
        (200, 57, 0, "257 tokens are more than the maximum of 256"),
        (10, 2, 258, "token ids must lie in [0, 258)"),
        (10, 2, -1, "token ids must lie in [0, 258)"),
    ],
)
def test_what_can_never_be_served_is_refused(
    harness: Harness, length: int, max_tokens: int, token: int, reason: str
) -> None:
    bad = greedy("bad", [*random_prompt(length - 1), token], max_tokens)
    good = greedy("good", random_prompt(5), 3)
    harness.add(bad, good)
    harness.run()
    (failure,) = harness.ports.failures
    assert (failure.request_id, failure.code) == ("bad", "invalid")
    assert reason in failure.reason
    assert len(harness.ports.tokens["good"]) == 3
    harness.assert_at_rest()


def test_a_known_id_does_not_disturb_its_owner(harness: Harness) -> None:
    harness.add(greedy("a", random_prompt(30), 6), greedy("a", random_prompt(9), 6))
    harness.run()
    assert len(harness.ports.tokens["a"]) == 6
    assert not harness.ports.failures
    harness.assert_at_rest()


def test_waiting_requests_get_their_turn(model_dir: Path) -> None:
    """More work than blocks: everything ends, none is refused."""
    harness = make_harness(model_dir, num_blocks=16, max_num_seqs=3)
    requests = [greedy(f"r{n}", random_prompt(20 + 9 * n, seed=n), 30) for n in range(10)]
    tokens = harness.generate(*requests)
    assert all(len(generated) == 30 for generated in tokens.values())
    harness.assert_at_rest()


# ---- aborts


def _waiting(harness: Harness) -> None:
    harness.add(greedy("other", random_prompt(200, seed=1), 30), greedy("a", random_prompt(50), 60))
    harness.turn()


def _mid_prefill(harness: Harness) -> None:
    harness.add(greedy("a", random_prompt(50), 60))
    harness.turn()


def _decoding(harness: Harness) -> None:
    harness.add(greedy("a", random_prompt(50), 60))
    harness.run(until=lambda: len(harness.ports.tokens["a"]) == 20)


@pytest.mark.parametrize("phase", [_waiting, _mid_prefill, _decoding])
def test_an_abort_gives_all_blocks_back(harness: Harness, phase: Callable[[Harness], None]) -> None:
    phase(harness)
    emitted = list(harness.ports.tokens["a"])
    harness.post(Abort("a"), Abort("a"), Abort("unknown"))
    harness.run()
    assert harness.ports.tokens["a"] == emitted
    assert "a" not in harness.ports.finish_reasons
    assert not harness.ports.failures
    harness.assert_at_rest()


def test_add_and_abort_in_one_turn(harness: Harness) -> None:
    harness.post(AddRequest(greedy("a", random_prompt(50))), Abort("a"))
    assert not harness.turn()
    harness.assert_at_rest()


# ---- faults


def test_a_step_that_raises_fails_its_requests_only(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    harness.add(*(greedy(f"r{n}", random_prompt(30, seed=n), 20) for n in range(3)))
    harness.turn()
    original = harness.engine._runner.launch

    def broken(*args: object) -> list[int]:
        monkeypatch.setattr(harness.engine._runner, "launch", original)
        raise RuntimeError("the model fell over")

    monkeypatch.setattr(harness.engine._runner, "launch", broken)
    harness.turn()
    failed = {failure.request_id for failure in harness.ports.failures}
    assert failed == {"r0", "r1"}
    assert all("fell over" in failure.reason and failure.code == "internal" for failure in harness.ports.failures)
    assert "Traceback" in caplog.text
    assert harness.engine.stats().failed_steps_in_a_row == 1
    harness.run()
    assert len(harness.ports.tokens["r2"]) == 20
    assert harness.engine.stats().failed_steps_in_a_row == 0
    harness.assert_at_rest()


def test_a_scheduler_that_raises_fails_everything_and_the_engine_goes_on(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.add(*(greedy(f"r{n}", random_prompt(30, seed=n), 20) for n in range(3)))
    harness.turn()
    with monkeypatch.context() as patched:
        patched.setattr(harness.engine._scheduler, "schedule", lambda: 1 / 0)
        assert not harness.turn()
    assert {failure.request_id for failure in harness.ports.failures} == {"r0", "r1", "r2"}
    harness.assert_at_rest()
    harness.ports.reports.clear()
    assert len(harness.generate(greedy("next", random_prompt(9), 4))["next"]) == 4


def test_logits_that_are_not_finite_fail_one_request_and_nothing_of_it_is_cached(harness: Harness) -> None:
    """The fault strikes in the very step that fills a block, and which of the blocks is spoilt nobody knows."""
    request = greedy("bad", random_prompt(20), 30)
    harness.add(request, greedy("good", random_prompt(20, seed=1), 30))
    harness.run(until=lambda: request.num_computed_tokens == 31)
    harness.engine.kv_cache[:, :, request.block_table[1]] = torch.nan
    harness.run()
    (failure,) = harness.ports.failures
    assert (failure.request_id, failure.code) == ("bad", "internal")
    assert len(harness.ports.tokens["good"]) == 30
    harness.assert_at_rest()
    harness.ports.reports.clear()
    again = greedy("again", [*request.token_ids, 1, 2], 5)
    assert len(harness.generate(again)["again"]) == 5
    assert again.num_cached_tokens == 0


def test_spoilt_kv_is_not_found_again(harness: Harness) -> None:
    """Whoever shares a cached block whose content went bad fails once; then the prompt is computed anew."""
    prompt = random_prompt(50)
    expected = harness.generate(greedy("first", prompt, 5))["first"]
    harness.engine.kv_cache[harness.engine.kv_cache.isfinite()] = torch.nan
    harness.add(greedy("second", prompt, 5))
    harness.run()
    assert [failure.request_id for failure in harness.ports.failures] == ["second"]
    harness.ports.reports.clear()
    assert harness.generate(greedy("third", prompt, 5))["third"] == expected
    harness.assert_at_rest()


def test_a_report_that_is_not_taken_does_not_stop_the_engine(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.add(greedy("a", random_prompt(9), 4))
    with monkeypatch.context() as patched:
        patched.setattr(harness.ports, "on_step", lambda _: 1 / 0)
        assert harness.turn()
    harness.run()
    assert harness.ports.finish_reasons["a"] == "length"
    harness.assert_at_rest()


def test_copies_of_a_schedule_that_went_wrong_are_not_made_later(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks have other holders by then."""
    harness = make_harness(model_dir)
    prompt = random_prompt(20)
    harness.add(greedy("parent", prompt, 30))
    harness.turn()
    with monkeypatch.context() as patched:
        patched.setattr(harness.engine._scheduler, "_next_chunk", lambda *_: 1 / 0)
        harness.add(greedy("fork", prompt, 30, fork_of="parent"))
        harness.turn()
    assert {failure.request_id for failure in harness.ports.failures} == {"parent", "fork"}
    copied: list[object] = []
    monkeypatch.setattr(harness.engine._runner, "_copy_blocks", copied.append)
    harness.ports.reports.clear()
    assert len(harness.generate(greedy("next", random_prompt(40, seed=3), 5))["next"]) == 5
    assert not copied
    harness.assert_at_rest()


# ---- reservations


@pytest.mark.parametrize("where", ["match_prefix", "open", "grow"])
def test_a_reservation_that_goes_wrong_is_answered_and_holds_nothing(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(harness.engine._pool, where, lambda *_: 1 / 0)
        refusal = _try_reserve(harness, "a", 40, 60)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "internal"
    harness.assert_at_rest()
    assert not isinstance(_try_reserve(harness, "a", 40, 60), Refusal)


def test_an_admission_that_goes_wrong_fails_and_holds_nothing(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.reserve("lease", random_prompt(40), 60)
    with monkeypatch.context() as patched:
        patched.setattr(harness.engine._pool, "register", lambda *_: 1 / 0)
        harness.post(Admission("lease", greedy("r", random_prompt(40), 20), 5))
        harness.turn()
    (failure,) = harness.ports.failures
    assert (failure.request_id, failure.code) == ("r", "internal")
    harness.assert_at_rest()


def _try_reserve(harness: Harness, name: str, length: int, max_total: int, seed: int = 0) -> object:
    replies: list[object] = []
    harness.post(Reserve(name, random_prompt(length, seed), max_total, replies.append))
    harness.turn()
    (reply,) = replies
    return reply


def test_reservations_are_refused_when_growth_does_not_fit(model_dir: Path) -> None:
    harness = make_harness(model_dir, num_blocks=16)
    harness.reserve("a", random_prompt(40), 180)
    assert harness.blocks.leased == 3
    refusal = _try_reserve(harness, "b", 20, 80)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "busy"
    assert not isinstance(_try_reserve(harness, "c", 20, 64), Refusal)
    harness.post(Release("a"), Release("c"), Release("unknown"), Release("a"))
    harness.turn()
    harness.assert_at_rest()


def test_reservations_are_refused_for_good_reasons(model_dir: Path) -> None:
    harness = make_harness(model_dir, max_num_seqs=1)
    for length, max_total in ((10, 257), (300, 310)):
        refusal = _try_reserve(harness, "a", length, max_total)
        assert isinstance(refusal, Refusal)
        assert refusal.code == "invalid"
    harness.reserve("a", random_prompt(10), 20)
    again = _try_reserve(harness, "a", 10, 20)
    assert isinstance(again, Refusal)
    no_seat = _try_reserve(harness, "b", 10, 20)
    assert isinstance(no_seat, Refusal)
    assert no_seat.code == "busy"
    # A local request waits for the seat too and gets it before a later reservation.
    harness.add(greedy("local", random_prompt(5), 3))
    harness.turn()
    harness.post(Release("a"))
    assert isinstance(_try_reserve(harness, "b", 10, 20), Refusal)
    harness.run()
    assert len(harness.ports.tokens["local"]) == 3
    harness.assert_at_rest()


def test_an_admitted_request_sits_in_the_seat_of_its_lease(model_dir: Path) -> None:
    harness = make_harness(model_dir, max_num_seqs=1)
    for number in range(3):
        prompt = random_prompt(10, seed=number)
        harness.reserve("lease", prompt, 20)
        harness.engine.kv_cache.zero_()
        harness.post(Admission("lease", greedy(f"r{number}", prompt, 10), 5))
        harness.turn()
        assert isinstance(_try_reserve(harness, "other", 10, 20, seed=9), Refusal)
        harness.run()
        assert len(harness.ports.tokens[f"r{number}"]) == 9


def test_growth_of_a_lease_is_kept_from_local_requests(model_dir: Path) -> None:
    harness = make_harness(model_dir, num_blocks=16)
    harness.reserve("a", random_prompt(16), 160)
    harness.add(greedy("local", random_prompt(16, seed=1), 100))
    assert not harness.turn()
    harness.post(Release("a"))
    harness.run()
    assert len(harness.ports.tokens["local"]) == 100


def test_an_admission_without_its_reservation_fails(harness: Harness) -> None:
    prompt = random_prompt(20)
    harness.reserve("a", prompt, 40)
    harness.post(Release("a"), Admission("a", greedy("r", prompt, 20), 1))
    harness.run()
    (failure,) = harness.ports.failures
    assert (failure.request_id, failure.code) == ("r", "expired")
    harness.assert_at_rest()


@pytest.mark.parametrize(("length", "max_tokens"), [(19, 20), (20, 30)])
def test_an_admission_that_differs_from_its_reservation_fails(harness: Harness, length: int, max_tokens: int) -> None:
    harness.reserve("a", random_prompt(20), 40)
    harness.post(Admission("a", greedy("r", random_prompt(length), max_tokens), 1))
    harness.run()
    (failure,) = harness.ports.failures
    assert (failure.request_id, failure.code) == ("r", "internal")
    harness.assert_at_rest()


# ---- hand-over, prefill side


def test_a_handed_over_request_keeps_its_blocks_until_release(harness: Harness) -> None:
    request = greedy("h", random_prompt(50), 60, hand_over=True)
    harness.add(request)
    harness.run()
    assert request.phase is Phase.HANDED_OVER
    assert harness.blocks.leased == 4
    assert not any(report.outputs for report in harness.ports.reports)
    (done,) = harness.ports.prefills
    assert (done.num_tokens, done.finish_reason) == (50, None)
    harness.post(Abort("h"))
    harness.turn()
    assert harness.blocks.leased == 4
    harness.post(Release("h"), Release("h"))
    harness.turn()
    assert harness.blocks.cached == 3
    harness.assert_at_rest()


def test_a_hand_over_that_ends_at_its_first_token_says_so(harness: Harness) -> None:
    harness.add(greedy("h", random_prompt(20), 1, hand_over=True))
    harness.run()
    (done,) = harness.ports.prefills
    assert done.finish_reason == "length"
    harness.post(Release("h"))
    harness.run()
    harness.assert_at_rest()


def test_an_aborted_hand_over_keeps_its_blocks_until_release(harness: Harness) -> None:
    harness.add(greedy("h", random_prompt(50), 60, hand_over=True))
    harness.turn()
    harness.post(Abort("h"))
    assert not harness.turn()
    assert harness.blocks.leased == 4
    assert not harness.ports.prefills
    harness.post(Release("h"))
    harness.turn()
    harness.assert_at_rest()


def test_a_waiting_hand_over_holds_nothing(model_dir: Path) -> None:
    harness = make_harness(model_dir, num_blocks=16)
    harness.reserve("lease", random_prompt(16), 200)
    harness.add(*(greedy(name, random_prompt(100), 60, hand_over=True) for name in ("h", "i")))
    assert not harness.turn()
    harness.post(Abort("h"), Release("i"))
    harness.turn()
    assert harness.engine.stats().num_waiting == 0
    harness.post(Release("lease"), Release("h"))
    harness.turn()
    harness.assert_at_rest()


def test_a_release_ends_a_running_hand_over_but_never_a_local_request(harness: Harness) -> None:
    harness.add(greedy("h", random_prompt(50), 60, hand_over=True))
    harness.turn()
    harness.post(Release("h"))
    assert not harness.turn()
    harness.assert_at_rest()
    harness.add(greedy("local", random_prompt(50), 20))
    harness.turn()
    harness.post(Release("local"))
    harness.run()
    assert len(harness.ports.tokens["local"]) == 20


def test_a_failed_hand_over_keeps_its_blocks_until_release(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.add(greedy("h", random_prompt(50), 60, hand_over=True))
    harness.turn()
    monkeypatch.setattr(harness.engine._runner, "launch", lambda *_: 1 / 0)
    harness.turn()
    assert [failure.request_id for failure in harness.ports.failures] == ["h"]
    assert harness.blocks.leased == 4
    harness.post(Release("h"))
    harness.turn()
    harness.assert_at_rest()
