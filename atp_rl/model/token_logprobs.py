"""What is made of logits without a copy of all of them in single precision: of 152,000 a token, that is the peak."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 26
"""Most logits that are turned into single precision at once: a quarter of a GiB for each tensor made of them."""


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of the distribution it was drawn from, in nats and single precision.

    Where there are more than `CHUNK` logits, they are taken in chunks, which the backward pass computes again: what is
    kept for it are the logits themselves, in the type in which the model gave them.

    Args:
        logits: [..., V]; they are divided by `temperature`.
        targets: [...] token ids.

    Returns:
        Log-probabilities [...], and entropies [...] without gradient.
    """
    tokens = max(1, CHUNK // logits.shape[-1])
    if targets.numel() <= tokens:
        return _of_chunk(logits, targets, temperature)
    parts = [
        checkpoint(_of_chunk, of, drawn, temperature, use_reentrant=False)
        for of, drawn in zip(logits.flatten(0, -2).split(tokens), targets.flatten().split(tokens), strict=True)
    ]
    logprobs, entropy = (torch.cat(values).view(targets.shape) for values in zip(*parts, strict=True))
    return logprobs, entropy


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """KL(p || q) [...] in nats, of the distributions that `logits` [..., V] and `others` give; without gradient."""
    tokens = max(1, CHUNK // logits.shape[-1])
    pairs = zip(logits.flatten(0, -2).split(tokens), others.flatten(0, -2).split(tokens), strict=True)
    with torch.no_grad():
        return torch.cat([_divergence(p, q) for p, q in pairs]).view(logits.shape[:-1])


def _divergence(logits: Tensor, others: Tensor) -> Tensor:
    own = logits.float().log_softmax(-1)
    return (own.exp() * (own - others.float().log_softmax(-1))).sum(-1)


def _of_chunk(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (logits.float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy
