"""Moving anchor (control): the KL penalty to where the policy has lately been, instead of to the aligned adapter.

Mechanism: adds beta x KL(policy || anchor) per acted token to the loss. The anchor starts as the aligned adapter and
           follows the policy: after each step its weights are an exponential moving average of the policy's. What
           `kl_anchor` does beyond this is done by where its anchor is, not by smaller steps.
Formula:   beta sum_t w_t k3_t, k3 = exp(d) - d - 1, d = log anchor - log policy; anchor = decay anchor + (1 - decay)
           policy, of the adapter's matrices one by one. After a rollback the anchor is the policy that was restored.
Source:    the anchor of WARP (arXiv 2406.16768).
Hook:      extra_loss, after_update.
Cost:      one more forward without gradient over the episodes of each step, and one more adapter in memory.
Known failure: it is no defense: a drift that is slow is not resisted at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from atp_rl import ranks
from atp_rl.defenses.base import Defense, LossBatch, Plan, Setting
from atp_rl.defenses.kl_anchor import kl_to_anchor
from atp_rl.model.policy import Policy
from atp_rl.types import InputError


@dataclass
class MovingAnchor(Defense):
    name = "moving_anchor"
    beta: float = 0.2
    """Weight of the penalty, > 0."""
    decay: float = 0.9
    """Share of the anchor's weights that stays in each step, in (0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise InputError(f"defense moving_anchor: `beta` must be > 0, got {self.beta}; leave the defense out")
        if not 0 < self.decay < 1:
            raise InputError(f"defense moving_anchor: `decay` must be between 0 and 1, got {self.decay}")
        self.anchor: dict[str, Tensor] = {}

    def suits(self, plan: Plan) -> None:
        if plan.population:
            raise InputError(
                "defense moving_anchor: works for one adapter, and a population has several; set "
                "evolve.learner=policy_gradient, or leave the defense out"
            )

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        setting.policy.add_frozen(self.name)
        self._move(setting.policy, setting.policy.state())

    def extra_loss(self, batch: LossBatch) -> Tensor:
        per_token = kl_to_anchor(batch.logprobs, batch.anchor_logprobs(self.name), batch.old_logprobs, "k3")
        kl = (per_token * batch.weights).sum()
        self.metrics["kl"] = self.metrics.get("kl", 0.0) + kl.item() / batch.updates
        return self.beta * kl

    def after_update(self, policy: Policy) -> None:
        (self.metrics["kl"],) = ranks.total([self.metrics.get("kl", 0.0)])
        now = policy.state()
        self._move(policy, {key: self.decay * was + (1 - self.decay) * now[key] for key, was in self.anchor.items()})

    def on_rollback(self) -> None:
        self._move(self.setting.policy, self.setting.policy.state())

    def tensors(self) -> dict[str, Tensor]:
        return self.anchor

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._move(self.setting.policy, dict(tensors))

    def _move(self, policy: Policy, anchor: dict[str, Tensor]) -> None:
        self.anchor = anchor
        policy.set_frozen(self.name, anchor)
