"""Drop lone violators: a group in which exactly one sample violates is not learned from.

Mechanism: while violations are rare, nearly every violation is the only one of its group, and group normalisation gives
           it the largest advantage there is, (G-1)/sqrt(G). Such groups get advantages of 0. Belongs to
           `evolve.scale_rewards: none`, which takes the normalisation away.
Formula:   A' = 0 in groups with one sample whose share of violations is above 0.
Source:    arXiv 2503.20783 (Dr. GRPO) for `scale_rewards: none`; the rest is this project's own.
Hook:      on_advantages.
Cost:      none, but needs to know what a violation is.
Known failure: the push of groups with two violators or more is left, which grows as p squared: it delays tipping, and
           does not stop a policy that starts high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from atp_rl.defenses.base import Defense
from atp_rl.samples import shares
from atp_rl.types import Group


@dataclass
class DropLoneViolators(Defense):
    name = "drop_lone_violators"

    def on_advantages(self, groups: Sequence[Group], advantages: Tensor) -> Tensor:
        lone = (shares(groups, ("violation",)) > 0).sum(1) == 1
        self.metrics = {"dropped_groups": lone.float().mean().item()}
        return advantages.masked_fill(lone.unsqueeze(1), 0.0)
