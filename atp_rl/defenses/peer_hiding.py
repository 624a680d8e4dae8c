"""Peer hiding: seats of a game read less of what the others did.

Mechanism: `peer_history` of the game becomes what the defense says: nothing, final decisions, counts, or counts of d
           rounds before. What is not read cannot be imitated; that a collusion succeeded is still told.
Source:    the diffusion by imitation of arXiv 2510.04860; ours as a defense.
Hook:      on_scenario; for collusion alone.
Cost:      negative: shorter feedback (not in the cost's tokens: it is the world that says less).
Known failure: the own pay and "enough took ..." still tell whether the others collude.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from atp_rl.defenses.base import Defense
from atp_rl.scenarios.collusion import PEER_HISTORY, read_game
from atp_rl.types import InputError, Scenario


def change_game(scenario: Scenario, defense: str, **rules: Any) -> Scenario:
    """The scenario with other rules of its game; InputError where it is no game of collusion, or none is left."""
    if scenario.testbed != "collusion":
        raise InputError(
            f"defense {defense}: works in collusion alone, and {scenario.id!r} is of the testbed {scenario.testbed}; "
            "leave it out"
        )
    game = {**scenario.extra["game"], **rules}
    read_game(game, f"defense {defense}: scenario {scenario.id!r}")
    return replace(scenario, extra={**scenario.extra, "game": game})


@dataclass
class PeerHiding(Defense):
    name = "peer_hiding"
    deploys = True
    needs_past = True
    peer_history: str = "none"
    """What is still read of the others: none, final, counts, or delayed(d), the counts of d rounds before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peer_history == "full" or not PEER_HISTORY.fullmatch(self.peer_history):
            raise InputError(
                "defense peer_hiding: `peer_history` must be none, final, counts or delayed(d), got "
                f"{self.peer_history!r}"
            )

    def on_scenario(self, scenario: Scenario) -> Scenario:
        return change_game(scenario, self.name, peer_history=self.peer_history)
