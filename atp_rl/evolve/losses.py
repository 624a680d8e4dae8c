"""The loss of the evolution loop, as pure tensor functions.

GRPO (arXiv 2402.03300) with the clipped surrogate of PPO (arXiv 1707.06347). Left out, on purpose: a value network, a
length penalty, an entropy bonus, two-sided clipping, sequence-level ratios. A test pins value and gradients to those of
TRL's GRPOTrainer on the same batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]
LossType = Literal["dapo", "grpo", "dr_grpo"]


def group_advantages(rewards: Tensor, scale: ScaleRewards) -> Tensor:
    """A = r - mean over the group, divided by a standard deviation (sample, + 1e-4) of the group or of the batch.

    `none` is Dr. GRPO (arXiv 2503.20783): without the division, small payoff gaps push less than large ones.

    Computed in double precision: in single, equal rewards leave a residue that the division blows up and Adam turns
    into full-sized steps.

    Args:
        rewards: [N, G], a row a group.
    """
    exact = rewards.double()
    advantages = exact - exact.mean(1, keepdim=True)
    if scale != "none":
        advantages /= (exact.std(1, keepdim=True) if scale == "group" else exact.std()) + 1e-4
    return advantages.to(rewards.dtype)


def token_weights(mask: Tensor, loss_type: LossType, max_tokens: int) -> Tensor:
    """Weight [B, A] of every acted token in the loss, which is the sum of weight x per-token loss.

    dapo (arXiv 2503.14476): 1 / tokens of the batch. grpo: 1 / (rows x tokens of the row). dr_grpo: 1 / (rows x
    `max_tokens`), with the most tokens that a row could have.
    """
    real = mask.float()
    if loss_type == "dapo":
        return real / real.sum().clamp(min=1)
    if loss_type == "grpo":
        return real / real.sum(1, keepdim=True).clamp(min=1) / mask.shape[0]
    return real / (mask.shape[0] * max_tokens)


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_epsilon: float) -> Tensor:
    """Per-token loss [B, A]: -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), ratio = exp(log pi - log pi_old).

    Args:
        advantages: [B, 1] or [B, A].
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
    return -torch.min(ratio * advantages, clipped * advantages)
