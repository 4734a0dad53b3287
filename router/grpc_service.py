"""The gRPC API: baton.v1.Inference, with the same requests, limits and errors as the HTTP API."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

import grpc.aio

from baton.common.errors import BatonError
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from router.answers import close
from router.choice import Choice, merged
from router.completions import Completions
from router.grpc_answer import GrpcAnswer
from router.grpc_errors import to_status
from router.grpc_request import read_request
from router.http_protocol import STALLED_CLIENT_S
from router.submitter import Submitter
from router.types import ReaderTooSlow

_log = logging.getLogger("baton.router")
Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class InferenceService(pb_grpc.InferenceServicer):
    """Called by the gRPC server on the event loop. A cancelled or expired call cancels its request at once."""

    def __init__(self, submitter: Submitter, completions: Completions) -> None:
        self._submitter = submitter
        self._completions = completions

    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Holds nothing of the request any more when the status of a failure has to wait for a client to read."""
        status = await self._serve(request, context)
        if status is not None:
            await context.abort(status.code, status.details, status.trailing_metadata)

    async def _serve(self, request: pb.GenerateRequest, context: Context) -> grpc.Status | None:
        """Send the whole answer; the status that ends the call instead of OK, if any."""
        choices: list[Choice] = []
        try:
            self._submitter.check_length(len(request.token_ids.ids), 1)
            body = read_request(request)
            choices = await self._completions.start(body, context.time_remaining())
            answer = GrpcAnswer(body, choices, self._submitter.tokenizer)
            async with aclosing(merged(choices)) as deltas:
                async for choice, delta in deltas:
                    await _send(context, await answer.message(choice, delta))
        except BatonError as error:
            return to_status(error)
        except grpc.aio.BaseError:  # the client left amid a write, or the server stops: not ours to answer
            raise
        except Exception:  # noqa: BLE001
            _log.exception("a defect in the router ended a call")
            return to_status(BatonError("internal error"))
        finally:
            close(choices)
        return None

    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, _context: Context
    ) -> pb.CancelResponse:
        return pb.CancelResponse(found=self._submitter.cancel(request.request_id))

    async def ListModels(  # noqa: N802
        self, _request: pb.ListModelsRequest, _context: Context
    ) -> pb.ListModelsResponse:
        defaults = pb.SamplingParams(**self._submitter.defaults.model_dump())
        card = pb.ModelCard(
            id=self._submitter.model, max_model_len=self._submitter.max_model_len, sampling_defaults=defaults
        )
        return pb.ListModelsResponse(models=[card])


async def _send(context: Context, response: pb.GenerateResponse) -> None:
    """Returns when the client's window has taken it. Raises ReaderTooSlow."""
    try:
        async with asyncio.timeout(STALLED_CLIENT_S):
            await context.write(response)
    except TimeoutError:
        raise ReaderTooSlow(f"the client has read nothing for {STALLED_CLIENT_S:g} s") from None
