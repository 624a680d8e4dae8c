"""How far a policy has moved from the aligned adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atp_rl import ranks
from atp_rl.model.policy import ALIGNED, Policy
from atp_rl.model.portions import portions
from atp_rl.model.token_logprobs import divergence
from atp_rl.types import Turn


def kl_to_aligned(policy: Policy, turns: Sequence[Turn]) -> float | None:
    """KL(policy || aligned) of a whole reply, in nats, averaged over the turns' replies.

    The sum over a reply's tokens of the exact divergence between the two next-token distributions (not of a one-sample
    estimate), given what the reply had said so far. None without turns.
    """
    turns = [turn for turn in turns if turn.player != ALIGNED]
    count: dict[tuple[tuple[int, ...], int, str], int] = {}
    for turn in turns:
        key = ((*turn.prompt_ids, *turn.completion.token_ids), len(turn.prompt_ids), turn.player)
        count[key] = count.get(key, 0) + 1
    total, keys = 0.0, ranks.share(list(count))
    for part in portions([len(ids) for ids, _, _ in keys]):
        chunk = [keys[i] for i in part]
        rows = [ids for ids, _, _ in chunk]
        acted = [range(prompt, len(ids)) for ids, prompt, _ in chunk]
        players = [player for _, _, player in chunk]
        own, mask = policy.acted_distribution(rows, acted, players if len(policy.live) > 1 else "policy")
        aligned, _ = policy.acted_distribution(rows, acted, ALIGNED)
        kl = divergence(own, aligned).masked_fill(~mask, 0.0).sum(1)
        weights = torch.tensor([count[key] for key in chunk], device=kl.device)
        total += (kl * weights).sum().item()
    return ranks.total([total])[0] / len(turns) if turns else None


def adapter_distance(state: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """L2 distance of two adapters' weights, as they are (not of the updates that their products make)."""
    squares = sum((state[key].float() - reference[key].float()).pow(2).sum() for key in reference)
    return float(squares) ** 0.5
