"""Which of a seat's past violations a monitor has seen: the same ones at every later moment of the episode."""

from __future__ import annotations

from atp_rl.scenarios import random_stream
from atp_rl.types import InputError, Moment


def check_recall(recall: float, defense: str) -> None:
    """Raise InputError unless it is a probability."""
    if not 0 <= recall <= 1:
        raise InputError(f"defense {defense}: `recall` must be in [0, 1], got {recall}")


def seen_violations(moment: Moment, recall: float, defense: str) -> set[int]:
    """The past rounds (from 0) whose violation a monitor sees, each with probability `recall`.

    A decision of which the rule demanded nothing is none. Drawn from the episode, the seat, the defense's name and the
    round alone.
    """
    broken = [k for k, outcome in enumerate(moment.past) if outcome.ruled and outcome.verdict == "violation"]
    return {k for k in broken if random_stream(*moment.episode, moment.seat, defense, k).random() < recall}
