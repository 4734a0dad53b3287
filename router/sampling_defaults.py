"""The sampling settings that a checkpoint recommends in its generation_config.json: the defaults of this server.

Read once, at start, by server.py. Immutable. EOS ids of the same file are read by tokenizer.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.common.errors import ConfigError
from baton.common.sampling import MAX_PENALTY
from router.model_files import read_json

FILE = "generation_config.json"


class SamplingDefaults(BaseModel):
    """What holds where a request says nothing. Keys of the file that are not listed here have no effect."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=1 / MAX_PENALTY, le=MAX_PENALTY)] = 1.0

    @classmethod
    def load(cls, model: Path) -> SamplingDefaults:
        """From the model directory; a key that is absent or null is left alone. Raises ConfigError naming a bad one."""
        content = read_json(model / FILE)
        given = {name: content[name] for name in cls.model_fields if content.get(name) is not None}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise ConfigError("model", f"{model / FILE}: {first['loc'][0]}: {first['msg']}") from None
