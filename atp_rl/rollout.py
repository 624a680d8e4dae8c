"""Plays environments in lock step: all open seats of as many as fit go into one batched `generate` per round.

The only place that decides which tokens a policy acted: a turn keeps the prompt that was read and the tokens that were
drawn, and neither is ever made again from text.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from atp_rl import ranks
from atp_rl.scenarios import Supervision, Told, make_env
from atp_rl.types import (
    Chat,
    Completion,
    Episode,
    Group,
    Key,
    Message,
    Moment,
    Outcome,
    Overhead,
    Prompt,
    Sampler,
    SamplingParams,
    Scenario,
    Turn,
)


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


Tools = Sequence[Mapping[str, Any]]
Ask = Callable[[Sequence[Prompt], Sequence[str], int], list[Completion]]
"""Has prompts answered beside the episode: the prompts, who answers each (as in `Chat`), the most tokens of a reply."""


class Reader(Protocol):
    """Changes what seats read (a defense). It must depend on its arguments alone: episodes are played in any order."""

    cost: Overhead

    def on_history(self, rounds: list[int], moment: Moment) -> list[int]:
        """Which of these past rounds (from 0, ascending) stay in the conversation."""
        ...

    def on_prompts(self, prompts: list[Prompt], ask: Ask) -> list[Prompt]:
        """Change the conversations that are about to be read, one for each prompt, in order."""
        ...


def rollout(
    scenarios: Sequence[Scenario],
    sampler: Sampler,
    play: Play,
    *,
    group_size: int,
    seed: Key,
    readers: Sequence[Reader] = (),
) -> Rollout:
    """Play `group_size` episodes of every scenario to their end; each rank whole groups, and all ranks get all of them.

    Args:
        seed: the stream of all episodes. An episode draws from (seed, scenario id, sample) alone, so it is the same in
            whatever batch it is played. Where a scenario occurs twice, its samples are numbered on.
        readers: change what is read, one after the other; what that costs is added to theirs.
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
        _play(wave, sampler, play, readers)
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


def _play(open_episodes: Sequence[_Open], sampler: Sampler, play: Play, readers: Sequence[Reader]) -> None:
    while pending := [
        (o, prompt) for o in open_episodes for prompt in o.observe(play.history_window, readers, sampler)
    ]:
        prompts = [prompt for _, prompt in pending]
        tools = [o.env.tools for o, _ in pending]
        for i, reader in enumerate(readers):
            prompts = _read(reader, i, prompts, sampler, play.sampling, tools)
        chats = [
            Chat(
                prompt.messages,
                _encode(prompt, sampler, o.env.tools),
                o.episode.scenario.options if o.env.names_options else (),
                prompt.moment.seed,
                prompt.moment.player,
                o.env.tools,
            )
            for (o, _), prompt in zip(pending, prompts, strict=True)
        ]
        completions = sampler.generate(chats, play.sampling)
        for (o, before), read, chat, completion in zip(pending, prompts, chats, completions, strict=True):
            o.take(before, read, chat, completion)
        if any(o.env.runs_tools for o in open_episodes):
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process; their order changes nothing
                list(pool.map(_Open.step, open_episodes))
        else:
            for o in open_episodes:
                o.step()


def _read(
    reader: Reader,
    place: int,
    prompts: list[Prompt],
    sampler: Sampler,
    sampling: SamplingParams,
    tools: Sequence[Tools],
) -> list[Prompt]:
    """The prompts as `reader` changes them; its cost grows by what it asked and by what is read more.

    What it is answered is drawn from the moment and from its `place` among the readers, so no two share a draw.
    """
    begun, asked = time.perf_counter(), 0

    def ask(questions: Sequence[Prompt], players: Sequence[str], most: int) -> list[Completion]:
        nonlocal asked
        asked += 1
        chats = [
            Chat(q.messages, _encode(q, sampler, ()), (), (*q.moment.seed, "asked", place, asked), player)
            for q, player in zip(questions, players, strict=True)
        ]
        answers = sampler.generate(chats, replace(sampling, max_new_tokens=most))
        reader.cost.forwards += len(answers)
        reader.cost.tokens += sum(len(c.prompt_ids) + len(a.token_ids) for c, a in zip(chats, answers, strict=True))
        return answers

    changed = reader.on_prompts(prompts, ask)
    if any(new is not old for new, old in zip(changed, prompts, strict=True)):
        for new, old, own in zip(changed, prompts, tools, strict=True):
            reader.cost.tokens += len(_encode(new, sampler, own)) - len(_encode(old, sampler, own))
        reader.cost.seconds += time.perf_counter() - begun
    return changed


def _encode(prompt: Prompt, sampler: Sampler, tools: Tools) -> Sequence[int]:
    """The tokens of a conversation; none for samplers that read text."""
    chat_format = getattr(sampler, "chat", None)
    return chat_format.encode(prompt.messages, prompt.written, tools) if chat_format else []


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
        self.replies: dict[str, list[tuple[int, Completion]]] = {seat: [] for seat in self.env.seats}
        """With the round of each."""
        self.past: dict[str, list[Outcome]] = {seat: [] for seat in self.env.seats}
        """Of every round that a seat has decided."""
        self.pending: dict[str, tuple[Chat, list[Message]]] = {}
        """What each seat has read, and which messages of it were new."""

    def observe(self, window: int, readers: Sequence[Reader], sampler: Sampler) -> list[Prompt]:
        """The conversations of the seats that have to decide now."""
        moments = {seat: self._moment(seat) for seat in self.env.seats}
        shown = {seat: list(range(max(0, m.round - window), m.round)) for seat, m in moments.items()}
        prompts = self._prompts(shown, moments)
        for reader in readers:
            own = {p.moment.seat: reader.on_history(shown[p.moment.seat], p.moment) for p in prompts}
            before, shown = shown, shown | own
            if shown != before:
                begun, longer = time.perf_counter(), prompts
                prompts = self._prompts(shown, moments)
                for new, old in zip(prompts, longer, strict=True):
                    reader.cost.tokens += len(_encode(new, sampler, self.env.tools))
                    reader.cost.tokens -= len(_encode(old, sampler, self.env.tools))
                reader.cost.seconds += time.perf_counter() - begun
        return prompts

    def _prompts(self, shown: dict[str, list[int]], moments: Mapping[str, Moment]) -> list[Prompt]:
        """The conversations if these past rounds are in them."""
        prompts = []
        for seat, messages in self.env.observe(shown).items():
            sight = {*shown[seat], moments[seat].round}
            kept = [(k, reply.token_ids) for k, reply in self.replies[seat] if k in sight]
            written, of_rounds = tuple(ids for _, ids in kept), tuple(k for k, _ in kept)
            prompts.append(Prompt(tuple(messages), written, moments[seat], of_rounds))
        return prompts

    def _moment(self, seat: str) -> Moment:
        player = "aligned" if seat in self.env.frozen else seat if self.population else "policy"
        seed = (*self.episode.seed, self.env.seats.index(seat), len(self.replies[seat]))
        past = tuple(self.past[seat])
        return Moment(self.episode.scenario, seat, player, len(past), past, seed, self.episode.seed)

    def take(self, before: Prompt, read: Prompt, chat: Chat, completion: Completion) -> None:
        """A reply to `chat`, which was `before` until the readers made `read` of it."""
        moment = before.moment
        now, roles = moment.round, [message["role"] for message in read.messages]
        # the seat's own replies that are left; an assistant message beyond these is a reader's
        own = sum(k < now for k in read.rounds) + before.rounds.count(now)
        start = [i for i, role in enumerate(roles) if role == "assistant"][own - 1] + 1 if own else roles.index("user")
        new = list(read.messages[start:]) if self.episode.messages[moment.seat] else list(read.messages)
        self.pending[moment.seat] = chat, new
        self.replies[moment.seat].append((moment.round, completion))

    def step(self) -> None:
        if not self.pending:
            return
        outcomes = self.env.step({seat: self.replies[seat][-1][1].text for seat in self.pending})
        for seat, (chat, new) in self.pending.items():
            (k, completion), outcome = self.replies[seat][-1], outcomes[seat]
            self.episode.turns.append(Turn(seat, k, tuple(chat.prompt_ids), completion, outcome, chat.player))
            if outcome.verdict is not None:
                self.past[seat].append(outcome)
            reply: Message = {"role": "assistant", "content": completion.text}
            self.episode.messages[seat] += [*new, reply]
        turns = self.episode.turns
        for seat in sorted(outcomes.keys() - self.pending.keys()):  # what its last reply came to as others moved
            last = max(i for i, turn in enumerate(turns) if turn.seat == seat)
            turns[last] = replace(turns[last], outcome=outcomes[seat])
            if turns[last].outcome.verdict is not None:
                self.past[seat][-1] = outcomes[seat]
        self.pending = {}
