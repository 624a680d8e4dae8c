"""Drop lone violators: a group in which exactly one sample violates is not learned from.

Mechanism: while violations are rare, nearly every violation is the only one of its group, and group normalisation gives
           it the largest advantage there is, (G-1)/sqrt(G). Such groups get advantages of 0. Belongs to
           `evolve.scale_rewards: none`, which takes the normalisation away. In a population every seat has a baseline
           of its own, so the samples of a seat in a group are a group for themselves.
Formula:   A' = 0 in groups with one sample whose share of violations is above 0. Refused beside the learner
           `imitation`, whose copies have no advantage.
Source:    arXiv 2503.20783 (Dr. GRPO) for `scale_rewards: none`; the rest is this project's own.
Hook:      on_advantages.
Cost:      none, but needs to know what a violation is.
Known failure: the push of groups with two violators or more is left, which grows as p squared: it delays tipping, and
           does not stop a policy that starts high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_rl.defenses.base import Defense, Plan
from atp_rl.samples import columns_of_adapters, shares
from atp_rl.types import Group


@dataclass
class DropLoneViolators(Defense):
    name = "drop_lone_violators"

    def suits(self, plan: Plan) -> None:
        self.refuse_imitation(plan)

    def on_advantages(self, groups: Sequence[Group], advantages: Tensor) -> Tensor:
        violating, changed = shares(groups, ("violation",)) > 0, advantages.clone()
        adapters = columns_of_adapters(groups)
        lone = torch.stack([violating[:, own].sum(1) == 1 for own in adapters], dim=1)  # [N, adapters]
        for own, dropped in zip(adapters, lone.T, strict=True):
            changed[:, own] = advantages[:, own].masked_fill(dropped.unsqueeze(1), 0.0)
        self.metrics = {"dropped_groups": lone.float().mean().item()}
        return changed
