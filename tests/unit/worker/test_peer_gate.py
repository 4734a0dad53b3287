"""How many blocks a prefill worker holds for one decode worker."""

from __future__ import annotations

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.gate import PeerGate


def gate(num_peers: int = 2) -> tuple[PeerGate, list[str]]:
    made = PeerGate(num_blocks=100, share=0.5)
    made.set_num_peers(num_peers)
    return made, []


def enter(made: PeerGate, started: list[str], name: str, num_blocks: int) -> None:
    made.enter(name, name[0], num_blocks, partial(started.append, name))


def test_a_peer_that_holds_its_share_waits_and_others_go_on() -> None:
    made, started = gate()
    for name, num_blocks in (("a1", 30), ("a2", 20), ("a3", 1), ("b1", 40)):
        enter(made, started, name, num_blocks)
    assert started == ["a1", "a2", "b1"]
    made.leave("a1")
    assert started == ["a1", "a2", "b1", "a3"]


def test_a_small_one_does_not_overtake_a_large_one_of_its_peer() -> None:
    made, started = gate()
    for name, num_blocks in (("a1", 30), ("a2", 40), ("a3", 1)):
        enter(made, started, name, num_blocks)
    assert started == ["a1"]
    made.leave("a1")
    assert started == ["a1", "a2", "a3"]


def test_one_hand_over_may_exceed_the_share() -> None:
    made, started = gate()
    enter(made, started, "a1", 90)
    enter(made, started, "a2", 1)
    assert started == ["a1"]


def test_a_single_peer_may_have_all() -> None:
    made, started = gate(num_peers=1)
    enter(made, started, "a1", 60)
    enter(made, started, "a2", 40)
    enter(made, started, "a3", 1)
    assert started == ["a1", "a2"]
    made.set_num_peers(2)
    made.leave("a1")
    assert started == ["a1", "a2", "a3"]


def test_one_that_gives_up_while_it_waits_never_starts() -> None:
    made, started = gate()
    enter(made, started, "a1", 50)
    enter(made, started, "a2", 50)
    made.leave("a2")
    made.leave("a1")
    assert started == ["a1"]
    assert made.num_waiting == 0


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 60)), max_size=20), st.data())
def test_whatever_leaves_in_whatever_order_all_start_within_the_share(
    sizes: list[tuple[str, int]], data: st.DataObject
) -> None:
    made, started = gate()
    blocks = {f"{peer}{index}": num for index, (peer, num) in enumerate(sizes)}
    for name, num in blocks.items():
        enter(made, started, name, num)
    left: list[str] = []
    while len(left) < len(blocks):
        holding = [name for name in started if name not in left]
        assert holding, "everything waits for nothing"
        for peer in "ab":
            of_peer = [blocks[name] for name in holding if name[0] == peer]
            assert len(of_peer) <= 1 or sum(of_peer) <= 50
        left.append(data.draw(st.sampled_from(holding)))
        made.leave(left[-1])
    assert sorted(started) == sorted(blocks)
