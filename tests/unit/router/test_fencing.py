"""What never reaches the client: repeats, other attempts, too much. Positions pass once and in order."""

from __future__ import annotations

from protos import worker_pb2 as wpb
from tests.support.fake_worker import FakeWorker, answer, emit
from tests.unit.router.asking import TOKENS, ask, next_token_ids, num_held, request, token_ids, tokens_of
from tests.unit.router.conftest import Served, serving


async def test_repeats_and_other_attempts_never_reach_the_client(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    answering = ask(served)
    key = (await workers[0].next_frame("generate")).key
    stale = wpb.AttemptKey(request_id=key.request_id, attempt=key.attempt + 1)
    workers[0].say_tokens(key, 0, TOKENS[:3])
    workers[0].say_tokens(stale, 3, [90, 91])
    workers[0].say_tokens(key, 1, [92, 93])
    workers[0].say_tokens(key, 2, [94, TOKENS[3]])
    workers[0].say_tokens(key, 5, TOKENS[5:], "length")
    workers[0].say_tokens(key, 4, TOKENS[4:5])
    assert token_ids(await answering) == TOKENS
    assert served.router.metrics.registry.get_sample_value("baton_fenced_frames_total") == 1


async def test_decode_may_overtake_the_first_token(workers: list[FakeWorker]) -> None:
    prefill, decode = FakeWorker("p0", "prefill", answer), FakeWorker("d0", "decode", answer)
    workers.extend((prefill, decode))
    prefill.script = lambda worker, frame: answer(worker, frame) if frame.HasField("connect_peer") else None
    async with serving(router={"policy": "remote"}) as served:
        await served.attach(*workers)
        call = served.grpc.Generate(request())
        command = await prefill.next_frame("prefill")
        emit(decode, command.key, command.spec, 1, 3)
        # The frames of the two workers are not ordered: make sure that decode's are there first.
        await served.until(lambda: num_held(served) == 2)
        emit(prefill, command.key, command.spec, 0, 1)
        first = await next_token_ids(call)
        emit(decode, command.key, command.spec, 3, 8)
        assert first + await tokens_of(call) == TOKENS


async def test_a_worker_that_says_too_much_is_cut_at_max_tokens(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0"))
    await served.attach(*workers)
    answering = ask(served)
    key = (await workers[0].next_frame("generate")).key
    workers[0].say_tokens(key, 0, [*TOKENS, 95, 96])
    response = await answering
    assert token_ids(response) == TOKENS
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert (await workers[0].next_frame("cancel")).key == key
