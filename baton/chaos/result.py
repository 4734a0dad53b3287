"""What a chaos run found: filled by run.py while it lasts and by judge.py after it, printed by report.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.chaos.faults import Injection
from baton.chaos.load import Stream


@dataclass(slots=True)
class Result:
    """What happened. `problems` are violations other than lost requests and wrong tokens, each in one line.

    `attempts` counts the router's attempts, also those of clients that disconnected, by outcome; `paths` its requests.
    """

    streams: list[Stream] = field(default_factory=list)
    faults: list[Injection] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    wrong: dict[int, str] = field(default_factory=dict)
    near_ties: dict[int, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)
    paths: dict[str, int] = field(default_factory=dict)
    fenced_frames: int = 0
    load_s: float = 0.0
    at_rest_s: float = 0.0
    blocks_leaked: int = 0
    processes_left: int = 0
    num_tokens: int = 0
    max_logprob_error: float = 0.0

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.wrong or self.problems or self.blocks_leaked or self.processes_left)
