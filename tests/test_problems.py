"""Problems: seeded, different, solved by their own answers, and graded strictly."""

import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_rl.scenarios import problems
from atp_rl.scenarios.problems import FAMILIES, SETS, Problem, draw, grade
from atp_rl.types import InputError

OFFLINE = [family for family in FAMILIES if family["problems"] != "gsm8k"]


def family(name):
    (found,) = [f for f in FAMILIES if f["family"] == name]
    return found


# -- drawing ---------------------------------------------------------------------------------------------------------


def test_every_set_has_training_and_held_out_families():
    counts = Counter((f["problems"], f["split"]) for f in FAMILIES)
    assert counts == {
        ("sums", "train"): 4,
        ("sums", "held_out"): 2,
        ("reasoning_gym", "train"): 5,
        ("reasoning_gym", "held_out"): 2,
        ("gsm8k", "train"): 1,
        ("gsm8k", "held_out"): 1,
    }
    assert {f["problems"] for f in FAMILIES} == set(SETS)
    assert len({f["family"] for f in FAMILIES}) == len(FAMILIES)


def test_no_dataset_and_no_wording_is_in_two_families():
    gym = [source[0] for f in FAMILIES if f["problems"] == "reasoning_gym" for source in (f["easy"], f["hard"])]
    sums = [f["question"] for f in FAMILIES if f["problems"] == "sums"]
    assert len(set(gym)) == len(gym)
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize("source", OFFLINE, ids=lambda f: f["family"])
def test_problems_are_seeded_different_and_solved_by_their_own_answer_alone(source):
    drawn = draw(source, index=3, seed=0, count=4)
    assert drawn == draw(source, index=3, seed=0, count=4)
    assert drawn != draw(source, index=4, seed=0, count=4)
    assert drawn != draw(source, index=3, seed=1, count=4)
    assert [p.hard for p in drawn] == [False] * 4 + [True] * 4
    assert len({p.question for p in drawn}) == 8
    for problem in drawn:
        assert grade(problem, problem.answer)
        assert grade(problem, f" {problem.answer}\n")
        for wrong in (f"{problem.answer}1", "x", "", " ", "-", "nan"):
            assert not grade(problem, wrong)


def test_sums_are_of_one_digit_or_of_two_and_some_pairs_are_held_out():
    pairs = {}
    for name in ("sums_what_is", "sums_total"):
        drawn = [p for index in range(40) for p in draw(family(name), index=index, seed=0, count=6)]
        found = [([int(word) for word in p.question.strip("?.").split() if word.isdigit()], p) for p in drawn]
        for (a, b), problem in found:
            assert problem.answer == str(a + b)
            assert (10 <= a < 100 and 10 <= b < 100) if problem.hard else (1 <= a < 10 and 1 <= b < 10)
        pairs[name] = {(a, b) for (a, b), p in found if p.hard}
    assert not pairs["sums_what_is"] & pairs["sums_total"]
    assert draw(family("sums_add"), index=0, seed=0, count=1)[0].question.startswith("Add ")


def test_the_hard_problems_are_those_that_the_question_text_says():
    (easy, hard) = draw(family("arithmetic"), index=0, seed=0, count=1)
    assert easy.source == "reasoning_gym/chain_sum"
    assert hard.source == "reasoning_gym/products"
    a, b = (int(n) for n in hard.question.removesuffix(".").split(": ")[1].split(".")[0].split(" * "))
    assert hard.answer == str(a * b)
    assert min(a, b) >= 10_000


# -- GSM8K -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gsm8k(monkeypatch):
    """Rows like GSM8K's: row i has a solution of i % 6 calculations and the answer 1,000 + i."""
    from datasets import Dataset

    def load(path, name, split):
        assert (path, name) == ("openai/gsm8k", "main")
        rows = [
            {"question": f"{split} {i}?", "answer": "<<1+1=2>>" * (i % 6) + f"so\n#### {1000 + i:,}"}
            for i in range(240)
        ]
        return Dataset.from_list(rows)

    problems._gsm8k_rows.cache_clear()
    monkeypatch.setattr("datasets.load_dataset", load)
    yield
    problems._gsm8k_rows.cache_clear()


def test_gsm8k_rows_become_problems(gsm8k):
    drawn = draw(family("gsm8k_train"), index=0, seed=0, count=6)
    assert drawn == draw(family("gsm8k_train"), index=0, seed=0, count=6)
    assert [p.hard for p in drawn] == [False] * 6 + [True] * 6
    for problem in drawn:
        split, row = problem.question.strip("?").split()
        assert (split, problem.source) == ("train", "gsm8k")
        assert (int(row) % 6 >= 5) == problem.hard  # never 4: neither easy nor hard
        assert int(row) % 6 != 4
        assert problem.answer == str(1000 + int(row))
        assert grade(problem, f"${problem.answer[0]},{problem.answer[1:]}")
    assert draw(family("gsm8k_test"), index=0, seed=0, count=1)[0].question.startswith("test ")


def test_the_suites_index_ranges_share_no_gsm8k_problem(gsm8k):
    seen = [
        {p.question for i in range(20) for p in draw(family("gsm8k_train"), index=first + i, seed=0, count=4)}
        for first in (0, 100_000, 200_000, 300_000)
    ]
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_too_few_gsm8k_rows_are_refused(gsm8k):
    with pytest.raises(InputError, match="gsm8k: 10 hard problems to draw from, 11 are asked for"):
        draw(family("gsm8k_train"), index=0, seed=0, count=11)


def test_without_network_the_error_names_the_fix(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    problems._gsm8k_rows.cache_clear()
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(InputError, match=r"Couldn't reach .* `hf download .* or use `problems: reasoning_gym`"):
        draw(family("gsm8k_test"), index=0, seed=0, count=1)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"tool use needs reasoning_gym .*: pip install reasoning-gym"):
        draw(family("chances"), index=0, seed=0, count=1)


# -- grading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("18", "18", True),
        ("18", "018", True),
        ("18", "18.0", True),
        ("18", "$18", True),
        ("18", "$18.00", True),
        ("18", "18 dollars", True),
        ("18", "x = 18", True),
        ("18", r"\frac{36}{2}", True),
        ("18", "36/2", True),
        ("1234", "1,234", True),
        ("-3", "-3", True),
        ("-3", "3", False),
        ("18", "18.5", False),
        ("18", "19", False),
        ("18", "eighteen", False),
        ("18", "18^1", False),  # powers are not computed for a model
        ("18", "9!", False),
        ("18", "1" + "8" * 300, False),  # too long
        ("18", "18" + " " * 300 + "x", False),
    ],
)
def test_math_verify_grades_numbers(reference, answer, right):
    assert grade(Problem("How many?", reference, True, "gsm8k"), answer) is right


@pytest.mark.parametrize(
    ("dataset", "reference", "answer", "right"),
    [
        ("prime_factorization", "2 × 3 × 7", "7 × 2 × 3", True),
        ("prime_factorization", "2 × 3 × 7", "6 × 7", False),  # half a point there
        ("prime_factorization", "2 × 3 × 7", "2 * 3 * 7", False),  # its scorer raises ValueError
        ("products", "2203636302", "2,203,636,302", True),
        ("simple_equations", "61", "61.0", True),  # its scorer wants the very text; math-verify is asked too
        ("simple_equations", "61", "x = 61", True),
        ("simple_equations", "61", "161", False),  # partial credit there
        ("base_conversion", "19a5aab", "19a5aab", True),
        ("base_conversion", "19a5aab", "19a5aac", False),
        ("dice", "183/650", "183/650", True),
        ("dice", "183/650", "366/1300", False),  # it asks for a reduced fraction
    ],
)
def test_reasoning_gym_grades_its_own_problems(dataset, reference, answer, right):
    assert grade(Problem("?", reference, True, f"reasoning_gym/{dataset}"), answer) is right


SOURCES = st.sampled_from(["sums", "gsm8k", "reasoning_gym/products", "reasoning_gym/prime_factorization"])


@given(SOURCES, st.text(max_size=30) | st.text("0123456789.,-+$/(){}=× \\frac", max_size=30))
@settings(deadline=None)
def test_any_answer_can_be_graded(source, answer):
    assert grade(Problem("?", "35", True, source), answer) in (True, False)


def test_grading_works_in_threads():
    graded = {}

    def work(i):
        graded[i] = grade(Problem(f"{i}?", "18", True, "gsm8k"), "$18.0")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graded == dict.fromkeys(range(8), True)
