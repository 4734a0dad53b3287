"""What an application does through langchain-openai: `python langchain_client.py URL MODEL`; prints one JSON object."""

from __future__ import annotations

import asyncio
import json
import sys

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

url, model = sys.argv[1:]
chat = ChatOpenAI(model=model, base_url=url, api_key="unused", temperature=0, max_completion_tokens=8, seed=1)
messages = [SystemMessage("You explain words."), HumanMessage("What is a tree?")]


async def streamed() -> tuple[str, int]:
    text, usage = "", 0
    async for chunk in chat.astream(messages, stream_usage=True):
        text += str(chunk.content)
        usage = chunk.usage_metadata["output_tokens"] if chunk.usage_metadata else usage
    return text, usage


def refusal() -> str:
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    try:
        chat.bind_tools([add]).invoke(messages)
    except openai.BadRequestError as error:
        return str(error.body["param"])  # type: ignore[index]
    return ""


whole = chat.invoke(messages)
chain = ChatPromptTemplate.from_messages([("system", "You explain words."), ("human", "What is a {word}?")]) | chat
text, usage = asyncio.run(streamed())
result = {
    "whole": whole.content,
    "finish_reason": whole.response_metadata["finish_reason"],
    "usage": whole.usage_metadata["output_tokens"],
    "streamed": text,
    "streamed_usage": usage,
    "chain": chain.invoke({"word": "tree"}).content,
    "batch": [answer.content for answer in chat.batch([messages, messages])],
    "history": chat.invoke([*messages, AIMessage(whole.content), HumanMessage("And a bush?")]).content,
    "logprobs": len(chat.bind(logprobs=True, top_logprobs=2).invoke(messages).response_metadata["logprobs"]["content"]),
    "completion": OpenAI(model=model, base_url=url, api_key="unused", temperature=0, max_tokens=8).invoke("A tree is"),
    "refusal": refusal(),
}
print(json.dumps(result))
