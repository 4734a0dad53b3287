"""What the bodies of /v1/completions and /v1/chat/completions have in common beside the sampling settings. Pure."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PrivateAttr

from baton.common.errors import InvalidRequest
from router.sampling_fields import SamplingFields


class StreamOptions(BaseModel):
    """`include_usage`: one more chunk with the usage. `continuous_usage_stats`: the usage so far in every chunk."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class RequestFields(SamplingFields):
    """Base of both request models. None stands for the default, as in OpenAI's API."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None
    _num_ignored_fields: int = PrivateAttr(0)

    @property
    def num_ignored_fields(self) -> int:
        """Fields of the body that nobody knows."""
        return self._num_ignored_fields

    @property
    def stream_usage(self) -> StreamOptions:
        """Which usage the chunks of a stream are to carry."""
        return self.stream_options or StreamOptions()

    def accepted(self, num_ignored_fields: int) -> None:
        """To be called once. Raises InvalidRequest where what a field may be depends on another one."""
        self._num_ignored_fields = num_ignored_fields
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true", "stream_options")
        if self.stream_usage.continuous_usage_stats and not self.stream_usage.include_usage:
            raise InvalidRequest("continuous_usage_stats is only allowed with include_usage", "stream_options")
