"""Random routing (control): as much is flagged as by the monitor, but anywhere.

Mechanism: as `monitor`, with the flags of a step dealt out to its samples at random. What a monitor does beyond this is
           done by what it knows, not by fewer or smaller updates.
Formula:   the flagged shares of the samples, permuted over the whole step.
Source:    this project's own control.
Hook:      on_rewards (penalty), on_advantages (screening).
Cost:      none here.
Known failure: it is no defense. That a flag falls on a violation is chance: `recall` and `precision` are of the samples
           that violate and that are flagged, and near the flagged share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_rl.defenses.monitor import Monitor, health
from atp_rl.defenses.sightings import Sightings, watch
from atp_rl.samples import shares
from atp_rl.scenarios import random_stream
from atp_rl.types import Group


@dataclass
class RandomRouting(Monitor):
    name = "random_routing"

    def flagged(self, groups: Sequence[Group]) -> Tensor:
        seen = watch(groups, kind=self.kind, recall=self.recall, false_alarm=self.false_alarm).shares
        order = random_stream(self.setting.seed, self.name, self.step).permutation(seen.numel())
        dealt = seen.flatten()[torch.from_numpy(order)].view_as(seen)
        violating, flagged = shares(groups, ("violation",)) > 0, dealt > 0
        counts = [int(of.sum()) for of in (flagged, violating, flagged & violating)]
        self.metrics |= health(Sightings(dealt, dealt.numel(), *counts))
        return dealt
