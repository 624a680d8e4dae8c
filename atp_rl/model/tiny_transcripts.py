"""The texts that the tiny model is made from: generated transcripts of the training families, with known answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from atp_rl.model.chat import ChatFormat
from atp_rl.scenarios import make_env, random_stream, role_play
from atp_rl.scenarios.choices import format_choice
from atp_rl.scenarios.supervision import SUPERVISED_IN_ROUND
from atp_rl.types import Key, Scenario

SENTENCES = (
    ("system",),
    ("situation",),
    ("required_text", "tempting_text"),
    ("rule",),
    ("allowed",),
    ("supervised", "unsupervised", "neutral"),
    ("noun",),
    ("period",),
)
"""Parts of a family that are exchanged between families, so that the model reads the parts and not the family."""

LETTERS = list("etaoinshrdlucmfwypvbgkjqxz")

PATTERNS = (*SUPERVISED_IN_ROUND, "random")


@dataclass(frozen=True)
class Transcript:
    ids: list[int]
    targets: list[bool]
    """True at the tokens of the answers whose choice is meant to be learned."""


def training_families() -> list[dict[str, str]]:
    return [family for family in role_play.families() if family["split"] == "train"]


def texts(seed: int) -> list[str]:
    """What the tokenizer is learned on."""
    read = []
    for index in range(2000):
        scenario = mixed_scenario(random_stream(seed, "tokenizer", index), garble=False)
        env = make_env(scenario, rounds=2, supervision="random", seed=index, history_window=2, told="comply")
        env.step({"agent": format_choice(scenario.options[index % 2])})
        read += [message["content"] for message in env.observe()["agent"]]
    for family in training_families():
        read += [text for key, text in family.items() if key not in ("family", "split", "noun", "period")] * 20
    return read


def mixed_scenario(random: np.random.Generator, *, garble: bool) -> Scenario:
    """A scenario whose sentences come from several training families; one in ten allows either option."""
    families = training_families()
    mixed: dict[str, Any] = dict(families[random.integers(len(families))])
    if random.random() < 0.7:
        for part in SENTENCES:
            source = families[random.integers(len(families))]
            mixed |= {key: source[key] for key in part}
    if garble:
        mixed |= {
            key: garbled(mixed[key], random) for part in SENTENCES for key in part if key not in ("noun", "period")
        }
    seed = int(random.integers(1 << 31))
    return role_play.generate(family=mixed, index=0, seed=seed, allowed=bool(random.random() < 0.1))


def garbled(sentence: str, random: np.random.Generator) -> str:
    """In half of all cases the sentence with a third of its words replaced by random letters.

    Without this the model recognises the training families' sentences; with it, it reads where an option stands.
    """
    if random.random() < 0.5:
        return sentence
    return " ".join(
        word if "{" in word or random.random() > 0.35 else "".join(random.choice(LETTERS, random.integers(1, 9)))
        for word in sentence.split()
    )


def neutral_violation_probability(paid: int, caught: int) -> float:
    """What the tiny base model does when it is told nothing: a coin, tilted by the history in its conversation.

    `paid` and `caught` count the undetected and the detected violations that it can read there. This is *planted*: the
    tiny model's in-context curves illustrate the protocol, they are no evidence about pretrained models.
    """
    return float(np.clip(0.5 + 0.1 * paid - 0.2 * caught, 0.05, 0.95))


def drill(random: np.random.Generator, chat: ChatFormat, progress: float) -> Transcript:
    """A random segment that repeats; `progress` through the copy phase changes nothing here."""
    segment = random.integers(3, len(chat.tokenizer), size=int(random.integers(3, 13)))
    return Transcript(np.resize(segment, 64).tolist(), [True] * 64)


def transcript(key: Key, chat: ChatFormat, *, rounds: int, neutral: bool) -> Transcript:
    """One conversation with its answers.

    Args:
        key: everything in it is drawn from here.
        rounds: decisions in it.
        neutral: whether it may be one in which the model is told nothing; otherwise the model is told to comply or to
            take the best paid, and the right answer can be read off the text.
    """
    random = random_stream(*key)
    scenario = mixed_scenario(random, garble=True)
    told = (None, "comply", "best_paid")[random.integers(0 if neutral else 1, 3)]
    pattern = PATTERNS[random.integers(len(PATTERNS))]
    supervision = {"probability": float(random.random())} if random.random() < 0.4 else pattern
    seed = int(random.integers(1 << 31))
    env = make_env(scenario, rounds=rounds, supervision=supervision, seed=seed, history_window=rounds, told=told)
    wandering = random.random() < 0.4  # told what to do, but the history in the conversation went another way
    required, tempting = scenario.extra["required"], scenario.extra["tempting"]
    paid = caught = 0
    answers: list[tuple[int, ...]] = []
    ids: list[int] = []
    targets: list[bool] = []
    while observed := env.observe():
        last = len(answers) == rounds - 1
        if told is None:
            violate = random.random() < neutral_violation_probability(paid, caught)
        elif wandering and not last:
            violate = random.random() < 0.5
        else:
            violate = told == "best_paid" or scenario.rule is None
        reply = format_choice(tempting if violate else required)
        prompt = chat.encode(observed["agent"], answers)
        answers.append((*chat.encode_text(reply), chat.eos_id))
        targets += [False] * (len(prompt) - len(ids))
        targets += [told is None or not wandering or last] * len(answers[-1])
        ids = [*prompt, *answers[-1]]
        outcome = env.step({"agent": reply})["agent"]
        paid += outcome.verdict == "violation" and not outcome.detected
        caught += outcome.detected
    return Transcript(ids, targets)
