"""Interleave: a share of every step is about keeping to the rule, not about payoff.

Mechanism: some groups of each step play scenarios of the alignment suite in the very same format, and are rewarded for
           compliance. They are on-policy as the others are, and take their place: a step has as many groups as before.
           The learner `imitation` copies nothing from them, since there payoff is not what is asked for.
Formula:   of step t floor(rho N t) - floor(rho N (t-1)) of its N groups, so over the steps exactly the share rho. Their
           reward is `reward_models.compliance`, averaged over a sample's rounds.
Source:    arXiv 2605.31328.
Hook:      on_draw, on_rewards: what it stands before in the list changes these rewards too, what it stands after does
           not.
Cost:      none beyond the groups that no longer learn from payoff.
Known failure: the two streams share their format and their families, so a policy may learn the rule there alone: read
           the held-out families. The loop's own measures of training mix both streams; `violation_rule` and
           `violation_payoff` tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atp_rl.defenses.base import Defense, Setting
from atp_rl.samples import Sample, samples_of, shares
from atp_rl.scenarios import random_stream
from atp_rl.types import Group, InputError, Scenario
from reward_models import compliance

RULE_STREAM = "rule"
"""`extra["stream"]` of a scenario that is played for compliance."""


def is_rule_stream(group: Group) -> bool:
    return group[0].scenario.extra.get("stream") == RULE_STREAM


@dataclass
class Interleave(Defense):
    name = "interleave"
    rho: float = 0.25
    """Share of the groups that play rule scenarios, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rho <= 1:
            raise InputError(f"defense interleave: `rho` must be in (0, 1], got {self.rho}")
        self.all: Sequence[Defense] = ()

    def beside(self, others: Sequence[Defense]) -> None:
        self.all = others

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        if not setting.rule_scenarios:
            raise InputError("defense interleave: no scenario of the alignment suite has a rule; leave the defense out")

    def on_draw(self, scenarios: list[Scenario]) -> list[Scenario]:
        rules, n = self.setting.rule_scenarios, self.count(len(scenarios))
        stream = random_stream(self.setting.seed, self.name, self.step)
        # runs of four stay together, as in the loop's own draw: in them names and order are counterbalanced
        order = [i for start in stream.permutation(range(0, len(rules), 4)) for i in range(start, start + 4)]
        places = [i for i in order if i < len(rules)]
        drawn = [rules[places[k % len(places)]] for k in range(n)]
        for defense in self.all:  # both streams are of one world
            drawn = [defense.on_scenario(scenario) for scenario in drawn]
        marked = [replace(scenario, extra={**scenario.extra, "stream": RULE_STREAM}) for scenario in drawn]
        return [*scenarios[: len(scenarios) - n], *marked]

    def count(self, groups: int) -> int:
        """How many of this step's groups play rule scenarios."""
        until = [math.floor(round(self.rho * groups * step, 9)) for step in (self.step - 1, self.step)]
        return until[1] - until[0]

    def on_rewards(self, groups: Sequence[Group], rewards: Tensor) -> Tensor:
        ruled = torch.tensor([is_rule_stream(group) for group in groups])
        violating = shares(groups, ("violation",))
        self.metrics["rule_groups"] = float(ruled.sum())
        for name, of in (("rule", ruled), ("payoff", ~ruled)):
            if of.any():
                self.metrics[f"violation_{name}"] = violating[of].mean().item()
        rewards = rewards.clone()
        for i in ruled.nonzero().flatten().tolist():
            rewards[i] = torch.tensor([kept(sample) for sample in samples_of(groups[i])])
        return rewards


def kept(sample: Sample) -> float:
    """The compliance reward of a sample's decisions, each read off the first reply of its round; mean over rounds."""
    firsts: dict[int, str] = {}
    for turn in sample.turns:
        firsts.setdefault(turn.round, turn.completion.text)
    scenario, texts = sample.episode.scenario, list(firsts.values())
    given = compliance(
        prompts=[""] * len(texts),
        completions=texts,
        options=[scenario.options] * len(texts),
        required=[scenario.rule] * len(texts),
    )
    return sum(value or 0.0 for value in given) / len(given)
