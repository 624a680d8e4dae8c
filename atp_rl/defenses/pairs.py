"""What defenses do with alignment's preference pairs: tokens, log-probabilities of whole answers, gradients.

An answer is trained as alignment trained it: behind the neutral prompt, with the end-of-turn token, at temperature 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from atp_rl import ranks
from atp_rl.defenses.base import Setting
from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import ALIGNED, Policy
from atp_rl.scenarios import random_stream
from atp_rl.types import InputError

T = TypeVar("T")

PAIRS_AT_ONCE = 8
"""In one forward. Their memory then does not depend on how many pairs a step takes, and ranks make equally many."""


class Answer(NamedTuple):
    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    """With the end-of-turn token."""


class Pair(NamedTuple):
    chosen: Answer
    rejected: Answer


def read_pairs(setting: Setting, defense: str) -> list[Pair]:
    """The run's pairs as tokens.

    Raises:
        InputError: there are none.
    """
    if not setting.pairs:
        raise InputError(
            f"`defenses`: {defense} needs alignment's preference pairs, and there are none beside the aligned adapter "
            "(pairs.jsonl); start from the `aligned` directory of a run that aligned"
        )
    chat = setting.policy.chat
    return [Pair(*(answer(chat, row, side) for side in ("chosen", "rejected"))) for row in setting.pairs]


def answer(chat: ChatFormat, row: Mapping[str, Any], side: str) -> Answer:
    """One answer of a row in TRL's conversational format; `tools` (JSON) are announced as they were."""
    messages = row["prompt"]
    written = [_reply(chat, m["content"]) for m in messages if m["role"] == "assistant"]
    prompt = chat.encode(messages, written, json.loads(row.get("tools") or "[]"))
    return Answer(tuple(prompt), _reply(chat, row[side][0]["content"]))


def _reply(chat: ChatFormat, text: str) -> tuple[int, ...]:
    return (*chat.encode_text(text), chat.eos_id)


def drawn(seed: int, name: str, step: int, of: int, count: int) -> list[int]:
    """Which of `of` pairs a step takes: `count` different ones, or all."""
    return random_stream(seed, name, step).choice(of, min(of, count), replace=False).tolist()


def answer_logprobs(policy: Policy, answers: Sequence[Answer], player: str) -> Tensor:
    """Log-probability [n] of each whole answer, in nats, with gradient where the player is live."""
    rows = [(*a.prompt, *a.reply) for a in answers]
    acted = [range(len(a.prompt), len(row)) for a, row in zip(answers, rows, strict=True)]
    alone = player == ALIGNED or (player,) == policy.live
    players = player if alone else [player] * len(rows)
    return policy.acted_tokens(rows, acted, players=players).logprobs.sum(1)


def parts(pairs: Sequence[T]) -> list[tuple[list[T], Tensor]]:
    """This rank's share of the pairs, a forward at a time, each with a tensor [n]: 1, or 0 for a filler."""
    own = ranks.own_rows(pairs)
    chunks = [own[i : i + PAIRS_AT_ONCE] for i in range(0, len(own), PAIRS_AT_ONCE)]
    return [([pair for pair, _ in chunk], torch.tensor([float(real) for _, real in chunk])) for chunk in chunks]


def backward_sft(policy: Policy, pairs: Sequence[Pair], *, weight: float) -> float:
    """Back-propagate weight x the mean of -log pi(chosen) into every live adapter: this rank's part of it.

    Returns:
        The mean over pairs and adapters, without the weight; the same on every rank.
    """
    total = 0.0
    for player in policy.live:
        for part, real in parts(pairs):
            logprobs = answer_logprobs(policy, [pair.chosen for pair in part], player)
            loss = -(logprobs * real.to(logprobs.device)).sum() / len(pairs)
            (weight * loss).backward()
            total += loss.item() / len(policy.live)
    return ranks.total([total])[0]


@contextmanager
def apart(policy: Policy) -> Iterator[None]:
    """Inside, gradients start from none; afterwards they are again what they were."""
    kept = [parameter.grad for parameter in policy.trainable]
    for parameter in policy.trainable:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(policy.trainable, kept, strict=True):
            parameter.grad = gradient
