"""The gRPC API: baton.v1.Inference, with the same requests, limits and errors as the HTTP API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, NoReturn, get_args

import grpc.aio

from baton.common.errors import BatonError, InvalidRequest
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from router.choice import Choice
from router.completions import Completions
from router.grpc_errors import to_status
from router.openai_schema import MAX_PROMPT_TOKENS, CompletionRequest, checked
from router.submitter import Submitter
from router.text import TextDelta

_Optional = Literal["max_tokens", "temperature", "top_p", "top_k", "seed"]
_OPTIONAL_FIELDS: tuple[_Optional, ...] = get_args(_Optional)

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class InferenceService(pb_grpc.InferenceServicer):
    """Called by the gRPC server on the event loop. A cancelled or expired call cancels its request at once."""

    def __init__(self, submitter: Submitter, completions: Completions) -> None:
        self._submitter = submitter
        self._completions = completions

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        try:
            choice = await self._start(request, context)
        except BatonError as error:
            await _abort(context, error)
        try:
            async for delta in choice:
                yield _response(choice, delta, request.return_token_ids)
        except BatonError as error:
            await _abort(context, error)
        finally:
            choice.close()

    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, _context: Context
    ) -> pb.CancelResponse:
        return pb.CancelResponse(found=self._submitter.cancel(request.request_id))

    async def ListModels(  # noqa: N802
        self, _request: pb.ListModelsRequest, _context: Context
    ) -> pb.ListModelsResponse:
        card = pb.ModelCard(id=self._submitter.model, max_model_len=self._submitter.max_model_len)
        return pb.ListModelsResponse(models=[card])

    async def _start(self, request: pb.GenerateRequest, context: Context) -> Choice:
        remaining_s = context.time_remaining()
        (choice,) = await self._completions.start(_to_completion(request), remaining_s)
        return choice


def _to_completion(request: pb.GenerateRequest) -> CompletionRequest:
    """The same model validates both APIs, so limits and messages are the same. Raises InvalidRequest."""
    sampling = request.sampling
    fields: dict[str, object] = {name: getattr(sampling, name) for name in _OPTIONAL_FIELDS if sampling.HasField(name)}
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("text or token_ids is required", "prompt", "missing_required_parameter")
    if len(request.token_ids.ids) > MAX_PROMPT_TOKENS:
        raise InvalidRequest(f"at most {MAX_PROMPT_TOKENS} token ids", "prompt")
    prompt = request.text if kind == "text" else list(request.token_ids.ids)
    fields |= {"model": request.model, "prompt": prompt, "stop": list(sampling.stop)}
    return checked({**fields, "ignore_eos": sampling.ignore_eos})


def _response(choice: Choice, delta: TextDelta, with_ids: bool) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        request_id=choice.generation.request.request_id,
        text=delta.text,
        token_ids=delta.token_ids if with_ids else (),
    )
    if delta.finish_reason is not None:
        path, _, reason = choice.path.partition("; ")
        response.finish_reason = delta.finish_reason
        response.path, response.path_reason = path, reason
        usage = choice.usage
        response.usage.prompt_tokens = usage.prompt_tokens
        response.usage.completion_tokens = usage.completion_tokens
        response.usage.total_tokens = usage.total_tokens
    return response


async def _abort(context: Context, error: BatonError) -> NoReturn:
    status = to_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort does not return")
