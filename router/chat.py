"""POST /v1/chat/completions: a body to running choices. Templates are rendered by the reader process."""

from __future__ import annotations

from baton.common.errors import InvalidRequest, Unavailable
from router.chat_request import ChatRequest, checked_chat
from router.choice import Choice
from router.reader.pool import RequestReader
from router.sampling_fields import MAX_TOKENS
from router.submitter import Submitter


class Chat:
    """Owned by the router; one per process."""

    def __init__(self, submitter: Submitter, reader: RequestReader) -> None:
        self._submitter = submitter
        self._reader = reader

    async def start(self, body: bytes) -> tuple[ChatRequest, list[Choice]]:
        """Submit a request; the caller closes the choices. Raises InvalidRequest, ModelNotFound or Unavailable."""
        read = await self._reader.chat(body)
        request = checked_chat(read.fields)
        submitter = self._submitter
        submitter.accept(request.model, request.num_ignored_fields)
        try:
            [prompt] = await submitter.encode(read.texts, add_special_tokens=bool(request.add_special_tokens))
            limit = self._limit(len(prompt), request.asked_tokens)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), _param(error.param, request), error.code) from None
        choices = await submitter.submit([prompt], request, [limit], logprobs=request.num_top, id_prefix="chatcmpl")
        return request, choices

    def _limit(self, num_prompt_tokens: int, asked: int | None) -> int:
        """By default an answer may fill what the prompt leaves of the model's length, as in OpenAI's API."""
        if asked is None and not self._submitter.max_model_len:
            raise Unavailable("no worker has attached yet, so the model's length is not known")
        return self._submitter.max_tokens(num_prompt_tokens, asked, MAX_TOKENS)


def _param(param: str | None, request: ChatRequest) -> str | None:
    """What is called so in the other API, as this one calls it."""
    if param == "max_tokens" and request.max_completion_tokens is not None:
        return "max_completion_tokens"
    return "messages" if param == "prompt" else param
