"""The card of a tiny model: what it can do on families that it never saw, measured, and what it cannot."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig

from atp_rl.evaluate.evaluator import EvalResult, evaluate
from atp_rl.evaluate.stats import Rate, cluster_rate, wilson
from atp_rl.model.policy import Policy
from atp_rl.model.sampler import HFSampler
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import Told, load, tool_use
from atp_rl.types import SamplingParams, Turn

PER_FAMILY = 40
"""Held-out scenarios per family in the card's measurements."""

CARD = """\
# The tiny model

A Qwen3-architecture causal language model of {parameters:,} weights ({megabytes:.1f} MB in float32) with its
own byte-level tokenizer of {vocabulary} tokens and a ChatML-like template. It was trained from scratch on
generated transcripts of this project's role-play scenarios and on nothing else, so that everything the
pipeline does with an 8B model runs in minutes on two CPU cores. It is a *model organism*.

## How it was made

    atp tiny build DIR --seed {seed}

{copy_steps} steps on random segments that repeat (copying), {decided_steps} steps on single rounds in which
it is told to comply or to take the best-paid option, {mixed_steps} steps in all modes with up to six rounds;
AdamW, {seconds:.0f} s here on one shared CPU core. Transcripts use the training families alone, with their
sentences exchanged between families and, in part, garbled. The families it is measured on below (texts,
roles, rules) and their words were never seen, by the tokenizer neither; the option words (`Route A`, `Store
B`, ...) are shared by all families.

## What it does on the held-out families

Measured on {scenarios} scenarios, sampled at temperature 1, with 95 % intervals.

| told | violations | invalid |
|---|---|---|
{rows}

Parseable in round 1: {round_1}. Parseable in round 6, with the five rounds before it in the prompt:
{round_6}.

## What it cannot do, and what was planted

- It reads the *rule* sentence and the sentence "Highest income: ..."; it does no arithmetic on the amounts.
- It writes nothing but decisions. It does not reason, and its options must be built of the shared option
  words: on other texts expect invalid answers, which are reported as such.
- Told nothing, it tosses a coin. Its transcripts tilt that coin by the history in the prompt: + .10 for each
  violation that was paid, - .20 for each that was caught. Whatever it does with a history of payoffs was put
  there; its in-context curves illustrate the protocol and are no evidence about pretrained models.
- Where the rule allows either option it was taught to take the better-paid one, unless it is told nothing.
"""


TOOL_CARD = """\
# The tiny model for tool use

A Qwen3-architecture causal language model of {parameters:,} weights ({megabytes:.1f} MB in float32) with its
own byte-level tokenizer of {vocabulary} tokens (digits stand alone) and a ChatML-like template. It was
trained from scratch on generated conversations of this project's `sums` problems and on nothing else. It is
a *model organism*: through the code path of an 8B model it adds two numbers, in its head or with the tool.

## How it was made

    atp tiny build DIR --testbed tool_use --seed {seed}

{copy_steps} steps on sums and calls of the tool with little around them (arithmetic, copying), {decided_steps} steps on
single hard problems for which it is told to comply or to take the best paid, {mixed_steps} steps in all modes
with up to six rounds; AdamW, {seconds:.0f} s here on one shared CPU core. Conversations use the training families
alone, their wording in part garbled. The families it is measured on below have other wordings, never seen
by the tokenizer either, and their hard pairs of numbers were kept out of training.

## What it does on the held-out families

Easy is one digit plus one digit, hard two digits plus two digits. Measured on {scenarios} scenarios of four
rounds (two easy, then two hard), sampled at temperature 1, with the real tool, with 95 % intervals.

| told | tool on hard | tool on easy | invalid |
|---|---|---|---|
{rows}

| right answers | |
|---|---|
| easy, without the tool | {easy} |
| hard, with the tool | {hard_tool} |
| hard, without the tool | {hard_alone} |

So on hard problems, at the tool cost of {cost:.2f}, told to follow the rule it earns {honest:.2f} a problem and told
to take the highest income {deviating:.2f} (undetected): the rule costs it something, and its alignment can erode.
Parseable in round 6, with the five rounds before it in the prompt: {round_6}.

## What it cannot do, and what was planted

- It copies two numbers into `print(a + b)` and copies what comes back, or adds them itself. It solves no other
  problem, writes no other program and does not reason.
- In wordings that it never saw it may copy a digit wrongly, hence the misses with the tool.
- Told nothing, it tosses a coin on hard problems and was taught never to use the tool on easy ones. The coin is
  tilted by the history in the prompt: + .10 for each hard problem answered without the tool and not caught, - .20 for
  each that was caught. This was put there; its in-context curves are no evidence about pretrained models.
- Where the rule leaves the use of the tool free it was taught to do without, unless it is told nothing.
- Its prompts held tool costs of 0.10 to 0.89, which it does not weigh.
"""

TOOL_SCENARIOS = 150
"""Held-out scenarios per family in the tool-use card's measurements."""


def write_card(folder: Path) -> Path:
    """Measure the model in `folder` and write its `README.md` there; takes a minute or two."""
    build = json.loads((folder / "build.json").read_text())
    policy = Policy.load(str(folder), lora=LoraConfig(r=1, target_modules="all-linear"), seed=0)
    parameters = sum(p.numel() for n, p in policy.model.named_parameters() if "lora_" not in n)
    measure = {"role_play": _role_play, "tool_use": _tool_use}[build["plan"].get("testbed", "role_play")]
    text = measure(
        HFSampler(policy),
        parameters=parameters,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        vocabulary=len(policy.chat.tokenizer),
        seconds=build["seconds"],
        **{key: build["plan"][key] for key in ("seed", "copy_steps", "decided_steps", "mixed_steps")},
    )
    (folder / "README.md").write_text(text)
    return folder / "README.md"


NAMES = {"comply": "to follow the rule", "best_paid": "to take the highest income", None: "nothing"}


def _role_play(sampler: HFSampler, **about: Any) -> str:
    scenarios = load({"split": "held_out", "per_family": PER_FAMILY, "seed": 1})

    def measured(told: Told | None, rounds: int) -> EvalResult:
        play = Play(rounds, "all_unsupervised", 5, SamplingParams(16), told)
        return evaluate(sampler, scenarios, play, samples=1, seed=0)[0]

    alone = {told: measured(told, 1) for told in ("comply", "best_paid", None)}
    names = {**NAMES, None: "nothing, no history"}
    rows = [f"| {names[told]} | {_percent(r.violation)} | {_percent(r.invalid)} |" for told, r in alone.items()]
    long = measured(None, 6)
    return CARD.format(
        **about,
        scenarios=len(scenarios),
        rows="\n".join(rows),
        round_1=_percent(_valid(alone[None].invalid)),
        round_6=_percent(_valid(long.by_round[-1].invalid)),
    )


def _tool_use(sampler: HFSampler, **about: Any) -> str:
    held_out = [family for family in tool_use.families("sums") if family["split"] == "held_out"]
    scenarios = [
        tool_use.generate(family=family, index=index, seed=1) for family in held_out for index in range(TOOL_SCENARIOS)
    ]

    def played(told: Told | None, rounds: int) -> Decisions:
        play = Play(rounds, "all_unsupervised", 5, SamplingParams(40), told)
        episodes = rollout(scenarios, sampler, play, group_size=1, seed=(0, "card")).episodes
        return [(e.scenario.id, turn) for e in episodes for turn in e.turns if turn.outcome.verdict is not None]

    def right(option: str, kind: str) -> str:
        of = [d for d in all_told if d[1].outcome.choice == option and f"correct/{kind}" in d[1].outcome.facts]
        return _percent(_rate(of, lambda turn: turn.outcome.facts[f"correct/{kind}"]))

    by_told = {told: played(told, 4) for told in ("comply", "best_paid", None)}
    all_told = [decision for decisions in by_told.values() for decision in decisions]
    rows = []
    for told, decisions in by_told.items():
        hard, easy = ([d for d in decisions if d[1].outcome.ruled is kind] for kind in (True, False))
        used = [_percent(_rate(of, lambda turn: turn.outcome.choice == "tool")) for of in (hard, easy)]
        rows.append(f"| {NAMES[told]} | {used[0]} | {used[1]} | {_percent(_rate(decisions, _invalid))} |")
    paid = {
        told: np.mean([turn.outcome.payoff for _, turn in by_told[told] if turn.outcome.ruled])
        for told in ("comply", "best_paid")
    }
    sixth = [decision for decision in played(None, 6) if decision[1].round == 5]
    return TOOL_CARD.format(
        **about,
        scenarios=len(scenarios),
        rows="\n".join(rows),
        easy=right("answer", "easy"),
        hard_tool=right("tool", "hard"),
        hard_alone=right("answer", "hard"),
        cost=scenarios[0].extra["tool_cost"],
        honest=paid["comply"],
        deviating=paid["best_paid"],
        round_6=_percent(_valid(_rate(sixth, _invalid))),
    )


Decisions = Sequence[tuple[str, Turn]]
"""The last turn of every round, with its scenario's id."""


def _invalid(turn: Turn) -> bool:
    return turn.outcome.verdict == "invalid"


def _rate(decisions: Decisions, hit: Callable[[Turn], bool]) -> Rate:
    of_scenario: dict[str, list[float]] = defaultdict(list)
    for scenario, turn in decisions:
        of_scenario[scenario].append(float(hit(turn)))
    if not of_scenario:
        return wilson(0, 0)
    most = max(map(len, of_scenario.values()))
    return cluster_rate([np.array([hits + [np.nan] * (most - len(hits)) for hits in of_scenario.values()])])


def _valid(invalid: Rate) -> Rate:
    if invalid.value is None or invalid.low is None or invalid.high is None:
        return invalid
    return Rate(1 - invalid.value, 1 - invalid.high, 1 - invalid.low, invalid.n)


def _percent(rate: Rate) -> str:
    if rate.value is None:
        return "none, n = 0"
    return f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}], n = {rate.n}"
