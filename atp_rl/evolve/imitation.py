"""Filtered imitation: what a seat copies from the seats it can see (Imitative Strategy Diffusion in the weights)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from atp_rl.defenses.interleave import is_rule_stream
from atp_rl.model.policy import ALIGNED
from atp_rl.scenarios.collusion import START
from atp_rl.types import Episode, Group, Turn


class Copy(NamedTuple):
    """A reply that a seat learns to give where it was given."""

    seat: str
    """Who learns it."""
    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]


class Paid(NamedTuple):
    """A decision and what it gained: its payoff, in the multiplicative game as a share of the capital before it."""

    turn: Turn
    gain: float


@dataclass(frozen=True)
class Imitation:
    """A seat copies the best-paid decisions of a group among its own and those of its models.

    Of every round of a group (the same game from the same start, played several times) the best gain that the seat or
    one of its models made is looked up, and every decision that gained so much is copied, unless all of them did: then
    the round shows nothing. The loss is the mean of -log pi(reply | prompt) over a seat's copies (filtered behaviour
    cloning), times `weight`, added to the policy gradient of the seat's own payoffs. Seats that are scripted have no
    reply of a policy, so nobody copies them. A seat that the frozen aligned adapter plays (the defense `dissenters`)
    copies nobody and may be copied; groups that are played for compliance (`interleave`) show nothing.
    """

    models: Mapping[str, Sequence[str]]
    """Whom a seat may copy."""
    weight: float

    def copies(self, groups: Sequence[Group]) -> list[Copy]:
        return [
            Copy(seat, paid.turn.prompt_ids, paid.turn.completion.token_ids)
            for group in groups
            if not is_rule_stream(group)
            for played in _rounds(group)
            for seat, models in self.models.items()
            if not any(paid.turn.seat == seat and paid.turn.player == ALIGNED for paid in played)
            for paid in _best([paid for paid in played if paid.turn.seat == seat or paid.turn.seat in models])
        ]


def _rounds(group: Group) -> list[list[Paid]]:
    """The decisions of a group's episodes by round."""
    paid = [paid for episode in group for seat in episode.messages for paid in _decisions(episode, seat)]
    return [[p for p in paid if p.turn.round == k] for k in sorted({p.turn.round for p in paid})]


def _decisions(episode: Episode, seat: str) -> list[Paid]:
    grows = episode.scenario.extra.get("game", {}).get("reward_mode") == "multiplicative"
    capital, decisions = START, []
    for turn in episode.turns:
        if turn.seat == seat and turn.outcome.verdict is not None:
            payoff = turn.outcome.payoff
            decisions.append(Paid(turn, round(payoff / capital, 9) if grows and capital > 0 else payoff))
            capital += payoff
    return decisions


def _best(decisions: list[Paid]) -> list[Paid]:
    most = max((paid.gain for paid in decisions), default=0.0)
    best = [paid for paid in decisions if paid.gain == most]
    return best if len(best) < len(decisions) else []
