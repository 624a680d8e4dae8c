"""Plays environments in lock step: all open seats of as many as fit go into one batched `generate` per round.

The only place that decides which tokens a policy acted: a turn keeps the prompt that was read and the tokens that were
drawn, and neither is ever made again from text.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

from atp_rl import ranks
from atp_rl.scenarios import Supervision, Told, make_env
from atp_rl.types import Chat, Completion, Episode, Group, Key, Message, Sampler, SamplingParams, Scenario, Turn


@dataclass(frozen=True)
class Play:
    """How episodes are played, whatever the scenario."""

    rounds: int
    supervision: Supervision
    history_window: int
    sampling: SamplingParams
    told: Told | None = None
    population: bool = False
    """Whether every seat has an adapter of its own, of the seat's name; else all are played by `policy`."""


class Rollout(NamedTuple):
    groups: list[Group]
    tokens: int
    """Tokens drawn."""
    seconds: float

    @property
    def episodes(self) -> list[Episode]:
        return [episode for group in self.groups for episode in group]


PromptHook = Callable[[list[Message]], list[Message]]
"""Changes what a policy reads in a round; must not depend on anything but the messages."""


def rollout(
    scenarios: Sequence[Scenario],
    sampler: Sampler,
    play: Play,
    *,
    group_size: int,
    seed: Key,
    on_prompt: Sequence[PromptHook] = (),
) -> Rollout:
    """Play `group_size` episodes of every scenario to their end; each rank whole groups, and all ranks get all of them.

    Args:
        seed: the stream of all episodes. An episode draws from (seed, scenario id, sample) alone, so it is the same in
            whatever batch it is played. Where a scenario occurs twice, its samples are numbered on.
        on_prompt: the defenses' changes to what is read.
    """
    begun = time.perf_counter()
    times = Counter[str]()
    numbered: list[tuple[Scenario, int]] = []
    for scenario in scenarios:
        numbered.append((scenario, times[scenario.id] * group_size))
        times[scenario.id] += 1
    open_groups = [
        [_Open(scenario, first + i, play, seed, sampler.version) for i in range(group_size)]
        for scenario, first in ranks.share(numbered)
    ]
    for wave in _waves(open_groups, getattr(sampler, "batch_size", None)):
        _play(wave, sampler, play.sampling, on_prompt)
    groups = ranks.gather([[o.episode for o in group] for group in open_groups])
    tokens = sum(len(t.completion.token_ids) for group in groups for episode in group for t in episode.turns)
    return Rollout(groups, tokens, time.perf_counter() - begun)


def _waves(groups: Sequence[list[_Open]], most: int | None) -> list[list[_Open]]:
    """Whole groups that are played together: at most so many conversations, or a single group; None is all of them.

    What has been read of every conversation is kept until it ends, so their number is what bounds the memory.
    """
    waves: list[list[_Open]] = []
    conversations = 0
    for group in groups:
        own = sum(len(o.env.seats) for o in group)
        if not waves or (most is not None and conversations + own > most):
            waves.append([])
            conversations = 0
        waves[-1] += group
        conversations += own
    return waves


def _play(
    open_episodes: Sequence[_Open], sampler: Sampler, sampling: SamplingParams, on_prompt: Sequence[PromptHook]
) -> None:
    chat_format = getattr(sampler, "chat", None)
    while pending := [(o, seat, messages) for o in open_episodes for seat, messages in o.env.observe().items()]:
        chats: list[Chat] = []
        for o, seat, messages in pending:
            for hook in on_prompt:
                messages = hook(messages)
            asked = sum(m["role"] == "assistant" for m in messages)
            replies = o.replies[seat][len(o.replies[seat]) - asked :]
            written = [reply.token_ids for reply in replies]
            prompt = chat_format.encode(messages, written, o.env.tools) if chat_format else []
            options = o.episode.scenario.options if o.env.names_options else ()
            chats.append(Chat(messages, prompt, options, o.reply_seed(seat), o.player(seat), o.env.tools))
        completions = sampler.generate(chats, sampling)
        for (o, seat, _), chat, completion in zip(pending, chats, completions, strict=True):
            o.take(seat, chat, completion)
        if any(o.env.runs_tools for o in open_episodes):
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process; their order changes nothing
                list(pool.map(_Open.step, open_episodes))
        else:
            for o in open_episodes:
                o.step()


class _Open:
    """An episode while it is being played."""

    def __init__(self, scenario: Scenario, sample: int, play: Play, seed: Key, version: int) -> None:
        key = (*seed, scenario.id, sample)
        self.env = make_env(
            scenario,
            rounds=play.rounds,
            supervision=play.supervision,
            seed=key,
            history_window=play.history_window,
            told=play.told,
            group_seed=(*seed, scenario.id),
        )
        self.episode = Episode(scenario, sample, key, [], {seat: [] for seat in self.env.seats}, version)
        self.population = play.population
        self.replies: dict[str, list[Completion]] = {seat: [] for seat in self.env.seats}
        self.decided = Counter[str]()
        self.pending: dict[str, Chat] = {}

    def reply_seed(self, seat: str) -> Key:
        return (*self.episode.seed, self.env.seats.index(seat), len(self.replies[seat]))

    def player(self, seat: str) -> str:
        return "aligned" if seat in self.env.frozen else seat if self.population else "policy"

    def take(self, seat: str, chat: Chat, completion: Completion) -> None:
        self.pending[seat] = chat
        self.replies[seat].append(completion)

    def step(self) -> None:
        if not self.pending:
            return
        outcomes = self.env.step({seat: self.replies[seat][-1].text for seat in self.pending})
        for seat, chat in self.pending.items():
            completion, outcome = self.replies[seat][-1], outcomes[seat]
            prompt, decided = tuple(chat.prompt_ids), self.decided[seat]
            self.episode.turns.append(Turn(seat, decided, prompt, completion, outcome, chat.player))
            self.decided[seat] += outcome.verdict is not None
            seen = self.episode.messages[seat]
            new = chat.messages[-1:] if seen else list(chat.messages)
            self.episode.messages[seat] = [*seen, *new, {"role": "assistant", "content": completion.text}]
        turns = self.episode.turns
        for seat in sorted(outcomes.keys() - self.pending.keys()):  # what its last reply came to as others moved
            last = max(i for i, turn in enumerate(turns) if turn.seat == seat)
            turns[last] = replace(turns[last], outcome=outcomes[seat])
        self.pending = {}
