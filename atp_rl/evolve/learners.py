"""Learners: what changes in a policy between two steps, given episodes and rewards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from atp_rl import ranks
from atp_rl.defenses import Defense, LossBatch
from atp_rl.evolve.imitation import Copy, Imitation
from atp_rl.evolve.losses import LossType, ScaleRewards, clipped_surrogate, group_advantages, token_weights
from atp_rl.model.optimizer_state import OptimizerName, make_optimizer, optimizer_tensors, restore_optimizer
from atp_rl.model.policy import ALIGNED, Policy
from atp_rl.samples import Row, Sample, samples_of, shares, training_rows
from atp_rl.types import Group

T = TypeVar("T")
Metrics = dict[str, float]


class Learner(Protocol):
    def update(self, policy: Policy, groups: Sequence[Group], rewards: Tensor, defenses: Sequence[Defense]) -> Metrics:
        """Learn from one step's groups and their rewards [N, G]."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything beside the weights that the next update depends on."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class InContext:
    """No update: what the policy learns is the history in its conversation (the protocol of arXiv 2510.04860)."""

    def update(self, policy: Policy, groups: Sequence[Group], rewards: Tensor, defenses: Sequence[Defense]) -> Metrics:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


class PolicyGradient:
    """GRPO on the live adapters: group advantages, clipped surrogate, AdamW.

    With one adapter the baseline of a seat's reward is the mean over all seats of all episodes of its group
    (self-play); in a population every seat has its own baseline, its own weights in the loss, its own gradient norm.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        learning_rate: float,
        optimizer: OptimizerName = "adamw",
        warmup_steps: int,
        weight_decay: float,
        max_grad_norm: float,
        updates_per_step: int,
        micro_batch: int | None,
        clip_epsilon: float,
        scale_rewards: ScaleRewards,
        loss_type: LossType,
        max_tokens: int,
        temperature: float,
        imitation: Imitation | None = None,
    ) -> None:
        """`max_tokens`: the most tokens an episode can draw (rounds x longest reply); for the rest see the recipe."""
        self.learning_rate, self.warmup_steps, self.max_grad_norm = learning_rate, warmup_steps, max_grad_norm
        self.updates_per_step, self.micro_batch, self.clip_epsilon = updates_per_step, micro_batch, clip_epsilon
        self.scale_rewards: ScaleRewards = scale_rewards
        self.loss_type: LossType = loss_type
        self.max_tokens, self.temperature, self.imitation = max_tokens, temperature, imitation
        self.optimizer = make_optimizer(
            optimizer, policy.trainable, learning_rate=learning_rate, weight_decay=weight_decay
        )
        self.updates = 0

    def update(self, policy: Policy, groups: Sequence[Group], rewards: Tensor, defenses: Sequence[Defense]) -> Metrics:
        begun = time.perf_counter()
        samples = [sample for group in groups for sample in samples_of(group)]
        own_baseline = len(policy.live) > 1
        seats = len(samples) // sum(map(len, groups)) if own_baseline else 1
        of_seat = rewards.view(len(groups), -1, seats).transpose(1, 2).reshape(len(groups) * seats, -1)
        advantages = group_advantages(of_seat, self.scale_rewards)
        advantages = advantages.view(len(groups), seats, -1).transpose(1, 2).reshape(rewards.shape)
        for defense in defenses:
            with defense.paying(policy):
                advantages = defense.on_advantages(groups, advantages)
        violating = shares(groups, ("violation",))
        group_of = [i for i, group in enumerate(groups) for _ in samples_of(group)]
        batch = _Batch(samples, group_of, advantages.flatten(), self.loss_type, self.max_tokens, self.micro_batch)
        copied = self.imitation.copies(groups) if self.imitation else []
        sums: dict[str, float] = dict.fromkeys(
            ("loss", "entropy", "sampler_gap", "imitation_loss"), 0.0
        )  # over this rank's rows
        gap_max = grad_norm = 0.0
        old = [None] * len(batch.chunks) if self.updates_per_step == 1 else self._old_logprobs(policy, batch)
        for _ in range(self.updates_per_step):
            self._set_learning_rate()
            self.optimizer.zero_grad()
            for chunk, old_logprobs in zip(batch.chunks, old, strict=True):
                gap_max = max(gap_max, self._backward(policy, chunk, old_logprobs, defenses, sums))
            if self.imitation:
                sums["imitation_loss"] += self._imitate(policy, copied)
            for defense in defenses:
                with defense.paying(policy):
                    defense.backward(policy)
            ranks.sum_gradients(policy.trainable)
            for defense in defenses:
                with defense.paying(policy):
                    defense.on_gradients(policy)
            for adapter in policy.live:
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters_of(adapter), self.max_grad_norm)
                grad_norm += float(norm) / len(policy.live)
            self.optimizer.step()
            self.updates += 1
        policy.version += 1
        loss, entropy, gap, imitation = (value / self.updates_per_step for value in ranks.total(list(sums.values())))
        metrics = {
            "evolve/loss": loss,
            "evolve/entropy": entropy,
            "evolve/grad_norm": grad_norm / self.updates_per_step,
            "evolve/advantage_abs_mean": advantages.abs().mean().item(),
            "evolve/advantage_violation_cov": (advantages * (violating - violating.mean())).mean().item(),
            "evolve/mixed_groups": (of_seat.std(1) > 0).float().mean().item(),
            "evolve/learning_rate": self.optimizer.param_groups[0]["lr"],
            "perf/sampler_gap_mean": gap,
            "perf/sampler_gap_max": max(ranks.gather([gap_max])),
            "perf/unique_rows": batch.unique / len(batch.rows),
            "time/update_s": time.perf_counter() - begun,
        }
        return metrics | ({"evolve/imitation_loss": imitation} if self.imitation else {})

    def state(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer) | {"updates": torch.tensor(self.updates)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        restore_optimizer(self.optimizer, state)
        self.updates = int(state["updates"])

    def _set_learning_rate(self) -> None:
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.learning_rate * min(1.0, (self.updates + 1) / (self.warmup_steps + 1))

    def _backward(self, policy, chunk: _Chunk, old: Tensor | None, defenses, sums: dict[str, float]) -> float:
        """Add a chunk's part to the gradients and to `sums`; its largest gap to the sampler's log-probabilities."""
        device = policy.device
        where, weights = chunk.episode_of.to(device), chunk.weights.to(device)
        tokens = policy.acted_tokens(chunk.rows, chunk.acted, players=chunk.players, temperature=self.temperature)
        logprobs, mask = tokens.logprobs[where], tokens.mask[where]
        # one update per batch is exactly on-policy: the old log-probabilities are the current ones
        old = logprobs.detach() if old is None else old

        @cache
        def anchor_logprobs(frozen: str = ALIGNED) -> Tensor:
            of_rows = policy.acted_tokens(chunk.rows, chunk.acted, players=frozen, temperature=self.temperature)
            return of_rows.logprobs[where]

        advantages = chunk.advantages.to(device).unsqueeze(1)
        per_token = clipped_surrogate(logprobs, old, advantages, self.clip_epsilon)
        loss = (per_token * weights).sum()
        acted, groups = chunk.tokens.to(device), chunk.groups.to(device)
        defended = LossBatch(
            logprobs, old, anchor_logprobs, mask, weights, acted, advantages, per_token, groups, self.updates_per_step
        )
        for defense in defenses:
            with defense.paying(policy):
                extra = defense.extra_loss(defended)
            loss = loss if extra is None else loss + extra
        loss.backward()
        sums["loss"] += loss.item()
        sums["entropy"] += (tokens.entropy[where] * weights).sum().item() / float(chunk.weight_total)
        gap = (old - chunk.sampled.to(device)).abs().masked_fill(~mask, 0.0)
        sums["sampler_gap"] += (gap * weights).sum().item() / float(chunk.weight_total)
        return gap.max().item() if gap.numel() else 0.0

    def _old_logprobs(self, policy: Policy, batch: _Batch) -> list[Tensor]:
        with torch.no_grad():
            return [
                policy.acted_tokens(c.rows, c.acted, players=c.players, temperature=self.temperature).logprobs[
                    c.episode_of.to(policy.device)
                ]
                for c in batch.chunks
            ]

    def _imitate(self, policy: Policy, copied: Sequence[Copy]) -> float:
        """Back-propagate the imitation loss: each seat's mean -log pi(reply) of what it copies, times the weight."""
        assert self.imitation is not None
        count = Counter(copied)
        of_seat = Counter(copy.seat for copy in copied)
        total, keys = 0.0, ranks.own_rows(list(count))
        size = self.micro_batch or max(1, len(keys))
        for start in range(0, len(keys), size):
            chunk = [key for key, _ in keys[start : start + size]]
            acted = [range(len(copy.prompt_ids), len(copy.prompt_ids) + len(copy.reply_ids)) for copy in chunk]
            rows = [(*copy.prompt_ids, *copy.reply_ids) for copy in chunk]
            tokens = policy.acted_tokens(rows, acted, players=[copy.seat for copy in chunk])
            shares = [count[copy] / of_seat[copy.seat] * real for copy, real in keys[start : start + size]]
            lengths = tokens.mask.sum(1)
            share = torch.tensor(shares, device=policy.device)
            loss = -(tokens.logprobs.sum(1) / lengths * share).sum() * self.imitation.weight
            loss.backward()
            total += loss.item()
        return total


class _Chunk(NamedTuple):
    """The rows of one forward, and the episodes' rows that they stand for."""

    rows: list[tuple[int, ...]]
    acted: list[tuple[int, ...]]
    players: str | list[str]
    """The adapter of all rows, or of each."""
    episode_of: Tensor
    """[B] which of `rows` each of the B rows of samples in this chunk is."""
    advantages: Tensor
    """[B]"""
    groups: Tensor
    """[B] index of each row's group in the step."""
    tokens: Tensor
    """[B, A] the tokens that were acted; 0 where there is none."""
    weights: Tensor
    """[B, A] of each acted token in the loss of the whole batch."""
    weight_total: Tensor
    """Sum of the weights of the whole batch, a scalar."""
    sampled: Tensor
    """[B, A] log-probabilities as the sampler reported them."""


class _Batch:
    """A step's samples as rows of tokens, and of them the chunks of this rank.

    Rows with the very same tokens and adapter are put through the model once and then counted as often as they occur:
    short answers of a group coincide all the time, and the loss is the same to the last term.
    """

    def __init__(
        self,
        samples: list[Sample],
        group_of: Sequence[int],
        advantages: Tensor,
        loss_type: LossType,
        max_tokens: int,
        micro_batch: int | None,
    ) -> None:
        self.rows = [(row, i) for i, sample in enumerate(samples) for row in training_rows(sample.turns)]
        most = max(len(row.acted) for row, _ in self.rows)
        mask = torch.tensor([[k < len(row.acted) for k in range(most)] for row, _ in self.rows])
        players = [row.player for row, _ in self.rows]
        weights = torch.zeros(mask.shape)
        for player in dict.fromkeys(players):  # each adapter's loss is that of its own rows
            own = torch.tensor([p == player for p in players])
            weights[own] = token_weights(mask[own], loss_type, max_tokens)
        index: dict[tuple[tuple[int, ...], tuple[int, ...], str], int] = {}
        unique_of = [index.setdefault((row.ids, row.acted, row.player), len(index)) for row, _ in self.rows]
        self.unique = len(index)
        own = ranks.own_rows(list(index.items()))
        if micro_batch:  # rows of about one length are padded little
            own.sort(key=lambda item: len(item[0][0][0]))
        size = micro_batch or len(own)
        self.chunks = []
        for start in range(0, len(own), size):
            part = own[start : start + size]
            keys = [key for (key, _), _ in part]
            place = {unique: at for at, ((_, unique), real) in enumerate(part) if real}
            chosen = [i for i, unique in enumerate(unique_of) if unique in place]
            width = max(len(acted) for _, acted, _ in keys)
            self.chunks.append(
                _Chunk(
                    rows=[ids for ids, _, _ in keys],
                    acted=[acted for _, acted, _ in keys],
                    players=players[0] if len(set(players)) == 1 else [player for _, _, player in keys],
                    episode_of=torch.tensor([place[unique_of[i]] for i in chosen], dtype=torch.long),
                    advantages=advantages[[self.rows[i][1] for i in chosen]],
                    groups=torch.tensor([group_of[self.rows[i][1]] for i in chosen], dtype=torch.long),
                    tokens=torch.tensor([_padded(_acted(self.rows[i][0]), width) for i in chosen]).view(-1, width),
                    weights=weights[chosen, :width],
                    weight_total=weights.sum(),
                    sampled=torch.tensor([_padded(self.rows[i][0].logprobs, width) for i in chosen]).view(-1, width),
                )
            )


def _acted(row: Row) -> list[int]:
    return [row.ids[position] for position in row.acted]


def _padded(values: Sequence[T], width: int) -> list[T | int]:
    return [*values, *[0] * (width - len(values))]
