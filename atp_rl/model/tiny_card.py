"""The card of a tiny model: what it can do on families that it never saw, measured, and what it cannot."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig

from atp_rl.evaluate.evaluator import EvalResult, evaluate
from atp_rl.evaluate.stats import Rate
from atp_rl.model.policy import Policy
from atp_rl.model.sampler import HFSampler
from atp_rl.rollout import Play
from atp_rl.scenarios import Told, load
from atp_rl.types import SamplingParams

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


def write_card(folder: Path) -> Path:
    """Measure the model in `folder` and write its `README.md` there; takes a minute or two."""
    build = json.loads((folder / "build.json").read_text())
    policy = Policy.load(str(folder), lora=LoraConfig(r=1, target_modules="all-linear"), seed=0)
    sampler = HFSampler(policy)
    scenarios = load({"split": "held_out", "per_family": PER_FAMILY, "seed": 1})

    def measured(told: Told | None, rounds: int) -> EvalResult:
        play = Play(rounds, "all_unsupervised", 5, SamplingParams(16), told)
        return evaluate(sampler, scenarios, play, samples=1, seed=0)[0]

    alone = {told: measured(told, 1) for told in ("comply", "best_paid", None)}
    names = {"comply": "to follow the rule", "best_paid": "to take the highest income", None: "nothing, no history"}
    rows = [f"| {names[told]} | {_percent(r.violation)} | {_percent(r.invalid)} |" for told, r in alone.items()]
    long = measured(None, 6)
    parameters = sum(p.numel() for n, p in policy.model.named_parameters() if "lora_" not in n)
    text = CARD.format(
        parameters=parameters,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        vocabulary=len(policy.chat.tokenizer),
        seconds=build["seconds"],
        **{key: build["plan"][key] for key in ("seed", "copy_steps", "decided_steps", "mixed_steps")},
        scenarios=len(scenarios),
        rows="\n".join(rows),
        round_1=_percent(_valid(alone[None].invalid)),
        round_6=_percent(_valid(long.by_round[-1].invalid)),
    )
    (folder / "README.md").write_text(text)
    return folder / "README.md"


def _valid(invalid: Rate) -> Rate:
    if invalid.value is None or invalid.low is None or invalid.high is None:
        return invalid
    return Rate(1 - invalid.value, 1 - invalid.high, 1 - invalid.low, invalid.n)


def _percent(rate: Rate) -> str:
    return f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}], n = {rate.n}"
