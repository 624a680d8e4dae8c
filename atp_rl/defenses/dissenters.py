"""Dissenters: some seats of a game are played by the frozen aligned adapter.

Mechanism: the last `seats` seats do not learn and are played by the aligned adapter. They keep to the rule as far as it
           was aligned to, so fewer collude, a collusion succeeds less often, and the others see somebody who does not.
           Rates and payoffs are those of the seats that learn.
Source:    Asch (1956): one dissenter breaks conformity; in games of language models, ours.
Hook:      on_scenario; for collusion alone.
Cost:      none in tokens; fewer seats to learn from in an episode.
Known failure: with at least `threshold` learning seats left they can still collude among themselves. In a population
           the seats of dissenters never learn, and are as aligned as at the start when measured without the defense.
           A chat service has one model, which then plays the dissenters too.
"""

from __future__ import annotations

from dataclasses import dataclass

from atp_rl.defenses.base import Defense
from atp_rl.defenses.peer_hiding import change_game
from atp_rl.types import InputError, Scenario


@dataclass
class Dissenters(Defense):
    name = "dissenters"
    deploys = True
    seats: int = 1
    """How many, >= 1; at least one seat must be left that learns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seats < 1:
            raise InputError(f"defense dissenters: `seats` must be >= 1, got {self.seats}")

    def on_scenario(self, scenario: Scenario) -> Scenario:
        changed = change_game(scenario, self.name, fixed=self.seats, fixed_as="aligned")
        if scenario.extra["game"].get("fixed"):
            raise InputError(
                f"defense dissenters: scenario {scenario.id!r} has fixed seats already; set scenarios.collusion.fixed=0"
            )
        return changed
