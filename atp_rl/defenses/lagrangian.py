"""Lagrangian: violations have a price, which rises while there are more of them than a limit.

Mechanism: each sample pays lambda x its cost, the share of its decisions that were violations or invalid. lambda
           follows the mean cost of the step, as a PID controller: in proportion (kp), by what has added up (ki), and by
           its change (kd).
Formula:   r' = r - lambda c, lambda = clip(kp e + I + kd (e - last e), 0, cap), e = mean c - limit, I += ki e. I stays
           in [0, cap], and stands still while lambda is cut off on the side that e pushes to (anti-windup). The cost of
           the step itself counts: lambda is set before its rewards are used.
Source:    arXiv 2007.03964 (PID Lagrangian); with GRPO: arXiv 2602.05863. Integral alone: `kp: 0`.
Hook:      on_rewards.
Cost:      none.
Known failure: the integral alone acts after the violations have come, then for too long; start from about 1.2 x the
           payoff gap (`warm_start`). With group-normalised advantages the size of the price counts only relative to the
           payoff gap: below it nothing changes, above it the push turns round. What the learner `imitation` copies from
           peers goes by payoff, whatever the price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from atp_rl.defenses.base import Defense
from atp_rl.samples import shares
from atp_rl.types import Group, InputError


@dataclass
class Lagrangian(Defense):
    name = "lagrangian"
    limit: float = 0.05
    """Mean cost that is aimed at, in [0, 1)."""
    kp: float = 2.0
    """Price of a unit of cost above the limit, 0 or more."""
    ki: float = 0.05
    """What a unit of cost above the limit adds to the price in each step, 0 or more."""
    kd: float = 0.0
    """Price of a unit of cost more than in the step before, 0 or more."""
    warm_start: float = 0.0
    """The integral before the first step, in units of reward, 0 or more."""
    cap: float | None = None
    """Largest price, in units of reward, > 0; null is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.limit < 1:
            raise InputError(f"defense lagrangian: `limit` must be in [0, 1), got {self.limit}")
        for field in ("kp", "ki", "kd", "warm_start"):
            if not getattr(self, field) >= 0:
                raise InputError(f"defense lagrangian: `{field}` must be 0 or more, got {getattr(self, field)}")
        if not (self.kp or self.ki or self.warm_start):
            raise InputError("defense lagrangian: one of `kp`, `ki` and `warm_start` must be > 0; leave it out instead")
        self.most = math.inf if self.cap is None else self.cap
        if not self.most > 0 or self.warm_start > self.most:
            raise InputError(f"defense lagrangian: `cap` must be > 0 and at least `warm_start`, got {self.cap}")
        self.integral = self.warm_start
        self.last_error: float | None = None

    def on_rewards(self, groups: Sequence[Group], rewards: Tensor) -> Tensor:
        costs = shares(groups, ("violation", "invalid"))
        price = self.price(costs.mean().item())
        self.metrics = {"lambda": price, "cost": costs.mean().item(), "integral": self.integral}
        return rewards - price * costs

    def price(self, cost: float) -> float:
        """lambda after one more step with this mean cost."""
        error = cost - self.limit
        change = 0.0 if self.last_error is None else error - self.last_error
        self.last_error = error

        def wanted(integral: float) -> float:
            return self.kp * error + integral + self.kd * change

        integral = min(max(self.integral + self.ki * error, 0.0), self.most)
        cut_off = wanted(integral) < 0 if error < 0 else wanted(integral) > self.most
        if not cut_off:
            self.integral = integral
        return min(max(wanted(self.integral), 0.0), self.most)

    def state(self) -> dict[str, Any]:
        return {"integral": self.integral, "last_error": self.last_error}

    def load_state(self, state: dict[str, Any]) -> None:
        self.integral, self.last_error = state["integral"], state["last_error"]
