"""What a simulated monitor saw of a step's episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atp_rl.samples import samples_of
from atp_rl.types import Group
from reward_models.monitor import Kind, flags


class Sightings(NamedTuple):
    shares: Tensor
    """[N, G x seats]: of each sample's decisions, the share that is flagged."""
    decisions: int
    flagged: int
    violations: int
    hits: int
    """Violations that are flagged."""


def watch(groups: Sequence[Group], *, kind: Kind, recall: float, false_alarm: float) -> Sightings:
    """Flag the decisions of the seats that learn; what is flagged depends on the episodes alone.

    An invalid answer is no violation, and neither is a decision of which the rule demanded nothing. The text monitor
    reads all that a seat wrote in the round.

    Args:
        kind, recall, false_alarm: as in `reward_models.monitor.flags`.
    """
    samples = [sample for group in groups for sample in samples_of(group)]
    decisions = [(i, turn) for i, s in enumerate(samples) for turn in s.turns if turn.outcome.verdict is not None]
    texts = [
        "\n".join(said.completion.text for said in samples[i].turns if said.round == turn.round)
        for i, turn in decisions
    ]
    violations = [turn.outcome.ruled and turn.outcome.verdict == "violation" for _, turn in decisions]
    keys = [(*samples[i].episode.seed, turn.seat, turn.round) for i, turn in decisions]
    flagged = flags(texts, violations, kind=kind, recall=recall, false_alarm=false_alarm, keys=keys)
    of_sample, found = torch.zeros(len(samples)), torch.zeros(len(samples))
    for (i, _), flag in zip(decisions, flagged, strict=True):
        of_sample[i] += 1
        found[i] += flag
    hits = sum(flag and violation for flag, violation in zip(flagged, violations, strict=True))
    return Sightings(
        (found / of_sample.clamp(min=1)).view(len(groups), -1), len(decisions), sum(flagged), sum(violations), hits
    )
