"""One evolution step, as `evolve.loop` takes it: play groups of episodes, reward them, update the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from atp_rl.evolve.learners import PolicyGradient
from atp_rl.evolve.loop import shape
from atp_rl.model.policy import Policy
from atp_rl.model.sampler import HFSampler
from atp_rl.rollout import Play, Rollout, rollout
from tests.benchmarks.rollouts import SAMPLING, Work, pick_scenarios

LEARNING_RATE = 1e-5
"""So small that the policy answers alike however many steps were taken, and all ways play the same."""

REWARDS = {"payoff": 1.0}

SAMPLER_MODES: Mapping[str, Mapping[str, Any]] = {"sampled": {}, "choice mode": {"mode": "choice"}}
"""The ways of drawing that are measured, with what `HFSampler` is told."""


class Stepped(NamedTuple):
    played: Rollout
    metrics: dict[str, float]


class EvolutionStep:
    """A policy and its learner; every call takes one step."""

    def __init__(
        self, policy: Policy, work: Work, *, micro_batch: int | None = None, batch_size: int = 256, **mode: Any
    ) -> None:
        """`mode`: what else `HFSampler` is told."""
        self.policy, self.work = policy, work
        self.sampler = HFSampler(policy, batch_size=batch_size, **mode)
        self.learner = PolicyGradient(
            policy,
            learning_rate=LEARNING_RATE,
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            updates_per_step=1,
            micro_batch=micro_batch,
            clip_epsilon=0.2,
            scale_rewards="group",
            loss_type="dapo",
            max_tokens=work.play.sampling.max_new_tokens * work.play.rounds,
            temperature=work.play.sampling.temperature,
        )
        self.taken = 0

    def __call__(self) -> Stepped:
        played = self.play()
        return Stepped(played, self.learn(played))

    def play(self) -> Rollout:
        """The episodes of a new step; the sampler has forgotten what it read when this returns."""
        work = self.work
        self.taken += 1
        played = rollout(work.scenarios, self.sampler, work.play, group_size=work.group_size, seed=(0, self.taken))
        self.sampler.sync(self.policy)
        return played

    def learn(self, played: Rollout) -> dict[str, float]:
        """Reward the episodes and update the adapter."""
        metrics = self.learner.update(self.policy, played.groups, shape(played.groups, REWARDS), [])
        self.sampler.sync(self.policy)
        return metrics


def step_work(rounds: int, *, scenarios: int = 32, group_size: int = 8) -> Work:
    """What one training step of the tiny recipe plays, or one of several rounds with all of them in the prompt."""
    play = Play(rounds=rounds, supervision={"probability": 0.1}, history_window=rounds, sampling=SAMPLING)
    name = f"step: {scenarios} scenarios x {group_size} episodes x {rounds} round{'s' * (rounds > 1)}"
    return Work(name, pick_scenarios("train", scenarios), group_size, play)


def counted(played: Rollout) -> dict[str, int]:
    """Decisions, tokens, invalid decisions."""
    turns = [turn for episode in played.episodes for turn in episode.turns]
    return {
        "decisions": len(turns),
        "tokens": played.tokens,
        "invalid": sum(turn.outcome.verdict == "invalid" for turn in turns),
    }
