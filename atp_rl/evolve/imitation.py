"""Filtered imitation: what a seat copies from the seats it can see (Imitative Strategy Diffusion in the weights)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from atp_rl.types import Group, Turn


class Copy(NamedTuple):
    """A reply that a seat learns to give where it was given."""

    seat: str
    """Who learns it."""
    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]


@dataclass(frozen=True)
class Imitation:
    """A seat copies the best-paid decisions of a group among its own and those of its models.

    Of every round of a group (the same game from the same start, played several times) the best payoff that the seat
    or one of its models was paid is looked up, and every decision that was paid so much is copied, unless all of them
    were: then the round shows nothing. The loss is the mean of -log pi(reply | prompt) over a seat's copies (filtered
    behaviour cloning), times `weight`, added to the policy gradient of the seat's own payoffs.
    """

    models: Mapping[str, Sequence[str]]
    """Whom a seat may copy."""
    weight: float

    def copies(self, groups: Sequence[Group]) -> list[Copy]:
        return [
            Copy(seat, turn.prompt_ids, turn.completion.token_ids)
            for group in groups
            for played in _rounds(group)
            for seat, models in self.models.items()
            for turn in _best_paid([turn for turn in played if turn.seat == seat or turn.seat in models])
        ]


def _rounds(group: Group) -> list[list[Turn]]:
    """The decisions of a group's episodes by round."""
    turns = [turn for episode in group for turn in episode.turns if turn.outcome.verdict is not None]
    return [[turn for turn in turns if turn.round == k] for k in sorted({turn.round for turn in turns})]


def _best_paid(turns: list[Turn]) -> list[Turn]:
    best = [turn for turn in turns if turn.outcome.payoff == max(other.outcome.payoff for other in turns)]
    return best if len(best) < len(turns) else []
