"""The chat templates that come with a model, as text: read at start by server.py, run only by reader/process.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.common.errors import ConfigError
from router.model_files import read_json

DEFAULT: str = "default"
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_MAX_TEMPLATE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """`sources` by name; empty when the model has none. `tokens` are what templates may call `bos_token` and so on."""

    sources: Mapping[str, str]
    tokens: Mapping[str, object]

    @classmethod
    def load(cls, model: Path, instead: Path | None = None) -> ChatTemplates:
        """Files beside the tokenizer win over its configuration, as in transformers. Raises ConfigError.

        `instead`: a file with the only template that there is to be.
        """
        config = read_json(model / "tokenizer_config.json")
        tokens = _special_tokens(config, read_json(model / "special_tokens_map.json"))
        if instead is not None:
            return cls({DEFAULT: _read(instead, "chat_template")}, tokens)
        sources = _configured(config.get("chat_template"))
        files = {path.stem: path for path in sorted((model / "additional_chat_templates").glob("*.jinja"))}
        if (model / "chat_template.jinja").is_file():
            files[DEFAULT] = model / "chat_template.jinja"
        sources |= {name: _read(path, "model") for name, path in files.items()}
        return cls(sources, tokens)


def _configured(value: object) -> dict[str, str]:
    """One template, or a list of named ones."""
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = value if isinstance(value, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    return {name: source for name, source in pairs if isinstance(name, str) and isinstance(source, str)}


def _special_tokens(*files: Mapping[str, object]) -> dict[str, object]:
    tokens: dict[str, object] = {}
    for name in (f"{token}_token" for token in _TOKENS):
        for file in files:
            value = file.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens.setdefault(name, text)
    return tokens


def _read(path: Path, key: str) -> str:
    """`key`: the setting that is wrong where the file is."""
    try:
        content = path.read_bytes()
        if len(content) > _MAX_TEMPLATE_BYTES:
            raise ConfigError(key, f"{path} is larger than {_MAX_TEMPLATE_BYTES} bytes")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(key, f"{path} cannot be read: {error}") from None
