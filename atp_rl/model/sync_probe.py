"""The probe after every sync: does the sampler answer with the weights that the learner has?

A sampler that silently kept old weights is the commonest bug of this kind of training. The same fixed decisions are
scored by both sides. Besides the distance there is a sharper sign: the sampler's values lie nearer to those that the
learner had at an earlier sync.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from atp_rl.model.policy import Policy
from atp_rl.scenarios.choices import format_choice
from atp_rl.types import Chat, Sampler

MAX_PROBE_GAP = 0.25
"""Mean distance (nats a decision) at which a run stops; bfloat16 is 0.013 from float32 on the tiny model."""

SAME = 1e-3
"""Distances below this (nats) are rounding, and so are those up to twice the one at the start: bfloat16 has more."""

REMEMBERED = 3
"""Earlier syncs whose weights a sampler may have kept."""


class SyncProbe:
    """A few chats whose options the sampler and the policy score after every sync."""

    def __init__(self, chats: Sequence[Chat]) -> None:
        self.chats = list(chats)
        self._own: deque[np.ndarray] = deque(maxlen=REMEMBERED + 1)
        """What the policy gave at the last syncs: log-probability of every option of every chat."""
        self._rounding: float | None = None

    def check(self, policy: Policy, sampler: Sampler) -> dict[str, float]:
        """Compare both sides.

        Returns:
            `perf/probe_gap_mean` and `perf/probe_gap_max`, nats a decision.

        Raises:
            RuntimeError: they are not the same policy.
        """
        own = np.array(decision_logprobs(policy, self.chats))
        theirs = np.concatenate(sampler.score(self.chats))
        self._own.append(own)
        distances = [float(np.abs(theirs - values).mean()) for values in self._own]
        gap, nearest = distances[-1], int(np.argmin(distances))
        if self._rounding is None:  # at the start there are no old weights
            self._rounding = max(SAME, 2 * gap)
        if gap > self._rounding and distances[nearest] < gap / 2:
            raise RuntimeError(
                f"the sampler kept old weights: its log-probabilities are {gap:.3g} nats from the policy's of now, and "
                f"{distances[nearest]:.3g} from those of {len(distances) - 1 - nearest} syncs ago"
            )
        if not gap <= MAX_PROBE_GAP:  # nan is no small gap
            raise RuntimeError(
                f"the sampler is not the policy that learns: their log-probabilities of the same decisions are "
                f"{gap:.3g} nats apart on average (at most {MAX_PROBE_GAP}); has it the same base model and dtype?"
            )
        return {"perf/probe_gap_mean": gap, "perf/probe_gap_max": float(np.abs(theirs - own).max())}


def decision_logprobs(policy: Policy, chats: Sequence[Chat]) -> list[float]:
    """The policy's own log-probability of every option of every chat, in one list, by a forward without any cache."""
    decisions = [
        (chat, (*policy.chat.encode_text(format_choice(option)), policy.chat.eos_id))
        for chat in chats
        for option in chat.options
    ]
    rows = [(*chat.prompt_ids, *decision) for chat, decision in decisions]
    acted = [range(len(chat.prompt_ids), len(row)) for (chat, _), row in zip(decisions, rows, strict=True)]
    players = [chat.player for chat, _ in decisions]
    with torch.no_grad():
        result = policy.acted_tokens(rows, acted, players=players[0] if len(set(players)) == 1 else players)
    return result.logprobs.double().sum(1).tolist()
