"""KL anchor: a penalty on the distance to the frozen aligned adapter.

Mechanism: adds beta x KL(policy || aligned) to the loss of each acted token (k3, bias_corrected), or takes beta times
           the log-ratio of all that a sample drew from its reward (reward).
Formula:   beta sum_t w_t k3_t, k3 = exp(d) - d - 1, d = log aligned - log policy (arXiv 2402.03300, eq. 4);
           `bias_corrected` multiplies k3 by the importance ratio, TRL's default. `reward`: r' = r + beta sum_t d_t.
           With a target, beta x= 1 + .1 clip(kl / target - 1, -.2, .2) after each step (arXiv 1909.08593, section 2)
           that has something to hold.
Hook:      extra_loss or on_rewards. The anchor is the aligned adapter on disk, whose hash every step logs; it never
           moves.
Cost:      one more forward without gradient over the episodes of each step; two for `reward`.
Known failure: with group-normalised advantages the push to violate does not shrink with the payoff gap, so a beta below
           (G-1)/sqrt(G) (2.5 at G = 8) only delays tipping under k3. In the reward, a group whose samples differ in
           nothing else is normalised too: noise of the log-ratio is then learned from at full size; and what the
           learner `imitation` copies goes by payoff, whatever was taken from the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from atp_rl import ranks
from atp_rl.defenses.base import Defense, LossBatch
from atp_rl.defenses.interleave import Interleave, is_rule_stream
from atp_rl.defenses.log_ratios import log_ratios
from atp_rl.model.policy import Policy
from atp_rl.samples import samples_of
from atp_rl.types import Group, InputError

KLEstimator = Literal["k3", "bias_corrected", "reward"]


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
    """Weight of the penalty, > 0; at the start where it is adjusted."""
    estimator: KLEstimator = "k3"
    target_kl: float | None = None
    """KL that beta is adjusted to, in nats, > 0: per acted token, as the loss weights them; of `reward` per sample.
    Null leaves beta as it is."""
    streams: Literal["all", "rule"] = "all"
    """Whose tokens or samples are held: all, or those of the rule scenarios that `interleave` mixes in."""
    rollback_factor: float = 1.0
    """What beta is multiplied with at each rollback, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise InputError(f"defense kl_anchor: `beta` must be > 0, got {self.beta}; leave the defense out instead")
        if self.estimator not in ("k3", "bias_corrected", "reward"):
            raise InputError(
                f"defense kl_anchor: `estimator` must be k3, bias_corrected or reward, got {self.estimator!r}"
            )
        if self.streams not in ("all", "rule"):
            raise InputError(f"defense kl_anchor: `streams` must be all or rule, got {self.streams!r}")
        if self.target_kl is not None and not self.target_kl > 0:
            raise InputError(f"defense kl_anchor: `target_kl` must be > 0, got {self.target_kl}")
        if not self.rollback_factor > 0:
            raise InputError(f"defense kl_anchor: `rollback_factor` must be > 0, got {self.rollback_factor}")
        self.weight = self.beta
        """beta as it is now."""
        self.held: Tensor | None = None
        """[N] which groups of the step are held; None is all."""

    def beside(self, others: Sequence[Defense]) -> None:
        if self.streams == "all":
            return
        if not any(isinstance(other, Interleave) for other in others):
            raise InputError("defense kl_anchor: `streams: rule` needs the defense interleave, which mixes them in")
        before = takewhile(lambda other: other is not self, others)
        if self.estimator == "reward" and not any(isinstance(other, Interleave) for other in before):
            raise InputError(
                "defense kl_anchor: `estimator: reward` with `streams: rule` must stand behind interleave in the list, "
                "which sets the rewards of its groups anew"
            )

    @property
    def _idle(self) -> bool:
        """Whether the step has no group that is held, so that nothing is paid or measured."""
        return self.held is not None and not bool(self.held.any())

    def on_rewards(self, groups: Sequence[Group], rewards: Tensor) -> Tensor:
        if self.streams == "rule":
            self.held = torch.tensor([is_rule_stream(group) for group in groups])
        if self.estimator != "reward" or self._idle:
            return rewards
        held = [samples_of(group) for i, group in enumerate(groups) if self.held is None or self.held[i]]
        ratios = log_ratios(self.setting.policy, [s for samples in held for s in samples], self.setting.temperature)
        kl = torch.zeros_like(rewards)
        kl[slice(None) if self.held is None else self.held] = torch.tensor([r.sum().item() for r in ratios]).view(
            len(held), -1
        )
        self.metrics["kl"] = kl.sum().item() / len(ratios)
        return rewards - self.weight * kl

    def extra_loss(self, batch: LossBatch) -> Tensor | None:
        if self.estimator == "reward" or self._idle:
            return None
        per_token = kl_to_anchor(batch.logprobs, batch.anchor_logprobs(), batch.old_logprobs, self.estimator)
        if self.held is not None:
            per_token = per_token * self.held.to(per_token.device)[batch.groups].unsqueeze(1)
        kl = (per_token * batch.weights).sum()
        self.metrics["kl"] = self.metrics.get("kl", 0.0) + kl.item() / batch.updates
        return self.weight * kl

    def after_update(self, policy: Policy) -> None:
        self.metrics["beta"] = self.weight
        if self._idle:
            return
        if self.estimator != "reward":  # of which this rank has counted its rows
            (self.metrics["kl"],) = ranks.total([self.metrics.get("kl", 0.0)])
        if self.target_kl is not None:
            error = self.metrics["kl"] / self.target_kl - 1
            self.weight *= 1 + 0.1 * min(max(error, -0.2), 0.2)

    def on_rollback(self) -> None:
        self.weight *= self.rollback_factor

    def state(self) -> dict[str, Any]:
        return {"beta": self.weight}

    def load_state(self, state: dict[str, Any]) -> None:
        self.weight = state["beta"]
