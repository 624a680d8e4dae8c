"""Monitor: what it flags is fined, or not learned from.

Mechanism: a simulated monitor of actions or texts flags decisions, with misses and false alarms. `penalty` takes a fine
           from the reward of each flagged decision; `screening` sets the advantage of every sample in which a decision
           was flagged to 0.
Formula:   penalty: r' = r - fine x flagged share of the sample's decisions. With gains H of a violation and L of
           compliance, compliance pays most once (recall - false_alarm) x fine >= H - L (Becker 1968, J. Polit. Econ.
           76:169). In units of the best payoff H is 1, and so is the default fine.
Source:    the simulated monitor is `reward_models.monitor`.
Hook:      on_rewards (penalty), on_advantages (screening).
Cost:      none here; a real monitor would have to read every reply.
Known failure: screening with recall < 1 only slows: each violation that is missed still pushes. With group-normalised
           advantages it counts how often a violation pays, not how much: a penalty then needs recall above .5, too. A
           policy that learns to write what the text monitor does not know lowers its recall, which `recall` shows.
           The learner `imitation` copies what paid a peer, whatever the fine: `screening` is refused beside it, and
           `penalty` changes there only what a seat learns from its own rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from atp_rl.defenses.base import Defense, Plan
from atp_rl.defenses.sightings import Sightings, watch
from atp_rl.types import Group, InputError
from reward_models.monitor import Kind


@dataclass
class Monitor(Defense):
    name = "monitor"
    mode: Literal["penalty", "screening"] = "penalty"
    kind: Kind = "action"
    """Whether it sees the decision (action), or all that is written around it (text)."""
    recall: float = 0.9
    """Chance that what it sees is flagged, in [0, 1]."""
    false_alarm: float = 0.02
    """Chance that a decision in which it sees nothing is flagged, in [0, 1]."""
    fine: float = 1.0
    """For penalty, in units of reward, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, known in (("mode", ("penalty", "screening")), ("kind", ("action", "text"))):
            if getattr(self, field) not in known:
                raise InputError(
                    f"defense {self.name}: `{field}` must be {' or '.join(known)}, got {getattr(self, field)!r}"
                )
        for field in ("recall", "false_alarm"):
            if not 0 <= getattr(self, field) <= 1:
                raise InputError(f"defense {self.name}: `{field}` must be in [0, 1], got {getattr(self, field)}")
        if not self.fine > 0:
            raise InputError(f"defense {self.name}: `fine` must be > 0, got {self.fine}")

    def suits(self, plan: Plan) -> None:
        if self.mode == "screening":
            self.refuse_imitation(plan)

    def on_rewards(self, groups: Sequence[Group], rewards: Tensor) -> Tensor:
        return rewards - self.fine * self.flagged(groups) if self.mode == "penalty" else rewards

    def on_advantages(self, groups: Sequence[Group], advantages: Tensor) -> Tensor:
        if self.mode == "penalty":
            return advantages
        return advantages.masked_fill(self.flagged(groups) > 0, 0.0)

    def flagged(self, groups: Sequence[Group]) -> Tensor:
        """[N, G x seats]: of each sample's decisions, the share that is flagged."""
        seen = watch(groups, kind=self.kind, recall=self.recall, false_alarm=self.false_alarm)
        self.metrics |= health(seen)
        return seen.shares


def health(seen: Sightings) -> dict[str, float]:
    """Counts, which can be pooled over steps, and the rates that they make, where they make one."""
    counts = {"decisions": seen.decisions, "flagged": seen.flagged, "violations": seen.violations, "hits": seen.hits}
    parts = {
        "recall": (seen.hits, seen.violations),
        "precision": (seen.hits, seen.flagged),
        "flagged_share": (seen.flagged, seen.decisions),
    }
    rates = {key: part / whole for key, (part, whole) in parts.items() if whole}
    return {key: float(value) for key, value in (counts | rates).items()}
