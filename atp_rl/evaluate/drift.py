"""How far a policy has moved from the aligned adapter."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from atp_rl import ranks
from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import ALIGNED, Policy
from atp_rl.model.portions import portions
from atp_rl.model.token_logprobs import divergence
from atp_rl.scenarios.choices import decision_span
from atp_rl.types import Turn


@dataclass(frozen=True)
class Drift:
    """KL(policy || aligned) in nats; None without any."""

    reply: float | None
    """Of a whole reply, averaged over replies."""
    decision: float | None
    """Of the tokens that write a reply's decision alone, averaged over the replies that hold one."""
    decided: int
    """Replies that hold one."""


def kl_to_aligned(policy: Policy, turns: Sequence[Turn]) -> float | None:
    """KL(policy || aligned) of a whole reply, in nats, averaged over the turns' replies.

    The sum over a reply's tokens of the exact divergence between the two next-token distributions (not of a one-sample
    estimate), given what the reply had said so far. None without turns.
    """
    return _drift(policy, turns, lambda ids: None).reply


def drift_to_aligned(policy: Policy, turns: Sequence[Turn]) -> Drift:
    """`kl_to_aligned`, and the part of it at the decision, in the same forwards.

    A policy can drift far in how it words its reasons and hardly in what it does, or the other way round.
    """
    return _drift(policy, turns, lambda ids: decision_tokens(policy.chat, ids))


def decision_tokens(chat: ChatFormat, ids: Sequence[int]) -> range | None:
    """Which tokens of a reply hold the braces that decide (`choices.decision_span`); None where none do."""
    span = decision_span(chat.decode(ids))
    if span is None:
        return None

    def written(count: int) -> int:
        """Characters that the first `count` tokens write."""
        return len(chat.decode(ids[:count]))

    first = bisect_right(range(len(ids) + 1), span[0], key=written) - 1
    return range(first, bisect_left(range(len(ids) + 1), span[1], key=written))


def _drift(policy: Policy, turns: Sequence[Turn], decision: Callable[[tuple[int, ...]], range | None]) -> Drift:
    turns = [turn for turn in turns if turn.player != ALIGNED]
    count: dict[tuple[tuple[int, ...], int, str], int] = {}
    for turn in turns:
        key = ((*turn.prompt_ids, *turn.completion.token_ids), len(turn.prompt_ids), turn.player)
        count[key] = count.get(key, 0) + 1
    total, total_decisions, decided, keys = 0.0, 0.0, 0, ranks.share(list(count))
    for part in portions([len(ids) for ids, _, _ in keys]):
        chunk = [keys[i] for i in part]
        rows = [ids for ids, _, _ in chunk]
        acted = [range(prompt, len(ids)) for ids, prompt, _ in chunk]
        players = [player for _, _, player in chunk]
        own, mask = policy.acted_distribution(rows, acted, players if len(policy.live) > 1 else "policy")
        aligned, _ = policy.acted_distribution(rows, acted, ALIGNED)
        kl = divergence(own, aligned).masked_fill(~mask, 0.0)
        weights = torch.tensor([count[key] for key in chunk], device=kl.device)
        total += (kl.sum(1) * weights).sum().item()
        for key, tokens in zip(chunk, kl, strict=True):
            if (where := decision(key[0][key[1] :])) is not None:
                total_decisions += count[key] * tokens[where.start : where.stop].sum().item()
                decided += count[key]
    total, total_decisions, decided = ranks.total([total, total_decisions, decided])
    return Drift(
        total / len(turns) if turns else None, total_decisions / decided if decided else None, round(decided)
    )  # fmt: skip


def adapter_distance(state: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """L2 distance of two adapters' weights, as they are (not of the updates that their products make)."""
    squares = sum((state[key].float() - reference[key].float()).pow(2).sum() for key in reference)
    return float(squares) ** 0.5
