"""Safe LoRA: what evolution writes outside of what alignment could write is taken out again.

Mechanism: every few steps, in each module, the update since alignment is compared with its projection on the columns of
           the aligned update; where the cosine of the two is below `tau`, the projection takes its place.
Formula:   Q = orthonormal basis of the columns of dW_al. cos = |Q Q^T D| / |D|, D = dW - dW_al. If cos < tau:
           D <- Q Q^T D. Since dW_al = Q Q^T dW_al, that is dW <- Q Q^T dW: only the factor B changes, the rank stays,
           and nothing is cut off.
Source:    Safe LoRA, arXiv 2405.16833: C = V V^T / |V|_F (an approximation of the projection), V the weights of the
           aligned model less those of the base, applied once after fine-tuning, threshold .35 in its users. Here the
           projection is exact and V is the aligned adapter's update.
Hook:      after_update.
Cost:      small decompositions of every module, every `every` steps.
Known failure: the columns are where alignment writes, not what it writes: a projected update can still undo alignment
           exactly. It forbids learning elsewhere, and between two projections nothing holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from atp_rl.defenses.base import Defense, Plan, Setting
from atp_rl.model.low_rank import as_state, column_space, combination, factors, projected, share_within
from atp_rl.model.policy import Policy
from atp_rl.types import InputError

NO_UPDATE = (
    "defense safe_lora: projects on the aligned update, and evolution starts without one; set `evolve.start_from` to "
    "aligned or to the directory of an aligned adapter"
)


@dataclass
class SafeLora(Defense):
    name = "safe_lora"
    every: int = 50
    """Steps between two projections."""
    tau: float = 0.35
    """Cosine below which a module is projected, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise InputError(f"defense safe_lora: `every` must be at least 1, got {self.every}")
        if not 0 < self.tau <= 1:
            raise InputError(f"defense safe_lora: `tau` must be in (0, 1], got {self.tau}")

    def suits(self, plan: Plan) -> None:
        if plan.from_base:
            raise InputError(NO_UPDATE)

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.aligned = factors(setting.aligned)
        self.spaces = {name: column_space(update) for name, update in self.aligned.items()}
        if not any(space.shape[1] for space in self.spaces.values()):  # an adapter that nothing has trained
            raise InputError(NO_UPDATE)

    def after_update(self, policy: Policy) -> None:
        if self.step % self.every:
            return
        now, shares, count = factors(policy.state()), list[float](), 0
        for name, update in now.items():
            device = update.up.device
            space = self.spaces[name].to(device)
            since = combination((1, update), (-1, self.aligned[name].to(device)))
            shares.append(share_within(since, space))
            if shares[-1] < self.tau:
                now[name] = projected(update, space)
                count += 1
        policy.restore(as_state(now))
        self.metrics["projected"] = count / len(now)
        self.metrics["cosine"] = sum(shares) / len(shares)
