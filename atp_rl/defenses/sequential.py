"""Three tests of one question, asked after every step: is the violation rate still p0?

Each takes counts of violations among n decisions. They differ in what they remember: nothing (`one_shot`), what speaks
for a change since it last spoke against one (`Cusum`), or everything (`EProcess`). Counts may be arrays: then as many
sequences are tested side by side.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Counts = Any
"""A number, or an array of them."""


def one_shot(violations: int, n: int, max_rate: float) -> float:
    """The exact binomial p-value of a rate above `max_rate`; 1 where nothing was asked."""
    from scipy.stats import binomtest

    return float(binomtest(violations, n, max_rate, alternative="greater").pvalue) if n else 1.0


def log_likelihood_ratio(violations: Counts, n: Counts, p0: float, p1: Counts) -> Counts:
    """log P(violations | p1) / P(violations | p0) of n decisions, in nats."""
    return violations * np.log(p1 / p0) + (n - violations) * np.log((1 - p1) / (1 - p0))


class Cusum:
    """S = max(0, S + log-likelihood ratio of p1 to p0), with an alarm from h on (Page 1954, Biometrika 41:100)."""

    def __init__(self, p0: float, p1: float, h: float) -> None:
        self.p0, self.p1, self.h = p0, p1, h
        self.restart()

    def restart(self) -> None:
        self.evidence: Counts = 0.0
        """S, in nats."""

    def update(self, violations: Counts, n: Counts) -> Any:
        """Whether the alarm is raised now."""
        self.evidence = np.maximum(0.0, self.evidence + log_likelihood_ratio(violations, n, self.p0, self.p1))
        return self.evidence >= self.h

    @property
    def at_rest(self) -> Any:
        """Whether nothing speaks for a change."""
        return self.evidence == 0

    def state(self) -> dict[str, float]:
        return {"evidence": float(self.evidence)}

    def load_state(self, state: dict[str, float]) -> None:
        self.evidence = state["evidence"]


class EProcess:
    """The wealth of a gambler who bets that the rate is above p0, at odds that are fair if it is p0.

    Of every decision of a step the wealth becomes wealth x (1 + bet (x - p0)), x = 1 for a violation. The bet is fixed
    before the step is seen, so at any rate of at most p0 the wealth is a supermartingale, and the chance that it *ever*
    reaches 1/alpha is at most alpha, however often one looks (Ville's inequality; Waudby-Smith and Ramdas,
    arXiv 2010.09686, section 4). The bet is Kelly's for the rate that the past suggests, (q - p0) / (p0 (1 - p0)), with
    which a factor is the likelihood ratio of q to p0. q is at least p0; it starts at p1 and follows the past decisions,
    of which those of a step count for `MEMORY` of those of the next one.
    """

    PRIOR = 32
    """Decisions' worth of belief in p1."""
    MEMORY = 0.8

    def __init__(self, p0: float, p1: float, alpha: float) -> None:
        self.p0, self.p1, self.alpha = p0, p1, alpha
        self.restart()

    def restart(self) -> None:
        self.evidence: Counts = 0.0
        """Log of the wealth, which is 1 at the start."""
        self.violations: Counts = 0.0
        """In the past, faded."""
        self.n: Counts = 0.0

    def update(self, violations: Counts, n: Counts) -> Any:
        """Whether the alarm is raised now."""
        suggested = (self.PRIOR * self.p1 + self.violations) / (self.PRIOR + self.n)
        self.evidence = self.evidence + log_likelihood_ratio(violations, n, self.p0, np.maximum(suggested, self.p0))
        self.violations = self.MEMORY * self.violations + violations
        self.n = self.MEMORY * self.n + n
        return self.evidence >= -math.log(self.alpha)

    @property
    def at_rest(self) -> Any:
        """Whether the bets have won nothing."""
        return self.evidence <= 0

    def state(self) -> dict[str, float]:
        return {"evidence": float(self.evidence), "violations": float(self.violations), "n": float(self.n)}

    def load_state(self, state: dict[str, float]) -> None:
        self.evidence, self.violations, self.n = state["evidence"], state["violations"], state["n"]
