"""Reminder: the rule is said again before a decision.

Mechanism: in every `every`-th round, from the first one on, the sentence that states the rule (or a `text` of yours)
           stands once more at the start of the first user message or at the end of the last one. It is in what is read
           in that round alone and never piles up. A user message, because some testbeds and chat templates have no
           system message, and models are trained to let the user speak last.
Source:    the practice of repeating instructions against their fading in long conversations (e.g. arXiv 2402.10962).
Hook:      on_prompts.
Cost:      the sentence's tokens in each such round.
Known failure: whoever breaks the rule knowingly is told nothing new; compare with `neutral_text`, which has the length
           and place of the reminder and says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from atp_rl.defenses.base import Defense
from atp_rl.rollout import Ask
from atp_rl.types import InputError, Message, Prompt, Scenario

Place = Literal["first", "last"]


def put(text: str, messages: Sequence[Message], place: Place) -> tuple[Message, ...]:
    """The messages with a text at the start of the first user message, or at the end of the last one."""
    of_user = [i for i, message in enumerate(messages) if message["role"] == "user"]
    at = of_user[0 if place == "first" else -1]
    old = messages[at]["content"]
    new: Message = {"role": "user", "content": f"{text}\n{old}" if place == "first" else f"{old}\n{text}"}
    return (*messages[:at], new, *messages[at + 1 :])


@dataclass
class Reminder(Defense):
    name = "reminder"
    deploys = True
    every: int = 1
    """Rounds from one reminder to the next, >= 1."""
    place: Place = "last"
    """At the start of the first user message, or at the end of the last one."""
    text: str | None = None
    """What is said; null is the scenario's own sentence of the rule (`texts.rule`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise InputError(f"defense {self.name}: `every` must be >= 1, got {self.every}")
        if self.place not in ("first", "last"):
            raise InputError(f"defense {self.name}: `place` must be first or last, got {self.place!r}")

    def said(self, scenario: Scenario) -> str:
        return scenario.rule_text if self.text is None else self.text

    def on_prompts(self, prompts: list[Prompt], ask: Ask) -> list[Prompt]:
        return [
            replace(prompt, messages=put(self.said(prompt.moment.scenario), prompt.messages, self.place))
            if prompt.moment.round % self.every == 0
            else prompt
            for prompt in prompts
        ]
