"""Covariance: the part of the advantages that goes with violations is taken out.

Mechanism: regresses the advantages of a step on what a monitor saw of the violations, and keeps the residual. To first
           order the update then does not change how often that happens.
Formula:   A' = A - Cov(A, v) / Var(v) (v - mean v) over all samples of the step that an adapter learns from (in a
           population those of one seat), v = share of a sample's decisions that an action monitor with `recall`
           flagged. Sum of A' (v - mean v) is 0. Refused beside the learner `imitation`, whose copies have no advantage.
Source:    the residual of a least-squares regression; this use of it is this project's own.
Hook:      on_advantages.
Cost:      none here; a real monitor would have to read every reply.
Known failure: with recall < 1 what was missed still pushes: the share (1 - recall) / (1 - recall p) of it is left. Only
           the mean push is gone; what the policy learns of one kind of violation may carry over to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from atp_rl.defenses.base import Defense, Plan
from atp_rl.defenses.sightings import watch
from atp_rl.samples import columns_of_adapters
from atp_rl.types import Group, InputError


def residual(advantages: Tensor, seen: Tensor) -> Tensor:
    """Advantages less what a line through `seen` (of the same shape) explains of them; unchanged where it is constant.

    In double precision, since the sum over samples is to be 0.
    """
    exact, centred = advantages.double(), seen.double() - seen.double().mean()
    variance = centred.pow(2).mean()
    if variance == 0:
        return advantages
    return (exact - (exact * centred).mean() / variance * centred).to(advantages.dtype)


@dataclass
class Covariance(Defense):
    name = "covariance"
    recall: float = 1.0
    """Share of the violations that are seen, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.recall <= 1:
            raise InputError(f"defense covariance: `recall` must be in (0, 1], got {self.recall}")

    def suits(self, plan: Plan) -> None:
        self.refuse_imitation(plan)

    def on_advantages(self, groups: Sequence[Group], advantages: Tensor) -> Tensor:
        seen = watch(groups, kind="action", recall=self.recall, false_alarm=0.0).shares
        changed = advantages.clone()
        for own in columns_of_adapters(groups):
            changed[:, own] = residual(advantages[:, own], seen[:, own])
        self.metrics = {"seen_share": seen.mean().item(), "removed": (changed - advantages).abs().mean().item()}
        return changed
