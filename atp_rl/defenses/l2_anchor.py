"""L2 anchor and EWC: once a step, after its last update, the weights are pulled back towards the aligned ones.

Mechanism: a decoupled pull on the adapter's own weights, as AdamW's weight decay is one, but towards the aligned
           weights and not towards zero; EWC pulls each weight by how much the aligned answers depend on it.
Formula:   theta <- theta - pull x F x (theta - theta_aligned); F = 1 for l2_anchor; for ewc the diagonal of the Fisher
           information, mean over pairs of (d log pi(chosen) / d theta)^2 at the aligned adapter, divided by its mean
           over all weights, and pull x F at most 1. In units of the learning rate: pull = lr x mu.
Source:    L2-SP, arXiv 1802.01483; EWC, arXiv 1612.00796; decoupled decay, arXiv 1711.05101.
Hook:      after_update.
Cost:      none that counts; ewc once `pairs` forwards and backwards of one answer each.
Known failure: distance of the factors is not distance of what the policy does: few weights make the decision, and a
           pull weak enough to leave learning possible leaves those too. Adam moves a weight by about lr an update, so
           drift ends where pull x distance = lr x `evolve.updates_per_step`: at 1 / pull steps' worth of it. More
           updates a step weaken the pull, therefore. A pull of 1e-3 x lr is none at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_rl import ranks
from atp_rl.defenses.base import Defense, Setting
from atp_rl.defenses.pairs import Answer, answer_logprobs, apart, drawn, read_pairs
from atp_rl.model.policy import Policy
from atp_rl.types import InputError


@dataclass
class L2Anchor(Defense):
    name = "l2_anchor"
    pull: float = 0.02
    """Share of the distance to the aligned weights that each step takes back, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.pull <= 1:
            raise InputError(f"defense {self.name}: `pull` must be in (0, 1], got {self.pull}")

    def importance(self, policy: Policy) -> dict[str, Tensor] | None:
        """Of every weight, by the names of `Policy.state`; None is 1 for all."""
        return None

    def after_update(self, policy: Policy) -> None:
        importance = self.importance(policy)
        taken = 0.0
        with torch.no_grad():
            for key, weight in policy.by_key().items():
                away = weight - self.setting.aligned[key].to(weight.device)
                share = self.pull if importance is None else (self.pull * importance[key].to(away.device)).clamp(max=1)
                back = share * away
                weight -= back
                taken += float(back.square().sum())
        self.metrics["taken_back"] = taken**0.5


@dataclass
class EWC(L2Anchor):
    """As `L2Anchor`, with each weight's pull multiplied by its Fisher information; see the card of the module."""

    name = "ewc"
    needs_pairs = True
    pairs: int = 64
    """Pairs whose chosen answers the Fisher information is estimated from; all where there are fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1:
            raise InputError(f"defense ewc: `pairs` must be at least 1, got {self.pairs}")
        self.fisher: dict[str, Tensor] = {}

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        every = read_pairs(setting, self.name)
        self.chosen = [every[i].chosen for i in drawn(setting.seed, self.name, 0, len(every), self.pairs)]

    def importance(self, policy: Policy) -> dict[str, Tensor]:
        if not self.fisher:  # kept in checkpoints, so that a resumed run neither computes nor pays for it again
            now = policy.state()
            policy.restore(self.setting.aligned)
            squares = squared_gradients(policy, self.chosen)
            policy.restore(now)
            mean = sum(float(s.sum()) for s in squares.values()) / sum(s.numel() for s in squares.values())
            self.fisher = {key: square / mean for key, square in squares.items()}
        return self.fisher

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.fisher)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.fisher = dict(tensors)


def squared_gradients(policy: Policy, answers: Sequence[Answer]) -> dict[str, Tensor]:
    """Sum over the answers of the squared gradient of each one's log-probability, by the names of `Policy.state`.

    Each rank takes its part; all get the sum.
    """
    sums = [torch.zeros_like(parameter) for parameter in policy.trainable]
    with apart(policy):
        for player in policy.live:
            for answer, real in ranks.own_rows(answers):
                for parameter in policy.trainable:
                    parameter.grad = None
                answer_logprobs(policy, [answer], player).sum().backward()
                for total, parameter in zip(sums, policy.trainable, strict=True):
                    if real and parameter.grad is not None:
                        total += parameter.grad.square()
        for total, parameter in zip(sums, policy.trainable, strict=True):
            parameter.grad = total
        ranks.sum_gradients(policy.trainable)
        return {key: parameter.grad for key, parameter in policy.by_key().items() if parameter.grad is not None}
