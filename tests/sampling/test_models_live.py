"""Every model family served on both paths: greedy tokens in float32 are those of transformers."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.sampling.live import live
from tests.support.family_checkpoints import write_family
from tests.support.oracle import GreedyOracle
from tests.transfer.handover_cluster import prompt

pytestmark = pytest.mark.asyncio(loop_scope="session")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 24},
    "mistral": {"sliding_window": None, "num_key_value_heads": 1},
    "qwen2": {"tie_word_embeddings": True, "num_attention_heads": 3, "hidden_size": 66, "num_key_value_heads": 1},
    "qwen3": {"head_dim": 40, "num_attention_heads": 6, "num_key_value_heads": 3},
}
LENGTHS = (1, 16, 17, 100)  # tokens: the shortest, exactly one block, one more, several chunks


def write_checkpoint(path: Path, family: str, tokenizer_of: Path) -> None:
    write_family(path, family, seed=4, shard_size="60KB", **FAMILIES[family])
    assert len(list(path.glob("*.safetensors"))) > 1
    for file in tokenizer_of.glob("tokenizer*.json"):
        shutil.copy(file, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 5], "temperature": 0.5}))


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_tokens_over_both_paths_in_mixed_batches(tmp_path: Path, model: Path, family: str) -> None:
    """The checkpoint is in several files, and has two EOS ids and sampling defaults, which greedy requests override."""
    write_checkpoint(tmp_path, family, model)
    oracle = GreedyOracle.load(tmp_path)
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    async with live(tmp_path) as cluster:
        asked = {"max_tokens": 32, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answers = await asyncio.gather(
            *(
                server.complete(prompt=token_ids, **asked)
                for server in cluster.servers.values()
                for token_ids in prompts
            )
        )
        for index, answer in enumerate(answers):
            (choice,) = answer["choices"]
            assert len(choice["token_ids"]) == 32
            oracle.check(prompts[index % len(prompts)], choice["token_ids"])
        assert oracle.near_ties <= 4
        server = cluster.servers["local"]
        for eos_id in (257, 5):
            (choice,) = (await server.complete(prompt="a", logit_bias={str(eos_id): 100}))["choices"]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", eos_id)
        (card,) = (await server.http.get("/v1/models")).json()["data"]
        assert card["sampling_defaults"]["temperature"] == 0.5
        await cluster.at_rest()
