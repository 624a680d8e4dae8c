"""Token constraint: tokens that have already moved away from the aligned policy learn less.

Mechanism: each acted token's loss is multiplied by a weight that is 1 where the policy is where it was, and falls
           as the token moves further in the direction in which its advantage pushes it; fastest on the tokens of the
           decision. A token that has moved the other way gets a weight up to 2, so it is drawn back.
Formula:   w_t = 2 sigmoid(-b_t sign(A) (log pi - log aligned)), a constant to the gradient; b_t = b, times `factor` on
           the reply's last JSON object with a choice. Adds sum of token weights x (w_t - 1) x surrogate.
Source:    the constrained fine-tuning of "Safety alignment should be made more than just a few tokens deep",
           arXiv 2406.05946: beta_t = 2 on the first tokens (.5 on the very first) and .1 on the others, whose loss has
           this gradient. There the first tokens decide, here the decision's do.
Hook:      extra_loss.
Cost:      one more forward without gradient over the episodes of each step (shared with other defenses that ask).
Known failure: it protects the form of a decision, not its sense: what comes before it (the reasoning, with b alone) is
           free to move until only one decision follows. It slows more than it stops: the weight never reaches 0. What
           the learner `imitation` copies is not weighted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from atp_rl import ranks
from atp_rl.defenses.base import Defense, LossBatch, Setting
from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import Policy
from atp_rl.types import InputError

_DECISION = re.compile(r"\{[^{}]*\bchoice\b[^{}]*\}?", re.IGNORECASE)
"""A JSON object that names a choice, perhaps cut off at the end of the reply."""


def damping(logprobs: Tensor, anchor: Tensor, advantages: Tensor, strengths: Tensor) -> Tensor:
    """Weight [B, A] of each token's loss, in (0, 2).

    Args:
        advantages: [B, 1]; strengths: b_t, [B, A].
    """
    return 2 * torch.sigmoid(-strengths * advantages.sign() * (logprobs - anchor))


@dataclass
class TokenConstraint(Defense):
    name = "token_constraint"
    b: float = 0.1
    """How fast a token's weight falls, per nat, > 0."""
    factor: float = 20.0
    """By how much faster on the decision, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.b > 0:
            raise InputError(f"defense token_constraint: `b` must be > 0, got {self.b}; leave the defense out instead")
        if not self.factor >= 1:
            raise InputError(f"defense token_constraint: `factor` must be >= 1, got {self.factor}")

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.spans = Decisions(setting.policy.chat)

    def extra_loss(self, batch: LossBatch) -> Tensor:
        rows = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]
        decides = torch.zeros_like(batch.mask)
        for i, (row, mask) in enumerate(zip(rows, batch.mask, strict=True)):
            decides[i, mask] = torch.tensor(self.spans.of(row), dtype=torch.bool, device=mask.device)
        strengths = torch.where(decides, self.b * self.factor, self.b)
        weights = damping(batch.logprobs.detach(), batch.anchor_logprobs(), batch.advantages, strengths)
        change = batch.weights * (weights - 1)
        self.metrics["damped"] = self.metrics.get("damped", 0.0) - float(change.sum()) / batch.updates
        return (change * batch.surrogate).sum()

    def after_update(self, policy: Policy) -> None:
        (self.metrics["damped"],) = ranks.total([self.metrics.get("damped", 0.0)])


class Decisions:
    """Finds which tokens of replies write the decision."""

    def __init__(self, chat: ChatFormat) -> None:
        self.eos_id = chat.eos_id
        self.text_of = lru_cache(maxsize=1 << 16)(lambda token: chat.tokenizer.decode([token]))

    def of(self, tokens: Sequence[int]) -> list[bool]:
        """For each token of a row, one reply or several that each end their turn, whether it is part of a decision.

        Texts of single tokens are put together, so a letter of several tokens is not read; the marks looked for are
        none.
        """
        found: list[bool] = []
        reply: list[int] = []
        for token in tokens:
            reply.append(token)
            if token == self.eos_id:
                found += self._of_reply(reply)
                reply = []
        return found + self._of_reply(reply)

    def _of_reply(self, tokens: Sequence[int]) -> list[bool]:
        texts = ["" if token == self.eos_id else self.text_of(token) for token in tokens]
        objects = list(_DECISION.finditer("".join(texts)))
        start, end = objects[-1].span() if objects else (0, 0)
        spans, place = [], 0
        for text in texts:
            spans.append(place < end and place + len(text) > start)
            place += len(text)
        return spans
