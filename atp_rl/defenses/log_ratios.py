"""How far the policy has moved from the aligned adapter, token by token of what it drew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_rl import ranks
from atp_rl.model.policy import ALIGNED, Policy
from atp_rl.model.portions import TOKENS_AT_ONCE
from atp_rl.samples import Sample, training_rows


def log_ratios(policy: Policy, samples: Sequence[Sample], temperature: float) -> list[Tensor]:
    """log policy - log aligned of each token that a sample acted, in order [T], in nats; no gradient.

    Two forwards over the different rows of all samples, shared among the ranks.
    """
    of_sample = [[(r.ids, r.acted, r.player) for r in training_rows(sample.turns)] for sample in samples]
    unique: list[tuple[tuple[int, ...], tuple[int, ...], str]] = list(
        dict.fromkeys(row for rows in of_sample for row in rows)
    )
    size = max(1, TOKENS_AT_ONCE // max((len(ids) for ids, _, _ in unique), default=1))
    own, found = ranks.own_rows(unique), []
    with torch.no_grad():
        for start in range(0, len(own), size):
            part = own[start : start + size]
            rows, acted = [ids for (ids, _, _), _ in part], [acted for (_, acted, _), _ in part]
            players = [player for (_, _, player), _ in part] if len(policy.live) > 1 else "policy"
            live = policy.acted_tokens(rows, acted, players=players, temperature=temperature).logprobs
            aligned = policy.acted_tokens(rows, acted, players=ALIGNED, temperature=temperature).logprobs
            gaps = (live - aligned).cpu()
            found += [gap[: len(a)] for gap, a, (_, real) in zip(gaps, acted, part, strict=True) if real]
    of_row = dict(zip(unique, ranks.gather(found), strict=True))
    return [torch.cat([of_row[row] for row in rows]) for rows in of_sample]
