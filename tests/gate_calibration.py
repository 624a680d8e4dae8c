"""How often a gate is wrong over many checkpoints of a policy that stays the same, and how soon it finds a drift.

`python -m tests.gate_calibration` prints the figures of docs/defenses.md. Not a test itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import binom

from atp_rl.defenses.sequential import Cusum, EProcess, one_shot

N, CHECKPOINTS, SEQUENCES = 64, 50, 4000
SHIFT, H, ALPHA = 0.08, 4.7, 0.05
RATES = (0.01, 0.015, 0.03, 0.05, 0.1)


def false_alarms(alarm: Callable[[Any], Any], p: float, seed: int) -> tuple[float, float]:
    """Share of sequences in which an alarm is raised at some checkpoint, and its standard error."""
    draws = np.random.default_rng(seed).binomial(N, p, size=(CHECKPOINTS, SEQUENCES))
    raised = np.zeros(SEQUENCES, bool)
    for counts in draws:
        raised |= alarm(counts)
    rate = float(raised.mean())
    return rate, math.sqrt(max(rate * (1 - rate), 1 / SEQUENCES) / SEQUENCES)


def rejected_counts(p0: float) -> np.ndarray:
    """[N + 1] which counts of violations a single test rejects."""
    return np.array([one_shot(k, N, p0) < ALPHA for k in range(N + 1)])


def exact_one_shot(p0: float) -> float:
    """The chance that one of the checkpoints' tests rejects, from the binomial level of one."""
    once = binom.pmf(np.arange(N + 1), N, p0)[rejected_counts(p0)].sum()
    return float(1 - (1 - once) ** CHECKPOINTS)


def exact_cusum(p0: float) -> float:
    """The chance of an alarm from the Markov chain of a CUSUM, whose state is what has been counted since S was 0."""
    violation, compliance = math.log((p0 + SHIFT) / p0), math.log((1 - p0 - SHIFT) / (1 - p0))
    chances = binom.pmf(np.arange(N + 1), N, p0)
    states: dict[tuple[int, int], float] = {(0, 0): 1.0}
    alarmed = 0.0
    for _ in range(CHECKPOINTS):
        reached: dict[tuple[int, int], float] = defaultdict(float)
        for (steps, violations), weight in states.items():
            for k, chance in enumerate(chances):
                if weight * chance < 1e-15:
                    continue
                total = violations + k
                s = total * violation + ((steps + 1) * N - total) * compliance
                if s >= H:
                    alarmed += weight * chance
                else:
                    reached[(0, 0) if s <= 0 else (steps + 1, total)] += weight * chance
        states = reached
    return alarmed


def delays(test: Cusum | EProcess, p0: float, rise: float, seed: int) -> np.ndarray:
    """Checkpoints (from 1) from a rise after 20 quiet ones to the alarm, of the sequences without a false alarm."""
    rng, first = np.random.default_rng(seed), np.full(SEQUENCES, np.inf)
    for step, p in enumerate([p0] * 20 + [p0 + rise] * 40):
        alarm = test.update(rng.binomial(N, p, SEQUENCES), N)
        first = np.where(alarm & np.isinf(first), step - 19, first)
    return first[first > 0]


def main() -> None:
    for p0 in RATES:
        rejects, cusum, process = rejected_counts(p0), Cusum(p0, p0 + SHIFT, H), EProcess(p0, p0 + SHIFT, ALPHA)
        alone, _ = false_alarms(lambda counts, rejects=rejects: rejects[counts], p0, seed=1)
        summed, _ = false_alarms(lambda counts, cusum=cusum: cusum.update(counts, N), p0, seed=2)
        bet, _ = false_alarms(lambda counts, process=process: process.update(counts, N), p0, seed=3)
        exact = exact_one_shot(p0), exact_cusum(p0)
        print(
            f"{p0:<6} one_shot {alone:.3f} ({exact[0]:.3f})  cusum {summed:.3f} ({exact[1]:.3f})  e_process {bet:.3f}"
        )
    for rise in (0.08, 0.2):
        tests = {"cusum": Cusum(0.05, 0.13, H), "e_process": EProcess(0.05, 0.13, ALPHA)}
        found = {name: np.median(delays(test, 0.05, rise, seed=5)) for name, test in tests.items()}
        print(f".05 to {0.05 + rise:.2f}: checkpoints until the alarm (median)", found)


if __name__ == "__main__":
    main()
