"""How many workers of each role a configuration gives on a machine."""

from __future__ import annotations

import pytest

from baton.cluster.layout import DECODE, PREFILL, choose_layout
from baton.common.config import BatonConfig
from baton.common.errors import ConfigError


def config(**cluster: object) -> BatonConfig:
    return BatonConfig.model_validate({"model": "m", "cluster": cluster})


@pytest.mark.parametrize(
    ("cluster", "num_gpus", "expected"),
    [
        ({}, 0, (1, 1, "cpu")),
        ({}, 1, (0, 1, "cuda")),
        ({}, 2, (1, 1, "cuda")),
        ({}, 5, (2, 3, "cuda")),
        ({"device": "cpu"}, 4, (1, 1, "cpu")),
        ({"prefill": 0}, 0, (0, 1, "cpu")),
        ({"prefill": 0}, 4, (0, 4, "cuda")),
        ({"prefill": 1}, 4, (1, 3, "cuda")),
        ({"decode": 1}, 4, (3, 1, "cuda")),
        ({"decode": 1}, 1, (0, 1, "cuda")),
        ({"prefill": 3, "decode": 2}, 0, (3, 2, "cpu")),
        ({"prefill": 1, "decode": 1}, 8, (1, 1, "cuda")),
    ],
)
def test_the_layout_follows_the_machine_where_nothing_is_said(
    cluster: dict[str, object], num_gpus: int, expected: tuple[int, int, str]
) -> None:
    layout = choose_layout(config(**cluster), num_gpus)
    assert (layout.num_prefill, layout.num_decode, layout.device) == expected
    assert layout.roles() == [DECODE] * expected[1] + [PREFILL] * expected[0]


@pytest.mark.parametrize(
    ("cluster", "num_gpus", "key", "words"),
    [
        ({"prefill": 2, "decode": 1}, 2, "cluster.decode", "need 3 GPUs, the cluster has 2"),
        ({"prefill": 2}, 2, "cluster.decode", "2 prefill and 1 decode"),
        ({"decode": 5}, 4, "cluster.decode", "need 5 GPUs"),
        ({"device": "cuda"}, 0, "cluster.device", "use --device cpu"),
    ],
)
def test_more_than_the_machine_has_is_refused(cluster: dict[str, object], num_gpus: int, key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        choose_layout(config(**cluster), num_gpus)
    assert error.value.key == key
