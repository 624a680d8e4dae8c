"""Window: a seat reads the last few rounds only.

Mechanism: past rounds older than `rounds` leave the conversation, with what was said in them. Drift that feeds on the
           own past (a violation that paid and is read again) loses its food.
Source:    arXiv 2510.04860 plays with a window of five rounds; here the window is a setting of the defense.
Hook:      on_history.
Cost:      negative: shorter prompts. A conversation no longer grows at its end alone, so less of it is cached.
Known failure: weights that already violate need no history; and what a seat learned to its good is forgotten too.
"""

from __future__ import annotations

from dataclasses import dataclass

from atp_rl.defenses.base import Defense
from atp_rl.types import InputError, Moment


@dataclass
class Window(Defense):
    name = "window"
    deploys = True
    needs_past = True
    rounds: int | None = None
    """Past rounds that are read, >= 0; null leaves what `scenarios.history_window` shows, which is never exceeded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds is not None and self.rounds < 0:
            raise InputError(f"defense window: `rounds` must be >= 0 or null, got {self.rounds}")

    def on_history(self, rounds: list[int], moment: Moment) -> list[int]:
        return rounds if self.rounds is None else [k for k in rounds if k >= moment.round - self.rounds]
