"""A gRPC request in the form of a POST /v1/completions, whose model then validates both. Pure."""

from __future__ import annotations

from typing import Literal, get_args

from baton.common.errors import InvalidRequest
from protos import inference_pb2 as pb
from router.openai_schema import CompletionRequest, checked
from router.prompt_shape import MAX_PROMPT_TOKENS

_Optional = Literal[
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "n",
]
_OPTIONAL_FIELDS: tuple[_Optional, ...] = get_args(_Optional)


def read_request(request: pb.GenerateRequest) -> CompletionRequest:
    """Limits and messages are those of the HTTP API. Raises InvalidRequest."""
    sampling = request.sampling
    fields: dict[str, object] = {name: getattr(sampling, name) for name in _OPTIONAL_FIELDS if sampling.HasField(name)}
    if request.HasField("logprobs"):
        fields["logprobs"] = request.logprobs
    if request.HasField("prompt_logprobs"):
        fields["prompt_logprobs"] = request.prompt_logprobs
    return checked(
        {
            **fields,
            "model": request.model,
            "prompt": _prompt(request),
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()},
            "ignore_eos": sampling.ignore_eos,
            "include_stop_str_in_output": sampling.include_stop_str_in_output,
            "echo": request.echo,
            "return_token_ids": request.return_token_ids,
        }
    )


def _prompt(request: pb.GenerateRequest) -> str | list[int]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("text or token_ids is required", "prompt", "missing_required_parameter")
    if kind == "text":
        return request.text
    if len(request.token_ids.ids) > MAX_PROMPT_TOKENS:
        raise InvalidRequest(f"at most {MAX_PROMPT_TOKENS} token ids", "prompt")
    return list(request.token_ids.ids)
