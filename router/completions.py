"""POST /v1/completions, and the same over gRPC: a validated request to running choices."""

from __future__ import annotations

from router.choice import Choice
from router.openai_schema import CompletionRequest
from router.submitter import Submitter
from router.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16


class Completions:
    """Owned by the router; one per process."""

    def __init__(self, submitter: Submitter) -> None:
        self._submitter = submitter

    async def start(self, request: CompletionRequest, timeout_s: float | None = None) -> list[Choice]:
        """Submit every prompt of a request; the caller closes the choices.

        `timeout_s`: the client's own deadline. Raises InvalidRequest, ModelNotFound or Unavailable.
        """
        submitter = self._submitter
        submitter.accept(request.model, request.num_ignored_fields)
        prompts = await submitter.token_ids(request.prompts)
        limits = [submitter.max_tokens(len(prompt), request.max_tokens, DEFAULT_MAX_TOKENS) for prompt in prompts]
        return await submitter.submit(
            prompts,
            request,
            limits,
            logprobs=request.logprobs,
            prompt_logprobs=_prompt_logprobs(request),
            timeout_s=timeout_s,
        )


def prompt_text(request: CompletionRequest, choice: Choice, tokenizer: Tokenizer) -> str:
    """The prompt that `choice` answers, as `echo` repeats it: text as it came, ids as they read."""
    prompt = request.prompts[choice.index // request.num_choices]
    return prompt if isinstance(prompt, str) else tokenizer.decode(choice.generation.request.token_ids)


def _prompt_logprobs(request: CompletionRequest) -> int | None:
    """How many of the likeliest tokens are to be known beside each of the prompt's; None: nothing of the prompt."""
    wanted = [request.prompt_logprobs, request.logprobs if request.echo else None]
    return max((number for number in wanted if number is not None), default=None)
