"""How far a policy has moved from the aligned adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atp_rl.model.policy import Policy, acted_logits
from atp_rl.model.portions import portions
from atp_rl.types import Turn


def kl_to_aligned(policy: Policy, turns: Sequence[Turn]) -> float | None:
    """KL(policy || aligned) of a whole reply, in nats, averaged over the turns' replies.

    The sum over a reply's tokens of the exact divergence between the two next-token distributions (not of a one-sample
    estimate), given what the reply had said so far. None without turns.
    """
    count: dict[tuple[tuple[int, ...], int], int] = {}
    for turn in turns:
        key = ((*turn.prompt_ids, *turn.completion.token_ids), len(turn.prompt_ids))
        count[key] = count.get(key, 0) + 1
    total, keys = 0.0, list(count)
    for part in portions([len(ids) for ids, _ in keys]):
        chunk = [keys[i] for i in part]
        rows = [ids for ids, _ in chunk]
        acted = [range(prompt, len(ids)) for ids, prompt in chunk]
        logp = {}
        for which in ("policy", "aligned"):
            with torch.no_grad(), policy.using(which) as model:
                logits, _, mask = acted_logits(model, rows, acted, pad_id=policy.chat.pad_id, device=policy.device)
                logp[which] = logits.float().log_softmax(-1)
        kl = (logp["policy"].exp() * (logp["policy"] - logp["aligned"])).sum(-1).masked_fill(~mask, 0.0).sum(1)
        weights = torch.tensor([count[key] for key in chunk], device=kl.device)
        total += (kl * weights).sum().item()
    return total / len(turns) if turns else None


def adapter_distance(state: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """L2 distance of two adapters' weights, as they are (not of the updates that their products make)."""
    squares = sum((state[key].float() - reference[key].float()).pow(2).sum() for key in reference)
    return float(squares) ** 0.5
