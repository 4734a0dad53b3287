"""In which layer groups a step announces its KV."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.kv_layout import KVLayout
from baton.engine.layer_groups import FixedGroups, LinkSpeed, TaperedGroups, coarser, cuts_of, tapered

MIB = 1 << 20
LLAMA = KVLayout("m", "bfloat16", block_size=16, num_layers=32, num_kv_heads=8, head_dim=128)
NVLINK = LinkSpeed(200e9, 0.0002)


def sizes(groups: tuple[tuple[int, int], ...]) -> list[int]:
    return [end - start for start, end in groups]


@given(
    st.integers(1, 100),
    st.integers(1, 1 << 28),
    st.floats(0, 1),
    st.integers(4096, 1 << 25),
    st.floats(1e6, 1e12),
    st.floats(0, 0.1),
)
def test_groups_cover_all_layers_once_and_end_with_one(
    num_layers: int, layer_bytes: int, layer_s: float, message_bytes: int, bytes_per_s: float, message_s: float
) -> None:
    groups = tapered(num_layers, layer_bytes, layer_s, message_bytes, LinkSpeed(bytes_per_s, message_s))
    assert groups[0][0] == 0
    assert groups[-1][1] == num_layers
    assert all(start < end for start, end in groups)
    assert all(a[1] == b[0] for a, b in pairwise(groups))
    if len(groups) > 1:
        assert sizes(groups)[-1] == 1
        assert all(size == 1 or size * layer_bytes <= message_bytes for size in sizes(groups))


@pytest.mark.parametrize(
    ("num_tokens", "layer_s", "expected"),
    [
        (64, 0.0003, [32]),  # 8 MiB: one message
        (512, 0.0005, [15, 16, 1]),
        (2048, 0.0016, [3, 4, 4, 4, 4, 4, 4, 4, 1]),
        (8192, 0.0066, [1] * 32),
    ],
)
def test_groups_of_an_8b_model(num_tokens: int, layer_s: float, expected: list[int]) -> None:
    layer_bytes = num_tokens // 16 * LLAMA.block_bytes_per_layer
    assert sizes(tapered(32, layer_bytes, layer_s, 32 * MIB, NVLINK)) == expected


def test_a_group_is_sent_while_the_one_behind_it_is_computed() -> None:
    slow = LinkSpeed(10e9, 0.0002)
    layer_bytes, layer_s = 2 * MIB, 0.001
    groups = sizes(tapered(32, layer_bytes, layer_s, 32 * MIB, slow))
    for size, behind in pairwise(groups):
        assert slow.seconds(size * layer_bytes) <= behind * layer_s


def test_what_is_measured_changes_the_groups() -> None:
    plan = TaperedGroups(LLAMA, 32 * MIB, NVLINK, token_s=30e-6)
    before = plan.groups(num_blocks=32, num_tokens=512)
    plan.set_link(LinkSpeed(5e9, 0.0002))
    slow = plan.groups(num_blocks=32, num_tokens=512)
    assert len(slow) > len(before)
    for _ in range(100):
        plan.observe(512, 512 * 3e-3)
    assert len(plan.groups(num_blocks=32, num_tokens=512)) < len(slow)


def test_a_fixed_number_of_groups_stays() -> None:
    plan = FixedGroups(32, 4)
    plan.observe(1, 1.0)
    plan.set_link(NVLINK)
    assert sizes(plan.groups(1, 16)) == sizes(plan.groups(1000, 16000)) == [10, 10, 11, 1]


@given(st.integers(1, 100))
def test_a_captured_pass_is_cut_before_its_last_layers_and_at_its_end(num_layers: int) -> None:
    cuts = cuts_of(num_layers)
    assert cuts == tuple(sorted(set(cuts)))
    assert 1 <= cuts[0] <= cuts[-1] == num_layers
    assert len(cuts) == min(3, num_layers) or num_layers < 6


def test_what_is_announced_in_one_stays_so_and_groups_become_those_of_the_cuts() -> None:
    assert cuts_of(32) == (21, 31, 32)
    assert coarser((), (21, 31, 32)) == ()
    assert coarser(((0, 32),), (21, 31, 32)) == ((0, 32),)
    assert coarser(((0, 10), (10, 20), (20, 31), (31, 32)), (21, 31, 32)) == ((0, 21), (21, 31), (31, 32))
