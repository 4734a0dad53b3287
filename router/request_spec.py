"""What a worker is told of a request, in the form of the wire. Pure; used by the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence

from protos import worker_pb2 as pb
from router.types import GenerationRequest


def spec_of(request: GenerationRequest, emitted: Sequence[int], deadline_s: float) -> pb.RequestSpec:
    """The rest of a request of which `emitted` is out already: that becomes the end of the prompt.

    Limits shrink by it; penalties and positions go by `num_emitted`, so any worker draws the same.
    """
    sampling = request.sampling
    return pb.RequestSpec(
        token_ids=[*request.token_ids, *emitted],
        num_emitted=len(emitted),
        max_tokens=sampling.max_tokens - len(emitted),
        min_tokens=max(sampling.min_tokens - len(emitted), 0),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        choice=sampling.choice,
        stop_token_ids=sorted(sampling.stop_token_ids),
        deadline_s=deadline_s,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )
