"""Weights reach their place from one file or many; what is missing, strange or misshapen is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.common.errors import ConfigError
from baton.engine.models.config import load_model_config
from baton.engine.models.decoder import Decoder
from baton.engine.models.loader import fill_random, load_checkpoint, model_hash
from tests.support.tiny_model import make_tiny_llama

CPU = torch.device("cpu")


def empty_model(model_dir: Path) -> Decoder:
    return Decoder(load_model_config(model_dir), 64, torch.float32, CPU)


def rewrite(model_dir: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors."""
    weights = load_file(model_dir / "model.safetensors")
    for name, tensor in change.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, model_dir / "model.safetensors")


def shard(model_dir: Path) -> None:
    weights = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    names = sorted(weights)
    where = {name: f"model-{1 + n % 3}-of-3.safetensors" for n, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, model_dir / file)
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_equal_one_file(tmp_path: Path) -> None:
    one, many = (make_tiny_llama(tmp_path / name) for name in ("one", "many"))
    shard(many)
    models = [empty_model(one), empty_model(many)]
    for model, path in zip(models, (one, many), strict=True):
        load_checkpoint(model, path)
    views = [model.checkpoint_views() for model in models]
    expected = load_file(one / "model.safetensors")
    assert set(views[0]) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(views[0][name], tensor)
        assert torch.equal(views[1][name], tensor)
    (many / "model-2-of-3.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks model-2-of-3\.safetensors"):
        load_checkpoint(models[1], many)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../secret.safetensors"}}'])
def test_a_strange_index_is_refused(tmp_path: Path, index: str) -> None:
    make_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match="index"):
        load_checkpoint(empty_model(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"lm_head.weight": None}, r"lacks lm_head\.weight"),
        ({"model.layers.3.mlp.up_proj.weight": torch.zeros(1)}, r"does not have: model\.layers\.3"),
        ({"model.norm.weight": torch.zeros(65)}, r"model\.norm\.weight is \[65\], config\.json says \[64\]"),
        ({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, r"model\.norm\.weight has type torch\.int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    make_tiny_llama(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(empty_model(tmp_path), tmp_path)


def test_tensors_that_follow_from_others_are_ignored(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, tie_word_embeddings=True)
    rewrite(
        tmp_path, {"lm_head.weight": torch.zeros(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    )
    model = empty_model(tmp_path)
    load_checkpoint(model, tmp_path)
    assert model.lm_head is model.embed


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02}")
    with pytest.raises(ConfigError, match="not a valid safetensors file"):
        load_checkpoint(empty_model(tmp_path), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"neither model\.safetensors"):
        load_checkpoint(empty_model(tmp_path), tmp_path)


def test_random_weights_fill_everything_and_repeat(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, attention_bias=True)
    models = [empty_model(tmp_path) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        for view in model.checkpoint_views().values():
            view.fill_(torch.nan)
        fill_random(model, seed)
    first, again, other = (model.checkpoint_views() for model in models)
    assert all(torch.equal(first[name], again[name]) and first[name].isfinite().all() for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_hash_names_weights_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, same, other_weights = (make_tiny_llama(tmp_path / n, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    other_constant = make_tiny_llama(tmp_path / "d", seed=1, rope_theta=500.0)

    def name(path: Path) -> str:
        return model_hash(load_model_config(path), path)

    assert name(base) == name(same)
    assert len({name(base), name(other_weights), name(other_constant)}) == 3
    # A file too large to read whole is sampled: the same rules hold for a change that a sample sees.
    monkeypatch.setattr("baton.engine.models.loader.WHOLE_FILE_BYTES", 1000)
    assert name(base) == name(same)
    assert name(base) != name(other_weights)
