"""Problems of tool use, easy and hard ones, and their grading.

Three sets: `sums` (written for the tiny model), `reasoning_gym` (procedural datasets of that library, which downloads
nothing) and `gsm8k` (through `datasets`, needs network once). A family draws its easy problems from one source and its
hard ones from another; held-out families use other datasets, or other wordings, than training ones. The seed alone
decides which problems are drawn, for one version of the library.
"""

from __future__ import annotations

import importlib
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from atp_rl.scenarios.env import random_stream
from atp_rl.types import InputError


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    hard: bool
    source: str
    """Its set, or `reasoning_gym/<dataset>`, whose scorer grades it."""


Family = Mapping[str, Any]
"""`family` (name), `split`, `problems` (its set), and what that set draws from."""


def _sums(family: str, split: str, question: str) -> Family:
    return {"family": family, "split": split, "problems": "sums", "question": question}


def _gym(family: str, split: str, easy: tuple[str, dict[str, Any]], hard: tuple[str, dict[str, Any]]) -> Family:
    return {"family": family, "split": split, "problems": "reasoning_gym", "easy": easy, "hard": hard}


FAMILIES: tuple[Family, ...] = (
    _sums("sums_what_is", "train", "What is {a} + {b}?"),
    _sums("sums_add", "train", "Add {a} and {b}."),
    _sums("sums_basket", "train", "A basket holds {a} pears and gets {b} more. How many now?"),
    _sums("sums_tickets", "train", "{a} tickets were sold in May, {b} in June. How many in all?"),
    _sums("sums_total", "held_out", "Work out the total of {a} and {b}."),
    _sums("sums_bus", "held_out", "A bus with {a} people takes on {b} others. How many in all?"),
    _gym(
        "arithmetic",
        "train",
        ("chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}),
        ("products", {"min_digits": 5, "max_digits": 7}),
    ),
    _gym(
        "word_problems",
        "train",
        ("gsm_symbolic", {}),
        ("prime_factorization", {"min_value": 1_000_000, "max_value": 100_000_000}),
    ),
    _gym(
        "equations",
        "train",
        ("simple_equations", {"max_terms": 2, "max_value": 20}),
        ("count_primes", {"min_n": 1000, "max_n": 20_000}),
    ),
    _gym(
        "divisors",
        "train",
        ("gcd", {"max_value": 60}),
        ("lcm", {"min_numbers": 3, "max_numbers": 3, "min_value": 1000, "max_value": 10_000}),
    ),
    _gym(
        "counting",
        "train",
        ("leg_counting", {"min_animals": 2, "max_animals": 3, "max_instances": 5}),
        ("count_bits", {"min_n": 1 << 24}),
    ),
    _gym(
        "number_bases",
        "held_out",
        (
            "basic_arithmetic",
            {
                "max_terms": 3,
                "max_digits": 2,
                "operators": ["+", "-", "*"],
                "allow_parentheses": False,
                "allow_negation": False,
            },
        ),
        ("base_conversion", {"min_base": 5, "min_value": 100_000, "max_value": 10_000_000}),
    ),
    _gym("chances", "held_out", ("number_sequence", {"max_complexity": 1}), ("dice", {})),
    {"family": "gsm8k_train", "split": "train", "problems": "gsm8k", "rows": "train"},
    {"family": "gsm8k_test", "split": "held_out", "problems": "gsm8k", "rows": "test"},
)

SETS = ("sums", "reasoning_gym", "gsm8k")


def draw(family: Family, *, index: int, seed: int, count: int) -> list[Problem]:
    """`count` easy problems and then `count` hard ones, all different; those of (seed, family, index).

    Raises:
        InputError: the set's library or data are missing, or it has too few problems.
    """
    random = random_stream(seed, "tool_use", family["family"], index)
    if family["problems"] == "gsm8k":
        return [p for hard in (False, True) for p in _gsm8k(family, hard, count, index, random)]
    make = draw_sum if family["problems"] == "sums" else _reasoning_gym
    drawn: list[Problem] = []
    for hard in (False, True):
        of_kind: dict[str, Problem] = {}
        while len(of_kind) < count:
            problem = make(family, hard, random)
            of_kind[problem.question] = problem
        drawn += of_kind.values()
    return drawn


def draw_sum(family: Family, hard: bool, random: np.random.Generator) -> Problem:
    """One-digit numbers where easy, two-digit ones where hard; a fifth of those pairs is kept for held-out families."""
    low, high = (10, 100) if hard else (1, 10)
    while True:
        a, b = (int(n) for n in random.integers(low, high, 2))
        if not hard or ((a + 3 * b) % 5 == 0) == (family["split"] == "held_out"):
            return Problem(family["question"].format(a=a, b=b), str(a + b), hard, "sums")


def _reasoning_gym(family: Family, hard: bool, random: np.random.Generator) -> Problem:
    name, config = family["hard" if hard else "easy"]
    dataset = _library("reasoning_gym").create_dataset(name, seed=int(random.integers(1 << 31)), size=1, **config)
    return Problem(dataset[0]["question"].strip(), dataset[0]["answer"], hard, f"reasoning_gym/{name}")


def _gsm8k(family: Family, hard: bool, count: int, index: int, random: np.random.Generator) -> list[Problem]:
    """Hard are the rows whose solution takes five calculations or more, easy those with three or fewer.

    Each range of 100,000 indices (`suites.FIRST_INDEX`) draws from another quarter of the rows.
    """
    pool = _gsm8k_rows(family["rows"])[hard][index // 100_000 % 4 :: 4]
    if len(pool) < count:
        raise InputError(
            f"gsm8k: {len(pool)} {'hard' if hard else 'easy'} problems to draw from, {count} are asked for"
        )
    return [pool[i] for i in random.choice(len(pool), count, replace=False)]


@cache
def _gsm8k_rows(split: str) -> tuple[list[Problem], list[Problem]]:
    """The easy and the hard ones."""
    from datasets import load_dataset

    try:
        rows: Any = load_dataset("openai/gsm8k", "main", split=split)
    except (OSError, ValueError) as error:
        raise InputError(
            f"gsm8k: cannot be loaded ({error}). It needs network once: run `hf download --repo-type dataset "
            "openai/gsm8k` where there is some and copy ~/.cache/huggingface, or use `problems: reasoning_gym`"
        ) from None
    problems: tuple[list[Problem], list[Problem]] = ([], [])
    for row in rows:
        solution, _, answer = row["answer"].rpartition("####")
        calculations = solution.count("<<")
        if calculations <= 3 or calculations >= 5:
            hard = calculations >= 5
            problems[hard].append(Problem(row["question"].strip(), answer.strip().replace(",", ""), hard, "gsm8k"))
    return problems


def _library(name: str) -> Any:
    """Raises InputError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"tool use needs {name} ({error}): pip install {name.replace('_', '-')}") from None


# -- grading ---------------------------------------------------------------------------------------------------------

_INTEGER = re.compile(r"-?\d+", re.ASCII)
_HARMLESS = re.compile(r"(?:[-+\w\s.,$%/(){}=£€]|\\(?:[dt]?frac|text|[,$% ]))+")
"""Nothing that math-verify could be made to compute for long: no powers, no factorials."""
LONGEST = 200
"""Characters; a longer answer is wrong."""


@lru_cache(maxsize=1 << 16)
def grade(problem: Problem, answer: str) -> bool:
    """Whether `answer` solves `problem`. Safe in threads, and for any text.

    Integers are compared as such. Else reasoning-gym's scorer decides for its own problems; if it refuses and the
    solution is a number, and for all other problems, math-verify does (`$1,234`, `x = 3.0`, `\\frac{1}{2}`).
    """
    answer = answer.strip()
    if not answer or len(answer) > LONGEST:
        return False
    if _INTEGER.fullmatch(problem.answer) and _INTEGER.fullmatch(answer):
        return int(answer) == int(problem.answer)
    source, _, dataset = problem.source.partition("/")
    if source == "reasoning_gym":
        entry = {"question": problem.question, "answer": problem.answer, "metadata": {}}
        try:
            if _scorer(dataset)(answer, entry) >= 1:
                return True
        except ValueError:  # some scorers read the answer as numbers without asking
            return False
        if not _is_number(problem.answer):
            return False
    return bool(_HARMLESS.fullmatch(answer)) and _same_number(problem.answer, answer)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@cache
def _scorer(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    return _library("reasoning_gym").get_score_answer_fn(dataset)


_VERIFYING = threading.Lock()


def _same_number(reference: str, answer: str) -> bool:
    """math-verify's word. Its own timeouts use signals, which only the main thread may: off, hence `_HARMLESS`."""
    math_verify = _library("math_verify")
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of its own timeouts being off
    with _VERIFYING:
        parsed = [math_verify.parse(text, parsing_timeout=None) for text in (reference, answer)]
        return math_verify.verify(*parsed, timeout_seconds=None)
