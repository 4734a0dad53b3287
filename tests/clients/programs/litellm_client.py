"""What an application does through litellm: `python litellm_client.py URL MODEL`; prints one JSON object."""

from __future__ import annotations

import asyncio
import json
import sys

import litellm

url, model = sys.argv[1:]
common = {"api_base": url, "api_key": "unused", "temperature": 0, "max_tokens": 8}
messages = [{"role": "system", "content": "You explain words."}, {"role": "user", "content": "What is a tree?"}]


def text_of(chunks: object) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)  # type: ignore[attr-defined]


async def several() -> list[str]:
    calls = [litellm.acompletion(model=f"openai/{model}", messages=messages, **common) for _ in range(4)]
    return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]


def refusal() -> str:
    try:
        litellm.completion(
            model=f"openai/{model}", messages=messages, response_format={"type": "json_object"}, **common
        )
    except litellm.BadRequestError as error:
        return str(error)
    return ""


whole = litellm.completion(model=f"openai/{model}", messages=messages, **common)
options = {"stream": True, "stream_options": {"include_usage": True}}
chunks = list(litellm.completion(model=f"hosted_vllm/{model}", messages=messages, **options, **common))
completion = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="A tree is", stop=["."], **common)
result = {
    "whole": whole.choices[0].message.content,
    "usage": whole.usage.completion_tokens,
    "streamed": text_of(chunks),
    "streamed_usage": chunks[-1].usage.completion_tokens if getattr(chunks[-1], "usage", None) else None,
    "several": asyncio.run(several()),
    "completion": completion.choices[0].text,
    "refusal": refusal(),
}
print(json.dumps(result))
