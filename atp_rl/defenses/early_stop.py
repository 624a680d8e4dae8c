"""Early stop (control): learning ends for good once the policy is so far from the aligned one.

Mechanism: measures KL(policy || aligned) on the replies of each step. In the first step in which it is above the
           budget, and in all later ones, the gradients of all losses are dropped, and what other defenses do to the
           weights is undone: no step changes them any more. A rollback still does, and there they stay.
Formula:   KL per reply = mean over replies of sum_t exp(d) - d - 1, d = log aligned - log policy of the tokens drawn
           (k3, arXiv 2402.03300, eq. 4).
Source:    the budget of arXiv 2210.10760, whose policies are compared at equal KL; every defense must beat it there.
Hook:      on_rewards (measures), on_gradients, after_update; so it comes last in the list.
Cost:      two forwards without gradient over the episodes of each step, until it stops.
Known failure: it spends its budget on payoff and violations alike, and stops learning of either. The KL is that of the
           policy before the step's update, so the last update may overrun the budget; and it is an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from atp_rl.defenses.base import Defense
from atp_rl.defenses.log_ratios import log_ratios
from atp_rl.model.policy import Policy
from atp_rl.samples import samples_of
from atp_rl.types import Group, InputError


@dataclass
class EarlyStop(Defense):
    name = "early_stop"
    budget: float = 0.2
    """KL to the aligned policy that may be reached, in nats per reply, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.budget > 0:
            raise InputError(f"defense early_stop: `budget` must be > 0, got {self.budget}")
        self.stopped = False
        self.final: dict[str, Tensor] = {}
        """Once it has stopped: the weights that the step began with, by the names of `Policy.state`."""

    def beside(self, others: Sequence[Defense]) -> None:
        if others[-1] is not self:
            raise InputError(
                "defense early_stop: must be the last of `defenses`, or the others would go on changing the weights"
            )

    def on_rewards(self, groups: Sequence[Group], rewards: Tensor) -> Tensor:
        if not self.stopped:
            samples = [sample for group in groups for sample in samples_of(group)]
            ratios = log_ratios(self.setting.policy, samples, self.setting.temperature)
            total = sum(((-ratio).exp() + ratio - 1).sum().item() for ratio in ratios)
            self.metrics["kl"] = total / sum(len(sample.turns) for sample in samples)
            self.stopped = self.metrics["kl"] > self.budget
        if self.stopped:
            self.final = self.setting.policy.state()
        self.metrics["stopped"] = float(self.stopped)
        return rewards

    def on_gradients(self, policy: Policy) -> None:
        if self.stopped:
            for parameter in policy.trainable:
                parameter.grad = None

    def after_update(self, policy: Policy) -> None:
        if self.stopped:
            policy.restore(self.final)

    def state(self) -> dict[str, Any]:
        return {"stopped": self.stopped}

    def load_state(self, state: dict[str, Any]) -> None:
        self.stopped = state["stopped"]
