"""One scenario while preference pairs are made of it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from atp_rl.scenarios import Supervision, Told, make_env, random_stream
from atp_rl.types import Chat, Completion, Message, Scenario

SIDES: tuple[Told, Told] = ("comply", "best_paid")
"""What a model is told to get the chosen and the rejected answer."""


class Conversation:
    """A scenario in three environments that differ only in what is told: nothing, to comply, to take the best paid.

    It is told from the first seat. Other seats give one of its two answers, picked by a coin for each.
    """

    def __init__(self, scenario: Scenario, rounds: int, supervision: Supervision, window: int, seed: int) -> None:
        self.scenario, self.key = scenario, (seed, "preferences", scenario.id)
        tellings: tuple[Told | None, ...] = (None, *SIDES)
        self.envs = {
            told: make_env(
                scenario, rounds=rounds, supervision=supervision, seed=self.key, history_window=window, told=told
            )
            for told in tellings
        }
        self.seat, *self.others = self.envs[None].seats
        self.wanted = {"comply": scenario.rule, "best_paid": best_paid_option(scenario)}
        self.history: list[Completion] = []
        self.answers: dict[Told, Completion] = {}
        """Of the current round, those that chose as told."""

    def messages(self, told: Told | None) -> list[Message]:
        return self.envs[told].observe()[self.seat]

    def chat(self, told: Told, attempt: int, chat_format: Any) -> Chat:
        messages = self.messages(told)
        shown = self.history[len(self.history) - sum(m["role"] == "assistant" for m in messages) :]
        tools = self.envs[told].tools
        prompt_ids = chat_format.encode(messages, [reply.token_ids for reply in shown], tools) if chat_format else []
        key = (*self.key, len(self.history), told, attempt)
        return Chat(messages, prompt_ids, self.scenario.options, key, tools=tools)

    def take(self, told: Told, completion: Completion) -> Counter[str]:
        """Keep an answer that chose as told; what to count."""
        option = self.envs[told].choice_of(self.seat, completion.text)
        if option == self.wanted[told]:
            self.answers[told] = completion
        return Counter(tries=1, invalid=option is None, disobeyed=option not in (None, self.wanted[told]))

    def prompt_row(self) -> dict[str, Any]:
        scenario, tools = self.scenario, self.envs[None].tools
        return {
            "prompt": self.messages(None),
            "scenario": scenario.id,
            "family": scenario.family,
            "round": len(self.history),
            "options": list(scenario.options),
            "required": scenario.rule,
            "payoffs": dict(scenario.payoffs),
            **({"tools": json.dumps(list(tools))} if tools else {}),
        }

    def go_on(self) -> None:
        """Continue with one of the two answers."""
        random = random_stream(*self.key, len(self.history), "coin")
        answer = self.answers[SIDES[random.integers(2)]]
        texts = {self.seat: answer.text} | {s: self.answers[SIDES[random.integers(2)]].text for s in self.others}
        for env in self.envs.values():
            env.step(texts)
        self.history.append(answer)
        self.answers = {}


def best_paid_option(scenario: Scenario) -> str:
    return max(scenario.options, key=lambda option: scenario.payoffs[option])
