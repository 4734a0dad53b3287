"""Hand-overs that fail, are refused, or are none: their request goes on, and their pair is judged rightly."""

from __future__ import annotations

import asyncio

import pytest

from protos import worker_pb2 as wpb
from tests.support.fake_worker import FakeWorker, answer, emit, pair_of_answers
from tests.unit.router.asking import (
    TOKENS,
    ask,
    next_token_ids,
    only_connect,
    request,
    responses_of,
    token_ids,
    tokens_of,
)
from tests.unit.router.conftest import Served, serving


async def test_a_request_without_a_hand_over_does_not_prove_that_its_pair_works(workers: list[FakeWorker]) -> None:
    """It ends at its first token, which the prefill worker draws: nothing of it crosses the pair."""
    workers.extend(pair_of_answers("p0", "d0"))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        (pair,) = served.router.registry.pairs.all()
        pair.failures = 3
        response = await served.complete(max_tokens=1)
        assert response.headers["x-baton-path"].startswith("remote; ")
        assert pair.failures == 3
        assert (await served.complete(max_tokens=2)).status_code == 200
        assert pair.failures == 0


async def test_a_second_reservation_of_an_attempt_starts_no_second_prefill(workers: list[FakeWorker]) -> None:
    prefill, decode = FakeWorker("p0", "prefill", answer), FakeWorker("d0", "decode", answer)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        call = served.grpc.Generate(request())
        command = await prefill.next_frame("prefill")
        assert await next_token_ids(call) == TOKENS[:1]
        emit(decode, command.key, command.spec, 1, 2)
        assert await next_token_ids(call) == TOKENS[1:2]
        decode.say(reserved=wpb.Reserved(key=command.key, lease=8, generation=2))
        emit(decode, command.key, command.spec, 2, 8)
        assert await tokens_of(call) == TOKENS[2:]
        assert len(prefill.received("prefill")) == 1


@pytest.mark.parametrize("code", ["corrupt", "incomplete", "peer_lost", "expired"])
async def test_a_failed_hand_over_goes_on_locally_behind_the_tokens_that_are_out(
    workers: list[FakeWorker], code: str
) -> None:
    decode, prefill = FakeWorker("d0", "decode", answer), FakeWorker("p0", "prefill", answer)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        call = served.grpc.Generate(request())
        assert await next_token_ids(call) == TOKENS[:1]
        key = prefill.received("prefill")[0].key
        decode.say(failed=wpb.AttemptFailed(key=key, code=code, message="bad block", retryable=True))
        responses = await responses_of(call)
        assert [token for response in responses for token in response.token_ids] == TOKENS[1:]
        assert (await prefill.next_frame("cancel")).key == key
        assert not [cancel for cancel in decode.received("cancel") if cancel.key == key]
        assert list(decode.received("generate")[0].spec.token_ids) == [1, 2, 3, TOKENS[0]]
        assert not served.router.registry.snapshot().connected, "the pair rests"
        prefill.say_connected(decode)
        (pair,) = (await served.http.get("/v1/workers")).json()["pairs"]
        assert (pair["state"], pair["failures"], pair["failure"]) == ("connected", 1, f"failed ({code}): bad block")
        assert (0.0 < pair["resting_s"] <= 0.5, pair["probing"]) == (True, False)


async def test_a_hand_over_that_expires_before_its_first_token_says_nothing_of_its_pair(
    workers: list[FakeWorker],
) -> None:
    """Its prompt waited, or took too long: only this request stays on one worker."""
    decode, prefill = FakeWorker("d0", "decode", answer), FakeWorker("p0", "prefill", only_connect)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        asking = ask(served)
        key = (await prefill.next_frame("prefill")).key
        decode.say(failed=wpb.AttemptFailed(key=key, code="expired", message="the deadline passed", retryable=True))
        response = await asking
        assert token_ids(response) == TOKENS
        assert response.headers["x-baton-path"] == "local; local because the hand-over failed (expired)"
        assert served.router.registry.snapshot().connected
        assert served.router.registry.pairs.all()[0].failures == 0


async def test_answers_of_one_token_do_not_wait_for_each_other_behind_a_failure(workers: list[FakeWorker]) -> None:
    workers.extend((FakeWorker("p0", "prefill", only_connect), FakeWorker("d0", "decode", answer)))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        (pair,) = served.router.registry.pairs.all()
        pair.failures = 1
        asking = [asyncio.create_task(served.complete(max_tokens=1)) for _ in range(2)]
        for number in (1, 2):
            command = await workers[0].next_frame("prefill", number)
            emit(workers[0], command.key, command.spec, 0, 1)
        assert [(await one).headers["x-baton-path"][:7] for one in asking] == ["remote;"] * 2


@pytest.mark.parametrize("code", ["no_connection", "unknown_lease"])
async def test_a_refused_prefill_frees_the_reservation_and_goes_local(workers: list[FakeWorker], code: str) -> None:
    def refuse(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        only_connect(worker, frame)
        if frame.HasField("prefill"):
            worker.say(refused=wpb.Refused(key=frame.prefill.key, code=code, message="no"))

    decode, prefill = FakeWorker("d0", "decode", answer), FakeWorker("p0", "prefill", refuse)
    workers.extend((prefill, decode))
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        response = await ask(served)
        assert token_ids(response) == TOKENS
        assert response.headers["x-baton-path"] == f"local; local because the hand-over failed ({code})"
        assert (await decode.next_frame("cancel")).key == prefill.received("prefill")[0].key
        assert not prefill.received("cancel")


async def test_what_is_invalid_for_the_worker_is_a_client_error(workers: list[FakeWorker], served: Served) -> None:
    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.HasField("generate"):
            worker.say(refused=wpb.Refused(key=frame.generate.key, code="invalid", message="never fits"))

    workers.append(FakeWorker("d0", script=script))
    await served.attach(*workers)
    response = await ask(served)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "never fits"
