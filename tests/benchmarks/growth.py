"""How the time of whole episodes grows with their rounds, and with the seats that play in them.

The whole history stays in the prompt. So what a sampler reads that begins at the first token of every prompt grows with
the square of the rounds; what one reads that keeps what it has read grows with the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from atp_rl.model.policy import Policy
from atp_rl.rollout import Play
from atp_rl.scenarios import load
from atp_rl.types import SamplingParams
from tests.benchmarks.rollouts import (
    Way,
    Work,
    batched_generate,
    make_policy,
    ours,
    ours_in_choice_mode,
    pick_scenarios,
)
from tests.benchmarks.timing import Contest, Report, clocked

ROUNDS = (2, 4, 8, 16, 32)
"""In 32 rounds a prompt gets as long as the tiny model's context (2048 tokens), and longer than any it has learned to
read: its answers there mean nothing, and the time that they take is the same."""

ANSWER = SamplingParams(max_new_tokens=8)
"""Cut off at the length of a valid answer, so that every round has as many tokens, also where answers mean nothing."""

SEATS = (1, 2, 4, 8, 16, 32)

WAYS: Mapping[str, Way] = {
    "batched generate": batched_generate,
    "atp_rl.rollout": ours,
    "atp_rl.rollout, choice mode": ours_in_choice_mode,
}


def rounds_work(rounds: int) -> Work:
    play = Play(rounds=rounds, supervision={"probability": 0.1}, history_window=rounds, sampling=ANSWER)
    return Work(f"8 scenarios x {rounds} rounds", pick_scenarios("held_out", 8), 1, play)


def seats_work(seats: int) -> Work:
    """Four games of three rounds, all seats played by one adapter. The game has no single seat: the other never learns
    and is played by nobody."""
    rules: dict[str, Any] = {"n": 2, "fixed": 1} if seats == 1 else {"n": seats}
    rules["threshold"] = max(1, seats // 2)
    games = load({"testbed": "collusion", "split": "train", "per_family": 1, **rules})[:4]
    play = Play(rounds=3, supervision="all_unsupervised", history_window=3, sampling=ANSWER)
    return Work(f"4 games x {seats} seat{'s' * (seats > 1)} x 3 rounds", games, 1, play)


def measure_rounds(repeats: int, report: Report) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return _measure("rounds", ROUNDS, rounds_work, repeats, report)


def measure_seats(repeats: int, report: Report) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return _measure("seats", SEATS, seats_work, repeats, report)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of value = a size^b, by least squares in the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _measure(
    what: str, sizes: Sequence[int], work_of: Callable[[int], Work], repeats: int, report: Report
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of every size, and the exponents of every way."""
    policy = make_policy()
    _contest(work_of(sizes[0]), policy).run(1, report)  # what torch and transformers do once
    contests = [_contest(work_of(size), policy).run(repeats if size < 16 else 1, report) for size in sizes]
    fits = []
    for way in WAYS:
        seconds = [min(contest.seconds[way]) for contest in contests]
        local = [exponent(sizes[i : i + 2], pair) for i, pair in enumerate(pairwise(seconds))]
        fits.append(
            {"of": what, "way": way, "sizes": sizes, "exponent": exponent(sizes, seconds), "last_doubling": local[-1]}
        )
    return [row for contest in contests for row in contest.rows()], fits


def _contest(work: Work, policy: Policy) -> Contest:
    return Contest(work.name, {way: clocked(lambda run=run: run(policy, work)._asdict()) for way, run in WAYS.items()})
