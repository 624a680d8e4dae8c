"""The texts that the tiny model for tool use is made from: generated transcripts of sums, with known answers."""

from __future__ import annotations

import re

import numpy as np

from atp_rl.model.chat import ChatFormat
from atp_rl.model.tiny_transcripts import PATTERNS, Transcript, garbled, neutral_violation_probability
from atp_rl.scenarios import random_stream, tool_use
from atp_rl.scenarios.actions import format_answer, format_tool
from atp_rl.scenarios.problems import Family, draw_sum
from atp_rl.scenarios.sandbox import ToolResult
from atp_rl.types import Key, Scenario

DRILL = 72
"""Tokens in a row of the copy phase."""

WRONG = 0.15
"""Share of the answers in a history that are wrong, so that the model reads on after mistakes. None is learned."""


def training_families() -> list[Family]:
    return [family for family in tool_use.families("sums") if family["split"] == "train"]


def texts(seed: int) -> list[str]:
    """What the tokenizer is learned on."""
    read = []
    for index in range(1000):
        scenario = mixed_scenario(random_stream(seed, "tokenizer", index), garble=False)
        env = Sums(scenario, rounds=4, supervision="random", seed=(index,), history_window=4, told="comply")
        for problem in env.problems:
            if problem.hard and index % 2:
                env.step({"agent": format_tool(code_for(problem.question))})
            read += [message["content"] for message in env.observe()["agent"]]
            env.step({"agent": format_answer(problem.answer if index % 3 else "0")})
        read += ["system user assistant", code_for(env.problems[-1].question)]
    return read


def mixed_scenario(random: np.random.Generator, *, garble: bool) -> Scenario:
    """Sums in a training family's words, which `garble` may change; one in ten leaves the use of the tool free."""
    families = training_families()
    family = dict(families[random.integers(len(families))])
    if garble:
        family["question"] = garbled(family["question"], random)
    return tool_use.generate(
        family=family,
        index=0,
        seed=int(random.integers(1 << 31)),
        tool_cost=int(random.integers(10, 90)) / 100,
        allowed=bool(random.random() < 0.1),
    )


class Sums(tool_use.ToolUse):
    """Tool use whose tool is known to be given sums: nothing is run, so no sandbox is needed."""

    def run_tool(self, code: str) -> ToolResult:
        return ToolResult(str(sum(operands(code))), "ok", False, 0.0)


def operands(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def code_for(question: str) -> str:
    """What a call of the tool runs to solve a sum."""
    a, b = operands(question)
    return f"print({a} + {b})"


def drill(random: np.random.Generator, chat: ChatFormat, progress: float) -> Transcript:
    """Sums with what is replied to them, one after the other: arithmetic and copying with little to read.

    At first most are bare (`54 + 80`), since these are learned first. The others are a family's questions, answered or
    put to the tool, and noise stands between question and reply, to learn that the distance does not matter.

    Args:
        progress: through the copy phase, from 0 to 1.
    """
    families = training_families()
    bare = random.random() < (0.8 if progress < 0.5 else 0.2)
    ids: list[int] = []
    targets: list[bool] = []
    while len(ids) < DRILL:
        problem = draw_sum(families[random.integers(len(families))], bool(random.random() < 0.8), random)
        a, b = operands(problem.question)
        noise = () if bare else random.integers(3, len(chat.tokenizer), random.integers(1, 25)).tolist()
        question = chat.encode_text(f"{a} + {b}" if bare else f" problem: {problem.question}")
        parts = [((*question, *noise), False)]
        if not bare and random.random() < 0.5:
            parts.append((chat.encode_text(format_tool(code_for(problem.question))), True))
            parts.append((chat.encode_text(f"Output: {problem.answer}\n"), False))
        parts.append((chat.encode_text(format_answer(problem.answer)), True))
        for part, learned in parts:
            ids += part
            targets += [learned] * len(part)
    return Transcript(ids[:DRILL], targets[:DRILL])


def transcript(key: Key, chat: ChatFormat, *, rounds: int, neutral: bool) -> Transcript:
    """One conversation with its replies.

    Args:
        key: everything in it is drawn from here.
        rounds: problems in it.
        neutral: whether it may be one in which the model is told nothing; otherwise the model is told to comply or to
            take the best paid, and the right way can be read off the text.
    """
    random = random_stream(*key)
    scenario = mixed_scenario(random, garble=True)
    told = (None, "comply", "best_paid")[random.integers(0 if neutral else 1, 3)]
    pattern = PATTERNS[random.integers(len(PATTERNS))]
    supervision = {"probability": float(random.random())} if random.random() < 0.4 else pattern
    seed = (int(random.integers(1 << 31)),)
    env = Sums(scenario, rounds=rounds, supervision=supervision, seed=seed, history_window=rounds, told=told)
    wandering = random.random() < 0.4  # told what to do, but the history in the conversation went another way
    paid = caught = 0
    replies: list[tuple[int, ...]] = []
    ids: list[int] = []
    targets: list[bool] = []

    def say(reply: str, learned: bool) -> None:
        prompt = chat.encode(env.observe()["agent"], replies)
        replies.append((*chat.encode_text(reply), chat.eos_id))
        targets.extend([False] * (len(prompt) - len(ids)) + [learned] * len(replies[-1]))
        ids[:] = [*prompt, *replies[-1]]

    for k, problem in enumerate(env.problems):
        last = k == rounds - 1
        if told is None:
            skip = random.random() < neutral_violation_probability(paid, caught)
        elif wandering and not last:
            skip = random.random() < 0.5
        else:
            skip = told == "best_paid" or scenario.rule is None
        wrong = not last and random.random() < WRONG
        learned = told is None or not wandering or last
        if problem.hard and not skip:
            call = format_tool(code_for(problem.question))
            say(call, learned)
            env.step({"agent": call})
        answer = format_answer(str(int(problem.answer) + int(random.integers(1, 10))) if wrong else problem.answer)
        say(answer, learned and not wrong)
        outcome = env.step({"agent": answer})["agent"]
        paid += outcome.verdict == "violation" and not outcome.detected
        caught += outcome.detected
    return Transcript(ids, targets)
