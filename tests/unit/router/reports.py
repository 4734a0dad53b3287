"""Workers that report what the tests can tell by its token, and how answers are read. Shared by tests of reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from tests.support.fake_worker import FakeWorker
from tests.unit.router.conftest import MODEL, Served


def known(token_id: int, others: Sequence[int] = (1, 2)) -> wpb.TokenLogprobs:
    """A report that the tests can tell by its token: everything follows from the id."""
    values = [-float(other) for other in others]
    return wpb.TokenLogprobs(
        token_id=token_id, logprob=-token_id / 4, rank=3, top_token_ids=others, top_logprobs=values
    )


def say(worker: FakeWorker, key: wpb.AttemptKey, position: int, ids: Sequence[int], **fields: Any) -> None:
    output = wpb.TokenOutput(key=key, position=position, token_ids=ids, logprobs=map(known, ids), **fields)
    worker.say(step=wpb.StepOutput(outputs=[output]))


def speaker(served: Served, text: str, finish: str = "length", step: int = 1) -> Any:
    """A worker's script that says a text, `step` tokens at a time, with what it was asked to report."""
    ids = list(served.tokenizer.encode(text))

    def script(worker: FakeWorker, frame: wpb.RouterFrame) -> None:
        if frame.WhichOneof("frame") == "generate":
            command = frame.generate
            wants_prompt = command.spec.HasField("prompt_logprobs")
            for start in range(0, len(ids), step):
                said = ids[start : start + step]
                of_prompt = map(known, command.spec.token_ids[1:]) if wants_prompt and not start else ()
                end = finish if start + step >= len(ids) else ""
                say(worker, command.key, start, said, finish_reason=end, prompt_logprobs=of_prompt)

    return script


async def chunks_of(served: Served, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "stream": True, **fields}
    async with served.http.stream("POST", "/v1/completions", json=body) as response:
        data = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert data.pop() == "[DONE]"
    return [json.loads(item)["choices"][0] for item in data]


def joined(choices: list[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {key: [item for choice in choices for item in choice["logprobs"][key]] for key in keys}


async def collect(call: Any) -> list[pb.GenerateResponse]:
    return [response async for response in call]
