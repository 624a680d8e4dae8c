"""What of an episode is learned from: a sample gets one reward and one advantage, a row is what the model is given."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atp_rl.model.policy import ALIGNED
from atp_rl.types import Episode, Group, Turn, Verdict


class Sample(NamedTuple):
    """One seat's part in an episode: what gets one reward and one advantage."""

    episode: Episode
    seat: str
    turns: list[Turn]


class Row(NamedTuple):
    """One stretch of tokens to train on: all rounds of an episode whose histories continue one another."""

    ids: tuple[int, ...]
    acted: tuple[int, ...]
    """Positions of the tokens that the policy drew."""
    logprobs: tuple[float, ...]
    """Of those tokens, as the sampler reported them."""

    player: str
    """The adapter that drew them, and that learns from them."""


def samples_of(group: Group) -> list[Sample]:
    """The seats of a group's episodes that learn, by episode, then by seat: the columns of rewards and advantages."""
    return [
        Sample(episode, seat, turns)
        for episode in group
        for seat in episode.messages
        if (turns := [turn for turn in episode.turns if turn.seat == seat]) and turns[0].player != ALIGNED
    ]


def shares(groups: Sequence[Group], verdicts: Collection[Verdict]) -> Tensor:
    """[N, G x seats]: of each sample's decisions to which the rule applied, the share with one of these verdicts.

    0 for a sample without such a decision.
    """

    def share(sample: Sample) -> float:
        found = [t.outcome.verdict for t in sample.turns if t.outcome.verdict is not None and t.outcome.ruled]
        return sum(verdict in verdicts for verdict in found) / max(1, len(found))

    return torch.tensor([[share(sample) for sample in samples_of(group)] for group in groups])


def columns_of_adapters(groups: Sequence[Group]) -> list[list[int]]:
    """The columns of rewards and advantages by the adapter that learns from them: one set, in a population one a seat.

    In a row, those of one adapter are the samples that share a baseline.
    """
    columns: dict[str, list[int]] = {}
    for i, sample in enumerate(samples_of(groups[0])):
        columns.setdefault(sample.turns[0].player, []).append(i)
    return list(columns.values())


def training_rows(turns: Sequence[Turn]) -> list[Row]:
    """The rows of one seat's turns: one where every round only appended, more where the history window cut it."""
    rows: list[Row] = []
    for turn in turns:
        reply = turn.completion.token_ids
        before = rows[-1] if rows else Row((), (), (), turn.player)
        if not rows or turn.prompt_ids[: len(before.ids)] != before.ids:
            before = Row((), (), (), turn.player)
            rows.append(before)
        start = len(turn.prompt_ids)
        rows[-1] = Row(
            ids=(*turn.prompt_ids, *reply),
            acted=(*before.acted, *range(start, start + len(reply))),
            logprobs=(*before.logprobs, *turn.completion.logprobs),
            player=turn.player,
        )
    return rows
