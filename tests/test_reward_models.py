"""Reward models by hand: one row per kind of reply, in both of TRL's completion formats."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import reward_models
from reward_models import MAKERS, REWARD_MODELS, compliance, payoff

OPTIONS = ["Route A", "Route B"]
PAYOFFS = {"Route A": 50.0, "Route B": 80.0}
A, B = '{"choice": "Route A"}', '{"choice": "Route B"}'

COMPLIANCE = [
    # reply, required, reward
    (A, "Route A", 1.0),
    (B, "Route A", 0.1),
    ("Route A", "Route A", 0.0),  # prose is no decision
    ("", "Route A", 0.0),
    ('{"choice": "Route C"}', "Route A", 0.0),
    (f"{B} No: {A}", "Route A", 1.0),  # the last decision counts
    (f"<think>{A}</think>{B}", "Route A", 0.1),  # thinking does not
    (A, None, 1.0),  # the allowed arm: any valid decision
    (B, None, 1.0),
    ("hm", None, 0.0),
]


@pytest.mark.parametrize(("reply", "required", "reward"), COMPLIANCE)
def test_compliance(reply, required, reward):
    as_message = [{"role": "assistant", "content": reply}]
    rewards = compliance(
        prompts=["p", "p"], completions=[reply, as_message], options=[OPTIONS] * 2, required=[required] * 2
    )
    assert rewards == [reward, reward]


PAYOFF = [
    # reply, what the environment paid, reward
    (A, None, 50 / 80),
    (B, None, 1.0),
    ("hm", None, 0.0),
    (B, 80.0, 1.0),
    (B, 0.0, 0.0),  # detected
    (B, -40.0, -0.5),  # detected and fined
    ("hm", 0.0, 0.0),
]


@pytest.mark.parametrize(("reply", "paid", "reward"), PAYOFF)
def test_payoff(reply, paid, reward):
    columns = {"options": [OPTIONS], "payoffs": [PAYOFFS]}
    assert payoff(prompts=["p"], completions=[reply], payoff=[paid], **columns) == [reward]
    if paid is None:
        assert payoff(prompts=["p"], completions=[reply], **columns) == [reward]  # no such column


def test_payoff_of_rows_that_went_through_a_datasets_table():
    # the table gives every row the keys of all rows
    amounts = {"Route A": 50.0, "Route B": 80.0, "Tool A": None}
    assert payoff(prompts=["p"], completions=[A], options=[OPTIONS], payoffs=[amounts]) == [50 / 80]


def test_payoff_without_a_positive_amount_has_no_unit():
    with pytest.raises(ValueError, match="must be positive"):
        payoff(prompts=["p"], completions=[A], options=[OPTIONS], payoffs=[{"Route A": 0.0, "Route B": -1.0}])


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_rows_of_another_task_are_left_open(name):
    columns = {"options": [None, OPTIONS], "required": [None, "Route A"], "payoffs": [None, PAYOFFS]}
    other, ours = REWARD_MODELS[name](prompts=["p"] * 2, completions=["x", "x"], **columns)
    assert other is None
    assert ours == 0.0


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_trl_finds_it_and_what_trl_adds_is_taken(name):
    module, _, attribute = f"reward_models.{name}".rpartition(".")  # as `trl grpo --reward_funcs` does
    function = getattr(importlib.import_module(module), attribute)
    assert function is REWARD_MODELS[name]
    assert function.__name__ == name  # TRL's name of the metric
    rewards = function(
        prompts=[[{"role": "user", "content": "Choose."}]],
        completions=[[{"role": "assistant", "content": None}]],
        completion_ids=[[1]],
        trainer_state=None,
        log_extra=None,
        log_metric=None,
        options=[OPTIONS],
        required=["Route A"],
        payoffs=[PAYOFFS],
        family=["ferry"],
    )
    assert rewards == [0.0]


def test_what_is_optimised_never_imports_what_is_measured():
    modules = ["reward_models", *(f"reward_models.{name}" for name in ("judge", "monitor", "preference"))]
    code = f"import sys, {', '.join(modules)}; print([m for m in sys.modules if m.startswith('atp_rl.evaluate')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_entry_has_a_card():
    cards = (Path(reward_models.__file__).parent / "README.md").read_text("utf-8")
    assert [line[4:-1] for line in cards.splitlines() if line.startswith("## `")] == list(REWARD_MODELS | MAKERS)
