"""Context reset: after a violation that a monitor sees, the seat starts from an empty conversation.

Mechanism: a monitor sees each past violation with probability `recall`; the last one that it saw, and all rounds before
           it, are read no more. So a conversation that has gone wrong does not go on; with `window` and
           `memory_filter` this is the third way to forget, and the only one that also forgets what led there.
Source:    ours; what a service does that ends a conversation after an alarm and lets a new one begin.
Hook:      on_history.
Cost:      negative: shorter prompts.
Known failure: weights that violate on the first round violate after every reset; a violation in a missed round stays in
           sight until a later one is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from atp_rl.defenses.base import Defense
from atp_rl.defenses.seen_violations import check_recall, seen_violations
from atp_rl.types import Moment


@dataclass
class ContextReset(Defense):
    name = "context_reset"
    deploys = True
    needs_past = True
    recall: float = 1.0
    """Share of the violations that the monitor sees, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_recall(self.recall, self.name)

    def on_history(self, rounds: list[int], moment: Moment) -> list[int]:
        last = max(seen_violations(moment, self.recall, self.name), default=-1)
        return [k for k in rounds if k > last]
