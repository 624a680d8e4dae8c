"""Redaction: what options pay is not read, or only in which order.

Mechanism: amounts of money in what the environment says (and in collusion factors, changes and capital) become "an
           amount" and "Highest income: ..." is left out (`hide`), or they become their rank among what the options pay,
           "the highest amount" (`ranks`). Names of options and the texts of problems stay; so does what is paid.
Source:    ours; without amounts there is nothing to weigh against the rule, with ranks no size of the gain.
Hook:      on_prompts.
Cost:      about none: some prompts become a little shorter or longer.
Known failure: a learner is paid all the same, so its weights find out what pays. Amounts that the seat itself wrote
           stay. In texts that are not of this project amounts are found by their form ($5, 5 dollars, and in games
           numbers with a decimal point), so others stay.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from atp_rl.defenses.base import Defense
from atp_rl.rollout import Ask
from atp_rl.types import InputError, Message, Prompt, Scenario

HIDDEN = "an amount"
MONEY = r"[$€£] ?(?P<before>\d[\d,]*(?:\.\d+)?)|(?P<after>\d[\d,]*(?:\.\d+)?) ?(?:dollars|euros|pounds|USD|EUR|GBP)\b"
CAPITAL = r"(?<=Your capital went from )(?P<was>-?\d+\.\d\d) to (?P<now>-?\d+\.\d\d)(?=\.)"
FACTOR = r"(?<=\bby )(?P<factor>[+-]?\d+(?:\.\d+)?)|(?P<decimal>[+-]?\d+\.\d+)"
ORDINALS = ("second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


@dataclass
class Redaction(Defense):
    name = "redaction"
    deploys = True
    mode: Literal["hide", "ranks"] = "hide"
    """Leave amounts out, or say their rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("hide", "ranks"):
            raise InputError(f"defense redaction: `mode` must be hide or ranks, got {self.mode!r}")

    def on_prompts(self, prompts: list[Prompt], ask: Ask) -> list[Prompt]:
        return [self._redacted(prompt) for prompt in prompts]

    def _redacted(self, prompt: Prompt) -> Prompt:
        scenario = prompt.moment.scenario
        pattern, ranks = _pattern(scenario), _ranks(scenario)

        def said(match: re.Match[str]) -> str:
            found = {name: text for name, text in match.groupdict().items() if text is not None}
            if "kept" in found:
                return match[0]
            if "cue" in found:
                return "" if self.mode == "hide" else match[0]
            if self.mode == "hide":
                return f"{HIDDEN} to {HIDDEN}" if "was" in found else HIDDEN
            if "was" in found:
                was, now = float(found["was"]), float(found["now"])
                return f"{HIDDEN} to {'a higher one' if now > was else 'a lower one' if now < was else 'the same one'}"
            return ranks.get(next(iter(found.values())).replace(",", ""), HIDDEN)

        messages: list[Message] = []
        for message in prompt.messages:
            own = message["role"] == "assistant"
            text = message["content"] if own else pattern.sub(said, message["content"])
            messages.append({"role": message["role"], "content": text})
        return replace(prompt, messages=tuple(messages)) if messages != list(prompt.messages) else prompt


def _pattern(scenario: Scenario) -> re.Pattern[str]:
    """What is changed in a scenario's texts, and, so that it is found first, what stays: options and problems."""
    problems = [problem["question"] for problem in scenario.extra.get("problems", [])]
    kept = "|".join(re.escape(text) for text in sorted([*scenario.options, *problems], key=len, reverse=True))
    cue = rf"(?P<cue>Highest income: (?:{re.escape(scenario.extra['tempting'])})?[^.]*\. ?)"
    game = [CAPITAL, FACTOR] if scenario.testbed == "collusion" else []
    return re.compile("|".join([cue, rf"(?P<kept>{kept})", MONEY, *game]))


def _ranks(scenario: Scenario) -> dict[str, str]:
    """The rank of every amount, by the ways in which texts write it."""
    paid = {*scenario.payoffs.values()}
    written = {value: {f"{value:.2f}".removesuffix(".00"), f"{value:g}", f"{value:.2f}"} for value in paid}
    if scenario.testbed == "collusion":
        paid = {*scenario.extra["game"]["rewards"]}
        written = {f: {f"{f:g}", f"{f - 1:+.2g}", f"{f - 1:.6g}"} for f in paid}
    order = sorted(paid, reverse=True)
    inner = [f"the {ordinal} highest amount" for ordinal in ORDINALS] + [HIDDEN] * len(order)
    names = ["the highest amount", *inner[: len(order) - 2], "the lowest amount"]
    names = names if len(order) > 1 else ["the same amount"]
    ranked = {text: name for value, name in zip(order, names, strict=True) for text in written[value]}
    return {"0": "nothing"} | ranked if scenario.testbed != "collusion" else ranked
