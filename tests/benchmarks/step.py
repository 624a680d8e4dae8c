"""A whole evolution step of `atp_rl` against TRL's GRPOTrainer playing and learning from the same episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.evolution_step import SAMPLER_MODES, EvolutionStep, counted, step_work
from tests.benchmarks.rollouts import Work, make_policy
from tests.benchmarks.timing import Contest, Report, Timed, clocked
from tests.benchmarks.trl_step import TrlStep

ROUNDS = (1, 3)
TRL_BATCH = 256
"""Rows of one forward of TRL's update; 64 and 32 took as long, to within the noise."""


def measure(repeats: int, report: Report) -> list[dict[str, Any]]:
    rows = []
    for rounds in ROUNDS:
        work = step_work(rounds)
        ways: dict[str, Timed] = {"TRL's GRPOTrainer": _trl(work)}
        ways |= {f"atp_rl, {name}": _ours(work, mode) for name, mode in SAMPLER_MODES.items()}
        for timed in ways.values():
            timed()  # what torch and transformers do once
        rows += Contest(work.name, ways).run(repeats, report).rows()
    return rows


def _trl(work: Work) -> Timed:
    step = TrlStep(work, batch_size=TRL_BATCH)

    def timed() -> tuple[float, Mapping[str, Any]]:
        seconds, played = step()
        return seconds, {**counted(played), "rollout_seconds": played.seconds}

    return timed


def _ours(work: Work, mode: Mapping[str, Any]) -> Timed:
    step = EvolutionStep(make_policy(), work, **mode)

    def run() -> Mapping[str, Any]:
        played = step().played
        return {**counted(played), "rollout_seconds": played.seconds}

    return clocked(run)
