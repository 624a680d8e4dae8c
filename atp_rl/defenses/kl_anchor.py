"""KL anchor: a penalty on the distance to the frozen aligned adapter.

Mechanism: adds beta x KL(policy || aligned) per acted token to the loss.
Formula:   beta sum_t w_t k3_t, k3 = exp(d) - d - 1, d = log aligned - log policy (arXiv 2402.03300, eq. 4);
           `bias_corrected` multiplies k3 by the importance ratio, TRL's default.
Hook:      extra_loss. The anchor is the aligned adapter on disk, whose hash every step logs; it never moves.
Cost:      one more forward without gradient over the episodes of each step.
Known failure: with group-normalised advantages the push to violate does not shrink with the payoff gap, so a beta below
           (G-1)/sqrt(G) (2.5 at G = 8) only delays tipping under k3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from atp_rl import ranks
from atp_rl.defenses.base import Defense, LossBatch
from atp_rl.model.policy import Policy
from atp_rl.types import InputError

KLEstimator = Literal["k3", "bias_corrected"]


def kl_to_anchor(logprobs: Tensor, anchor_logprobs: Tensor, old_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate [B, A] of KL(policy || anchor): k3 = exp(d) - d - 1 with d = log anchor - log policy.

    On samples of the policy k3 is unbiased in value, but its gradient is that of KL(anchor || policy);
    `bias_corrected` multiplies by the importance ratio, which restores the gradient of KL(policy || anchor).
    """
    d = anchor_logprobs - logprobs
    k3 = d.exp() - d - 1
    return k3 if estimator == "k3" else k3 * (logprobs - old_logprobs).exp()


@dataclass
class KLAnchor(Defense):
    name = "kl_anchor"
    beta: float = 0.2
    """Weight of the penalty, > 0."""
    estimator: KLEstimator = "k3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise InputError(f"defense kl_anchor: `beta` must be > 0, got {self.beta}; leave the defense out instead")
        if self.estimator not in ("k3", "bias_corrected"):
            raise InputError(f"defense kl_anchor: `estimator` must be k3 or bias_corrected, got {self.estimator!r}")

    def extra_loss(self, batch: LossBatch) -> Tensor:
        anchor = batch.anchor_logprobs()
        kl = (kl_to_anchor(batch.logprobs, anchor, batch.old_logprobs, self.estimator) * batch.weights).sum()
        self.metrics["kl"] = self.metrics.get("kl", 0.0) + kl.item()
        return self.beta * kl

    def after_update(self, policy: Policy) -> None:
        (self.metrics["kl"],) = ranks.total([self.metrics.get("kl", 0.0)])
