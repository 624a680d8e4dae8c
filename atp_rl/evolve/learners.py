"""Learners: what changes in a policy between two steps, given episodes and rewards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from atp_rl import ranks
from atp_rl.defenses import Defense, LossBatch
from atp_rl.evolve.imitation import Copy, Imitation
from atp_rl.evolve.losses import LossType, ScaleRewards, clipped_surrogate, group_advantages, token_weights
from atp_rl.model.optimizer_state import OptimizerName, make_optimizer, optimizer_tensors, restore_optimizer
from atp_rl.model.policy import ALIGNED, Policy
from atp_rl.types import Episode, Group, Turn

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


class Row(NamedTuple):
    """One stretch of tokens to train on: all rounds of an episode whose histories continue one another."""

    ids: tuple[int, ...]
    acted: tuple[int, ...]
    """Positions of the tokens that the policy drew."""
    logprobs: tuple[float, ...]
    """Of those tokens, as the sampler reported them."""

    player: str
    """The adapter that drew them, and that learns from them."""


class Sample(NamedTuple):
    """One seat's part in an episode: what gets one reward and one advantage."""

    episode: Episode
    seat: str
    turns: list[Turn]


def samples_of(group: Group) -> list[Sample]:
    """The seats of a group's episodes that learn, by episode, then by seat: the columns of rewards and advantages."""
    return [
        Sample(episode, seat, turns)
        for episode in group
        for seat in episode.messages
        if (turns := [turn for turn in episode.turns if turn.seat == seat]) and turns[0].player != ALIGNED
    ]


def training_rows(turns: Sequence[Turn]) -> list[Row]:
    """The rows of one seat's turns: one where every round only appended, more where the history window cut it."""
    rows: list[Row] = []
    for turn in turns:
        reply = turn.completion.token_ids
        before = rows[-1] if rows else Row((), (), (), turn.player)
        if not rows or turn.prompt_ids[: len(before.ids)] != before.ids:
            before = Row((), (), (), turn.player)
            rows.append(before)
        start = len(turn.prompt_ids)
        rows[-1] = Row(
            ids=(*turn.prompt_ids, *reply),
            acted=(*before.acted, *range(start, start + len(reply))),
            logprobs=(*before.logprobs, *turn.completion.logprobs),
            player=turn.player,
        )
    return rows


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
            advantages = defense.on_advantages(groups, advantages)
        batch = _Batch(samples, advantages.flatten(), self.loss_type, self.max_tokens, self.micro_batch)
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
            ranks.sum_gradients(policy.trainable)
            for defense in defenses:
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

        def anchor_logprobs() -> Tensor:
            of_rows = policy.acted_tokens(chunk.rows, chunk.acted, players=ALIGNED, temperature=self.temperature)
            return of_rows.logprobs[where]

        per_token = clipped_surrogate(logprobs, old, chunk.advantages.to(device).unsqueeze(1), self.clip_epsilon)
        loss = (per_token * weights).sum()
        defended = LossBatch(logprobs, old, anchor_logprobs, mask, weights)
        for defense in defenses:
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
        total, keys = 0.0, own_rows(list(count))
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
    weights: Tensor
    """[B, A] of each acted token in the loss of the whole batch."""
    weight_total: Tensor
    """Sum of the weights of the whole batch, a scalar."""
    sampled: Tensor
    """[B, A] log-probabilities as the sampler reported them."""


def own_rows(rows: Sequence[T]) -> list[tuple[T, bool]]:
    """The rows that this rank puts through the model, each with True; all ranks get equally many.

    Under FSDP a forward needs all ranks, so one that would come out short gets a row more, with False: it counts
    nothing.
    """
    most = -(-len(rows) // ranks.world_size())
    own = ranks.share(rows)  # neighbours, which share their beginnings
    return [(row, True) for row in own] + [(row, False) for row in rows[:1]] * (most - len(own))


class _Batch:
    """A step's samples as rows of tokens, and of them the chunks of this rank.

    Rows with the very same tokens and adapter are put through the model once and then counted as often as they occur:
    short answers of a group coincide all the time, and the loss is the same to the last term.
    """

    def __init__(
        self, samples: list[Sample], advantages: Tensor, loss_type: LossType, max_tokens: int, micro_batch: int | None
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
        own = own_rows(list(index.items()))
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
                    weights=weights[chosen, :width],
                    weight_total=weights.sum(),
                    sampled=torch.tensor([_padded(self.rows[i][0].logprobs, width) for i in chosen]).view(-1, width),
                )
            )


def _padded(values: tuple[float, ...], width: int) -> list[float]:
    return [*values, *[0.0] * (width - len(values))]
