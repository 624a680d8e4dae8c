"""Preference pairs from scenarios: the model itself is asked twice, once told to comply and once to take the best paid.

Answers that chose as told become chosen (compliant) and rejected (violating) for the *neutral* prompt, the same
conversation without the instruction: what was obeyed when told is what the model shall do, or not do, untold. The
procedure is that of arXiv 2510.04860; new here are conversations of several rounds and a count of everything dropped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atp_rl import ranks
from atp_rl.align.conversation import SIDES, Conversation, best_paid_option
from atp_rl.scenarios import Supervision, Told
from atp_rl.types import InputError, Sampler, SamplingParams, Scenario


class Preferences(NamedTuple):
    pairs: list[dict[str, Any]]
    """The prompts with both answers, as `chosen` and `rejected`: TRL's conversational preference format."""
    prompts: list[dict[str, Any]]
    """Every neutral prompt: `prompt` (messages), `scenario` (id), `family`, `round` (from 0), and the columns that
    reward models ask for, `options`, `required` and `payoffs`; and `tools` (JSON) that the chat template announces."""
    statistics: dict[str, Any]
    """Counts. `scenarios` given; of these `skipped`, since their rule allows, or asks for, the best-paid option;
    `prompts` and `pairs` as above; `unreached`: rounds of conversations that had ended. And for each side: `tries`
    used; of these `invalid` (no decision) and `disobeyed` (another option); `missing`: prompts without an answer."""


def make_pairs(
    scenarios: Sequence[Scenario],
    sampler: Sampler,
    *,
    rounds: int,
    supervision: Supervision,
    history_window: int,
    tries: int,
    seed: int,
    sampling: SamplingParams,
    at_step: Callable[[], None] = lambda: None,
) -> Preferences:
    """Ask `sampler` for both answers to every round of every scenario, from the first seat's place.

    A conversation goes on with one of its two answers, picked by a coin, so that later prompts hold mixed histories; it
    ends where one is missing. All open prompts share one batched `generate` a try; every draw depends on (seed,
    scenario id, round, side, try) alone. Ranks share the asking.

    Args:
        rounds, supervision, history_window: as in `make_env`.
        tries: most attempts at one answer.
        at_step: called before each; what it raises ends the asking.
    """
    tempting = [s for s in scenarios if s.rule is not None and best_paid_option(s) != s.rule]
    talks = [Conversation(s, rounds, supervision, history_window, seed) for s in tempting]
    counts = {told: Counter(tries=0, invalid=0, disobeyed=0, missing=0) for told in SIDES}
    pairs: list[dict[str, Any]] = []
    prompts: list[dict[str, Any]] = []
    for _ in range(rounds):
        for attempt in range(tries):
            open_asks: list[tuple[Conversation, Told]] = [
                (talk, told) for talk in talks for told in SIDES if told not in talk.answers
            ]
            if not open_asks:
                break
            at_step()
            chats = [talk.chat(told, attempt, getattr(sampler, "chat", None)) for talk, told in open_asks]
            most = getattr(sampler, "batch_size", None)
            completions = ranks.in_batches(lambda batch: sampler.generate(batch, sampling), chats, most)
            for (talk, told), completion in zip(open_asks, completions, strict=True):
                counts[told].update(talk.take(told, completion))
        for talk in talks:
            row = talk.prompt_row()
            prompts.append(row)
            if len(talk.answers) == 2:
                chosen, rejected = ([{"role": "assistant", "content": talk.answers[told].text}] for told in SIDES)
                pairs.append(row | {"chosen": chosen, "rejected": rejected})
            for told in SIDES:
                counts[told]["missing"] += told not in talk.answers
        talks = [talk for talk in talks if len(talk.answers) == 2]
        for talk in talks:
            talk.go_on()
    statistics = {
        "scenarios": len(scenarios),
        "skipped": len(scenarios) - len(tempting),
        "prompts": len(prompts),
        "pairs": len(pairs),
        "unreached": len(tempting) * rounds - len(prompts),
        **{told: dict(count) for told, count in counts.items()},
    }
    return Preferences(pairs, prompts, statistics)


def write_jsonl(pairs: Iterable[dict[str, Any]], path: Path) -> None:
    """One pair a line; TRL's trainers and `datasets` read it as it is."""
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), "utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Raises InputError that names file and line for anything that is not a pair in conversational format."""
    try:
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")  # splitlines would also cut inside texts
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a file of pairs ({error})") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            pair = json.loads(line)
            for key in ("prompt", "chosen", "rejected"):
                if not all(isinstance(message["content"], str) and message["role"] for message in pair[key]):
                    raise TypeError
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{path}, line {number}: not a pair (lists of messages `prompt`, `chosen`, `rejected`)"
            ) from None
        pairs.append(pair)
    return pairs
