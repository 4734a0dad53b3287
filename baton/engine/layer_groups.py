"""In which layer groups a prefill step announces its KV, so that the transfer runs under the compute.

The engine asks once per step that computes hand-overs, tells how long steps take, and is told by its surroundings how
fast the link is. Engine thread only; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

from baton.engine.kv_layout import KVLayout
from baton.engine.segments import split_layers

LayerGroups = tuple[tuple[int, int], ...]
_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """`message_s`: what a message costs beyond its bytes, however many are under way."""

    bytes_per_s: float
    message_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.message_s + num_bytes / self.bytes_per_s


class LayerGroupPlan(Protocol):
    def groups(self, num_blocks: int, num_tokens: int) -> LayerGroups:
        """For a step that completes `num_blocks` blocks of hand-overs and computes `num_tokens` of prompts."""
        ...

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step that computed `num_tokens` of prompts took so long."""
        ...

    def set_link(self, link: LinkSpeed) -> None: ...


class FixedGroups:
    """The same number of groups whatever the step."""

    def __init__(self, num_layers: int, num_groups: int) -> None:
        self._groups = split_layers(num_layers, num_groups)

    def groups(self, num_blocks: int, num_tokens: int) -> LayerGroups:
        del num_blocks, num_tokens
        return self._groups

    def observe(self, num_tokens: int, seconds: float) -> None:
        pass

    def set_link(self, link: LinkSpeed) -> None:
        pass


class TaperedGroups:
    """Groups that are sent while the layers behind them are computed; see `tapered`."""

    def __init__(self, layout: KVLayout, message_bytes: int, link: LinkSpeed, token_s: float) -> None:
        self._layout = layout
        self._message_bytes = message_bytes
        self._link = link
        self._token_s = token_s

    def groups(self, num_blocks: int, num_tokens: int) -> LayerGroups:
        layer_bytes = max(1, num_blocks) * self._layout.block_bytes_per_layer
        layer_s = num_tokens * self._token_s / self._layout.num_layers
        return tapered(self._layout.num_layers, layer_bytes, layer_s, self._message_bytes, self._link)

    def observe(self, num_tokens: int, seconds: float) -> None:
        self._token_s += _SMOOTHING * (seconds / num_tokens - self._token_s)

    def set_link(self, link: LinkSpeed) -> None:
        self._link = link


def tapered(num_layers: int, layer_bytes: int, layer_s: float, message_bytes: int, link: LinkSpeed) -> LayerGroups:
    """Cut [0, num_layers) so that little is left to send when the last layer is computed.

    The last group is one layer; each before it is as large as can be sent while the one behind it is computed, and as
    fits into one message. Where all of it is sent sooner than the streaming of it would cost, it is one group.
    """
    in_one = link.seconds(num_layers * layer_bytes)
    fits = num_layers * layer_bytes <= message_bytes
    if num_layers == 1 or (fits and in_one - link.seconds(layer_bytes) < link.message_s):
        return ((0, num_layers),)
    largest = max(1, message_bytes // layer_bytes)
    sizes = [1]
    while (left := num_layers - sum(sizes)) > 0:
        hidden = sizes[-1] * layer_s - link.message_s
        sendable = int(hidden * link.bytes_per_s / layer_bytes)
        # Where compute is too fast to hide a message, groups that double keep their number small.
        wanted = sendable if sendable >= 1 else 2 * sizes[-1]
        sizes.append(min(wanted, largest, left))
    return tuple(pairwise(accumulate(reversed(sizes), initial=0)))


def cuts_of(num_layers: int) -> tuple[int, ...]:
    """After how many layers a captured pass over short prompts can tell that they are launched: three groups at most.

    The first goes out early enough to have arrived when the last does, also where decoding slows it down by half.
    """
    return tuple(sorted({max(1, 2 * num_layers // 3), max(1, num_layers - 1), num_layers}))


def coarser(groups: LayerGroups, cuts: tuple[int, ...]) -> LayerGroups:
    """The groups that are announced instead of `groups` where nothing but the cuts can be told."""
    return tuple(pairwise((0, *cuts))) if len(groups) > 1 else groups
