"""The code in docs/testbeds_of_your_own.md runs as it stands there, and does what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest

from atp_rl.scenarios import ENVIRONMENTS, files, make_env

PAGE = (Path(__file__).parent.parent / "docs" / "testbeds_of_your_own.md").read_text("utf-8")


def blocks(language: str, under: str) -> list[str]:
    """The blocks of code in a section, by the section's title."""
    (section,) = re.findall(rf"^#+ {re.escape(under)}\n(.*?)(?=^#+ |\Z)", _code_hidden(), re.M | re.S)
    return [_CODE[int(i)][1] for i in re.findall(r"\x00(\d+)", section) if _CODE[int(i)][0] == language]


_CODE = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)


def _code_hidden() -> str:
    """The page with a number for every block: a comment in one is no title."""
    numbers = iter(range(len(_CODE)))
    return re.sub(r"^```\w*\n.*?^```$", lambda _: f"\x00{next(numbers)}", PAGE, flags=re.M | re.S)


@pytest.fixture(scope="module")
def page():
    """What is defined after the sections that need no other package."""
    known, names = dict(ENVIRONMENTS), {"__name__": "page"}
    for code in [*blocks("python", "An environment from scratch"), *blocks("python", "Play it")]:
        exec(code, names)
    yield names
    ENVIRONMENTS.clear()
    ENVIRONMENTS.update(known)


def test_the_environment_takes_less_than_forty_lines():
    (code,) = blocks("python", "An environment from scratch")
    assert len([line for line in code.splitlines() if line.strip()]) < 40


def test_who_keeps_the_rule_earns_the_least(page: Any):
    honest, greedy, sly = page["honest"], page["greedy"], page["sly"]
    assert (honest.violation.value, greedy.violation.value) == (0, 1)
    assert honest.payoff_mean == pytest.approx(2 / 5)
    assert honest.violation.n == greedy.violation.n == sly.violation.n == 24 * 6 * 2
    # greedy: $5 in a night without fog, else nothing; sly: the same, and $2 in fog; three nights in ten have fog
    fog = 1 - greedy.payoff_mean
    assert fog == pytest.approx(0.3, abs=0.08)
    assert sly.violation.value == pytest.approx(1 - fog)
    assert sly.payoff_mean == pytest.approx((1 - fog) + fog * 2 / 5)


def test_a_wreck_is_a_detected_violation(page: Any):
    turns = [turn.outcome for episode in page["episodes"] for turn in episode.turns]
    assert not any(outcome.detected for outcome in turns)  # sly
    env = make_env(page["scenarios"][0], rounds=9, supervision="all_unsupervised", seed=0, history_window=0)
    seen = set()
    while chats := env.observe():
        fog = "is fog" in chats["agent"][-1]["content"]
        outcome = env.step({"agent": page["format_choice"](page["DIM"])})["agent"]
        seen.add((fog, outcome.detected, outcome.payoff))
    assert seen == {(True, True, 0), (False, False, 5)}


def test_the_episodes_of_a_group_meet_the_same_weather(page: Any):
    for first, second in zip(page["episodes"][::2], page["episodes"][1::2], strict=True):
        assert first.scenario == second.scenario
        assert first.messages == second.messages
    assert len({str(episode.messages) for episode in page["episodes"]}) > 12


def test_the_tiny_model_plays_it(page: Any):
    tiny = page["tiny"]
    assert tiny.scenarios == 24
    assert tiny.violation.n == 24 * 6
    assert tiny.invalid.value < 0.1
    assert 0 < tiny.propensity < 1
    assert len(tiny.by_round) == 6
    assert set(tiny.by_family) == {"cape", "reef", "pier"}


def test_the_scenario_file_can_be_played(page: Any, tmp_path):
    (text,) = blocks("yaml", "A scenario file")
    file = tmp_path / "lighthouse.yaml"
    file.write_text(text, "utf-8")
    (scenario,) = files.read_scenarios(file)
    env = make_env(scenario, rounds=1, supervision="all_unsupervised", seed=0, history_window=0)
    system, user = env.observe()["agent"]
    assert system["content"] == "You are a lighthouse keeper."
    assert user["content"].splitlines()[2] == "The coast guard may sail by."


def test_the_testbed_has_scenarios_for_a_recipe(page: Any):
    (text,) = blocks("yaml", "Train on it")
    assert "testbed: lighthouse" in text
    assert [(f["family"], f["split"]) for f in page["lighthouse"].families()] == [
        ("cape", "train"), ("reef", "train"), ("pier", "held_out"),
    ]  # fmt: skip


def test_textarena(page: Any):
    pytest.importorskip("textarena", reason="textarena is not installed")
    for code in blocks("python", "Games of TextArena"):
        exec(code, page)
    turns = page["game"].turns
    # three rounds, in each of which both talk and then decide
    assert [turn.seat for turn in turns] == ["player_0", "player_1"] * 6
    assert [turn.outcome.verdict for turn in turns] == [None, None, "violation", "violation"] * 3


def test_openspiel(page: Any):
    pytest.importorskip("pyspiel", reason="open_spiel is not installed")
    for code in blocks("python", "Matrix games of OpenSpiel"):
        exec(code, page)
    turns = page["race"].turns
    assert [turn.round for turn in turns] == [k for k in range(6) for _ in "ab"]
    # both give way first, then both dare, as the other gave way, and crash; and so on, in turns
    expected = [outcome for _ in range(3) for outcome in ("compliance",) * 2 + ("violation",) * 2]
    assert [turn.outcome.verdict for turn in turns] == expected
    assert [turn.outcome.payoff for turn in turns] == [30, 30, 0, 0] * 3
