"""The same episodes of the same policy, played in different ways and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import torch
from peft import LoraConfig

from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import TINY, Policy
from atp_rl.model.sampler import HFSampler
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import load
from atp_rl.types import Sampler, SamplingParams, Scenario
from tests.benchmarks import seats
from tests.benchmarks.generate import GenerateSampler

SAMPLING = SamplingParams(max_new_tokens=16)
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Work:
    """What every way of one table has to play."""

    name: str
    scenarios: Sequence[Scenario]
    group_size: int
    play: Play

    def part(self, scenarios: int) -> Work:
        """The first scenarios alone."""
        return Work(self.name, self.scenarios[:scenarios], self.group_size, self.play)


class Played(NamedTuple):
    decisions: int
    tokens: int
    invalid: int


Way = Callable[[Policy, Work], Played]


def one_at_a_time(policy: Policy, work: Work) -> Played:
    """One episode after the other, one conversation in a batch."""
    sampler = GenerateSampler(policy)
    done = [
        _play(sampler, [scenario], 1, work.play, sample)
        for scenario in work.scenarios
        for sample in range(work.group_size)
    ]
    return Played(*(sum(column) for column in zip(*done, strict=True)))


def batched_generate(policy: Policy, work: Work) -> Played:
    """All episodes in lock step, each prompt of each of them read as a whole in every round."""
    return _play(GenerateSampler(policy), work.scenarios, work.group_size, work.play)


def ours(policy: Policy, work: Work) -> Played:
    """`atp_rl.rollout` with its sampler, which starts without anything cached."""
    return _play(HFSampler(policy), work.scenarios, work.group_size, work.play)


def ours_in_choice_mode(policy: Policy, work: Work) -> Played:
    """The same, with every reply that does not follow an option's answer cut where it leaves it."""
    return _play(HFSampler(policy, mode="choice"), work.scenarios, work.group_size, work.play)


def eight_copies(policy: Policy, work: Work) -> Played:
    """A copy of the model for every seat, one conversation in a batch: the paper's way."""
    return Played(*seats.play(seats.CopiesSampler(_copies())))


def eight_adapters(policy: Policy, work: Work) -> Played:
    """One model with an adapter for every seat, all of them in one batch."""
    return Played(*seats.play(HFSampler(_population())))


def one_adapter(policy: Policy, work: Work) -> Played:
    """One model with one adapter that plays all seats, as in self-play and in context."""
    return Played(*seats.play(HFSampler(policy), population=False))


@cache
def _copies() -> dict[str, Policy]:
    return seats.eight_copies()


@cache
def _population() -> Policy:
    return seats.eight_adapters()


def _play(sampler: Sampler, scenarios: Sequence[Scenario], group_size: int, play: Play, sample: int = 0) -> Played:
    played = rollout(scenarios, sampler, play, group_size=group_size, seed=(0, sample))
    turns = [turn for episode in played.episodes for turn in episode.turns]
    return Played(len(turns), played.tokens, sum(turn.outcome.verdict == "invalid" for turn in turns))


@dataclass
class Row:
    """One line of the table: one way of doing one work."""

    work: Work
    way: str
    run: Way
    played: Played = field(default_factory=lambda: Played(0, 0, 0))
    """In the last repeat."""
    seconds: list[float] = field(default_factory=list)
    """Of every repeat."""

    def record(self, reference: Row) -> dict[str, Any]:
        return {
            "work": self.work.name,
            "way": self.way,
            **self.played._asdict(),
            "seconds_min": min(self.seconds),
            "seconds_median": median(self.seconds),
            "seconds": self.seconds,
            "times_faster": min(reference.seconds) / min(self.seconds),
        }


def measure(repeats: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Time every way `repeats` times, in turn, so that what else the machine does meets all of them."""
    policy = make_policy()
    tables = [
        [
            Row(evaluation_work(), "one conversation at a time, generate", one_at_a_time),
            Row(evaluation_work(), "batched generate", batched_generate),
            Row(evaluation_work(), "atp_rl.rollout", ours),
            Row(evaluation_work(), "atp_rl.rollout, choice mode", ours_in_choice_mode),
        ],
        [
            Row(training_work(), "batched generate", batched_generate),
            Row(training_work(), "atp_rl.rollout", ours),
            Row(training_work(), "atp_rl.rollout, choice mode", ours_in_choice_mode),
        ],
        [
            Row(seats_work(), "eight copies of the model, one conversation at a time", eight_copies),
            Row(seats_work(), "eight adapters on one model, atp_rl.rollout", eight_adapters),
            Row(seats_work(), "one adapter for all seats, atp_rl.rollout", one_adapter),
        ],
    ]
    for row in (row for rows in tables for row in rows):
        row.run(policy, row.work.part(2))  # what torch and transformers do once
    for repeat in range(repeats):
        for row in (row for rows in tables for row in rows):
            report(f"repeat {repeat + 1} of {repeats}: {row.work.name}, {row.way}")
            policy.chat = ChatFormat(policy.chat.tokenizer)  # no text rendered or tokenised yet
            torch.manual_seed(repeat)
            begun = time.perf_counter()
            row.played = row.run(policy, row.work)
            row.seconds.append(time.perf_counter() - begun)
    return [row.record(rows[0]) for rows in tables for row in rows]


def make_policy() -> Policy:
    """The packaged model with a fresh adapter of the tiny recipes' shape, active in every way of playing."""
    return Policy.load(TINY, lora=LORA, seed=0)


def evaluation_work() -> Work:
    """Six rounds with the last five in the prompt, as in the paper."""
    play = Play(rounds=6, supervision="alternating", history_window=5, sampling=SAMPLING)
    return Work("64 scenarios x 6 rounds", pick_scenarios("held_out", 64), 1, play)


def training_work() -> Work:
    """What one training step of the tiny recipe plays."""
    play = Play(rounds=1, supervision={"probability": 0.1}, history_window=5, sampling=SAMPLING)
    return Work("32 scenarios x 8 episodes x 1 round", pick_scenarios("train", 32), 8, play)


def seats_work() -> Work:
    """One round of the paper's grid cell: seven games of eight seats, each seat with weights of its own."""
    return Work("7 games x 8 seats x 1 round", seats.games(), 1, seats.PLAY)


def pick_scenarios(split: str, count: int) -> list[Scenario]:
    """As many of each family as there are of the others, to within one."""
    found = load({"split": split, "per_family": count})
    return sorted(found, key=lambda scenario: int(scenario.id.split("/")[2]))[:count]
