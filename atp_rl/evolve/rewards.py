"""From episodes to rewards: what reward models are shown of each round, and what becomes of their answers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reward_models
from atp_rl import ranks
from atp_rl.samples import Sample, samples_of
from atp_rl.types import Group, Message, Turn
from reward_models import RewardModel


class _Round(NamedTuple):
    """One decision of one seat."""

    sample: Sample
    number: int
    turns: list[Turn]
    read: list[Message]
    """The conversation up to the first of these turns."""


def shape(
    groups: Sequence[Group],
    weights: Mapping[str, float],
    models: Mapping[str, RewardModel] = reward_models.REWARD_MODELS,
) -> Tensor:
    """Rewards [N, G x seats]: the weighted sum of the reward models, averaged over a seat's rounds.

    What a reward model reads of a round is the conversation up to its first reply, that reply (the decision, also where
    it called a tool), and the sum of what the round paid. Where one could not tell, the reply gets the mean of what it
    gave to the group in that round, so that it is neither better nor worse.

    Args:
        models: by name; the first rank asks them and tells the others.
    """
    samples = [sample for group in groups for sample in samples_of(group)]
    if len({len(samples_of(group)) for group in groups}) > 1:
        raise RuntimeError("groups of different numbers of learning seats have no common shape of rewards")
    parts = [_rounds(sample) for sample in samples]
    rounds = [one for part in parts for one in part]
    scenarios = [one.sample.episode.scenario for one in rounds]
    columns: dict[str, list[Any]] = {
        "prompts": [one.read for one in rounds],
        "completions": [one.turns[0].completion.text for one in rounds],
        "options": [list(scenario.options) for scenario in scenarios],
        "required": [scenario.rule for scenario in scenarios],
        "payoffs": [dict(scenario.payoffs) for scenario in scenarios],
        "payoff": [sum(turn.outcome.payoff for turn in one.turns) for one in rounds],
        "payoff_unit": [scenario.payoff_unit for scenario in scenarios],
        "key": [(*one.sample.episode.seed, one.sample.seat, one.number) for one in rounds],
    }
    per_group = len(samples) // len(groups)
    places = [(i // per_group, one.number) for i, part in enumerate(parts) for one in part]
    total = torch.zeros(len(rounds))
    for name, weight in weights.items():
        values = ranks.from_first(partial(models[name], **columns))
        total += weight * torch.tensor(with_means(values, places), dtype=torch.float32)
    rewards = [part.mean() for part in total.split([len(part) for part in parts])]
    return torch.stack(rewards).view(len(groups), -1)


def _rounds(sample: Sample) -> list[_Round]:
    read = before_each_reply(sample.episode.messages[sample.seat], sample.turns)
    found: list[_Round] = []
    for turn, messages in zip(sample.turns, read, strict=True):
        if found and found[-1].number == turn.round:
            found[-1].turns.append(turn)
        else:
            found.append(_Round(sample, turn.round, [turn], messages))
    return found


def before_each_reply(messages: Sequence[Message], turns: Sequence[Turn]) -> list[list[Message]]:
    """For each of a seat's turns, in order, its whole conversation up to that reply.

    Past rounds are all there, also those that had left the history window when the policy replied.

    Args:
        messages: the seat's, of `Episode.messages`: they hold its replies and may hold more that only look like some.
        turns: all turns of the seat.
    """
    found: list[list[Message]] = []
    end = len(messages)
    for turn in reversed(turns):  # the last reply ends the conversation, so the search begins there
        reply = {"role": "assistant", "content": turn.completion.text}
        end = next((i for i in reversed(range(end)) if messages[i] == reply), 0)
        found.append(list(messages[:end]))
    return found[::-1]


def with_means(values: Sequence[float | None], places: Sequence[Hashable]) -> list[float]:
    """The values, and for None the mean of the others at the same place, or 0 where there is none."""
    known: dict[Hashable, list[float]] = {}
    for value, place in zip(values, places, strict=True):
        known.setdefault(place, []).extend([] if value is None else [value])
    means = {place: sum(found) / len(found) if found else 0.0 for place, found in known.items()}
    return [means[place] if value is None else value for value, place in zip(values, places, strict=True)]
