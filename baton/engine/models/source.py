"""Where a model's files are: a local directory, or a repository of the Hugging Face hub, fetched once and kept.

Called before an engine or a router is built, on any thread; may take as long as a download. Only safetensors, JSON and
tokenizer files are fetched, never code.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from baton.common.config import BatonConfig
from baton.common.errors import ConfigError

logger = logging.getLogger(__name__)

FETCHED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
NOT_FETCHED = ["*/*", "consolidated*"]  # the same weights in another format, adapters, training states
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The directory that holds the model: `model` itself where it is a directory, else the hub's snapshot of it.

    `revision` is a commit, branch or tag of the hub repository. Progress goes to stderr. What the hub's cache has is
    used when the hub cannot be reached. Raises ConfigError naming `model` or `revision`.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ConfigError("revision", f"{model} is a local directory; a revision belongs to a model of the hub")
        return directory
    if not _HUB_ID.fullmatch(model):
        raise ConfigError("model", f"{model} is not a directory, and no id of the hub (organisation/name) either")
    try:
        path = snapshot_download(model, revision=revision, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED)
    except (OSError, ValueError) as error:
        raise ConfigError("model", _explanation(model, revision, error)) from None
    snapshot = Path(path)
    if not (snapshot / "config.json").is_file():
        raise ConfigError("model", f"the hub's {model} at {snapshot.name} holds no config.json")
    logger.info("model %s at revision %s in %s", model, snapshot.name, snapshot)
    return snapshot


def pinned(config: BatonConfig, model_dir: Path) -> BatonConfig:
    """`config` with the revision that was resolved to `model_dir`, so that every process loads the same weights."""
    if Path(config.model).expanduser().is_dir():
        return config
    commit = model_dir.name if _COMMIT.fullmatch(model_dir.name) else config.revision
    return config.model_copy(update={"revision": commit, "served_model_name": config.served_model_name or config.model})


def _explanation(model: str, revision: str | None, error: Exception) -> str:
    at = f" at revision {revision}" if revision is not None else ""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{model}{at} is not a local directory, and the hub did not give it ({type(error).__name__}: {first}). "
        "Without a connection: fetch it elsewhere and give the path of its directory"
    )
