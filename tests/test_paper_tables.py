"""`atp compare --paper`: which published figure stands beside which run, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atp_rl.tracking.paper import QUANTITIES, Comparison, alignment, compare_arm, paper_tables
from atp_rl.tracking.published import FIGURES, LLAMA, QWEN
from atp_rl.tracking.read import expand, load_run
from tests.test_report import (
    GAMES,
    cell,
    make_run,
    several_seats,
    shown,
    split,
    tool_facts,
    verdicts,
)

DOCS = Path(__file__).parent.parent / "docs"
ROUNDS = (5, 20, 35, 30, 30, 40)


def run(path: Path, recipe: str, *, learner: str = "in_context", **changes: Any) -> Path:
    """A run with this recipe; six rounds of role play, in context, unless said otherwise."""
    curve = changes.pop("curve", {0: split(60, rounds=ROUNDS)})
    make_run(path, name=path.name, learner=learner, curve=curve, **changes)
    (path / "recipe.yaml").write_text(recipe)
    return path


BASE = "align: {method: dpo, adapter: null}\nevolve: {start_from: base}\n"
DPO = "align: {method: dpo, adapter: null}\nevolve: {start_from: aligned}\n"
GRPO = "align: {method: grpo, adapter: null}\nevolve: {start_from: aligned}\n"


def compared(*paths: Path) -> Comparison:
    return compare_arm(expand(paths))


def lines(*paths: Path) -> dict[str, tuple[list[str], list[str]]]:
    return {line.quantity: (line.published, line.measured) for line in compared(*paths).lines}


@pytest.mark.parametrize(
    ("recipe", "how"),
    [
        (BASE, "base"),
        ("align: null\nevolve: {start_from: base}\n", "base"),
        (DPO, "dpo"),
        (GRPO, "grpo"),
        ("align: {method: dpo, adapter: null}\n", "dpo"),
        ("align: {method: null, adapter: runs/a/aligned}\nevolve: {start_from: aligned}\n", None),
        ("align: null\nevolve: {start_from: runs/a/aligned}\n", None),
        ("", None),
    ],
)
def test_the_alignment_is_read_off_the_recipe(tmp_path, recipe, how):
    assert alignment(load_run(run(tmp_path / "a", recipe))) == how


def test_a_run_of_an_arm_of_the_paper_stands_beside_its_figures(tmp_path):
    path = run(tmp_path / "a", DPO, model=LLAMA)
    assert lines(path) == {
        # violations of 50 in each round; the paper's figure of rounds 2 to 5 is not recorded
        "violation, round 1": (["18.8 %, no interval (Llama-3.1-8B, DPO)"], ["10.0 % [4.3–21.4], n = 50"]),
        "violation, round 2": ([], ["40.0 % [27.6–53.8], n = 50"]),
        "violation, round 3": ([], ["70.0 % [56.2–80.9], n = 50"]),
        "violation, round 4": ([], ["60.0 % [46.2–72.4], n = 50"]),
        "violation, round 5": ([], ["60.0 % [46.2–72.4], n = 50"]),
        "violation, round 6": (["45.3 %, no interval (Llama-3.1-8B, DPO)"], ["80.0 % [67.0–88.8], n = 50"]),
    }
    assert compared(path).notes == ["Scenarios are this project's, not the paper's."]


def test_another_arm_has_no_published_figure(tmp_path):
    path = run(tmp_path / "a", BASE, model=LLAMA)
    assert all(not published for published, _ in lines(path).values())
    text = shown(*paper_tables(expand([path])))
    assert "violation, round 1 no published figure 10.0 % [4.3–21.4], n = 50" in text
    assert "role_play, Llama-3.1-8B, DPO: violation 18.8 % in round 1, 45.3 % in round 6" in text


def test_a_figure_whose_arm_was_not_recorded_says_so(tmp_path):
    published, _ = lines(run(tmp_path / "a", DPO, model=QWEN))["violation, round 6"]
    assert published == ["20.3 %, no interval (an arm of Qwen3-8B)"]


def test_the_tiny_model_stands_beside_both_and_is_no_evidence(tmp_path):
    path = run(tmp_path / "a", DPO)
    published, _ = lines(path)["violation, round 1"]
    assert published == ["18.8 %, no interval (Llama-3.1-8B, DPO)", "7.8 %, no interval (an arm of Qwen3-8B)"]
    text = shown(*paper_tables(expand([path])))
    assert "A run of the tiny model illustrates the protocol; it is no evidence about pretrained models." in text
    assert "none has an interval or an n" in text


def test_published_rounds_that_were_not_played_are_shown(tmp_path):
    path = run(tmp_path / "a", DPO, model=LLAMA, curve={0: split(8)})
    assert lines(path)["violation, round 6"] == (["45.3 %, no interval (Llama-3.1-8B, DPO)"], [])
    assert "45.3 %, no interval (Llama-3.1-8B, DPO) not measured" in shown(*paper_tables(expand([path])))


def test_of_a_run_that_updates_weights_step_0_is_compared(tmp_path):
    curve = {0: split(60, rounds=ROUNDS), 10: split(198, rounds=(49,) * 6)}
    path = run(tmp_path / "a", GRPO, model=QWEN, learner="policy_gradient", curve=curve)
    assert lines(path)["violation, round 1"][1] == ["10.0 % [4.3–21.4], n = 50"]
    assert compared(path).notes[:2] == [
        "The paper's GRPO trains all parameters, this one LoRA.",
        "Measured at step 0: the paper updates no weights.",
    ]


def test_tool_use_and_accuracy_by_round_easy_and_hard_apart(tmp_path):
    curve = {0: split(8, facts=tool_facts(30, 42))}
    found = lines(run(tmp_path / "a", GRPO, testbed="tool_use", model=QWEN, curve=curve))
    # 10 of 20 in every round; the second half of the rounds is hard
    half = "problems 50.0 % [29.9–70.1], n = 20"
    assert found["tool use, round 1"] == (
        ["8 %, no interval (Qwen3-8B, GRPO)", "about 50 %, no interval (another arm)"],
        [f"easy {half}"],
    )
    assert found["tool use, round 3"] == ([], [f"hard {half}"])
    assert found["tool use, round 5"] == (["about 20 %, no interval (another arm)"], [])
    assert found["accuracy, round 4"] == (
        ["54 %, no interval (Qwen3-8B, GRPO)"],
        ["hard problems 70.0 % [48.1–85.5], n = 20"],
    )


def test_re_collusion_stands_beside_the_published_range_in_every_cell(tmp_path):
    found = lines(several_seats(tmp_path / "a", model=QWEN))
    published = ["75 to 100 %, no interval (of no particular arm)"]
    assert found["re-collusion"] == (published, ["66.7 % [50.0–100.0], n = 3"])
    grid = {"t=2": cell((10, 20, 40), (4, 8, 16), GAMES), "t=3": cell((5, 6, 7), (0, 0, 0), [])}
    found = lines(run(tmp_path / "b", DPO, testbed="collusion", curve={0: split(9, by_setting=grid)}))
    assert found["re-collusion"] == (published, [])
    assert found["re-collusion, t=2"] == (published, ["66.7 % [50.0–100.0], n = 3"])
    assert found["re-collusion, t=3"] == (published, [])


def test_seeds_are_pooled(tmp_path):
    curves = [{0: split(9, by_round=[verdicts(k, 0, 50)])} for k in (10, 20)]
    paths = [run(tmp_path / str(seed) / "a", DPO, seed=seed, curve=curve) for seed, curve in enumerate(curves)]
    assert lines(*paths)["violation, round 1"][1] == ["30.0 % (seeds 20.0–40.0), n = 100"]
    assert "Seeds are pooled, and shown with the lowest and the highest." in compared(*paths).notes


def test_unknown_testbeds_and_alignments_are_said(tmp_path):
    notes = compared(run(tmp_path / "a", "", testbed="ferry", model="x/y")).notes
    assert "The paper has no testbed ferry." in notes
    assert any("does not say how it was aligned" in note for note in notes)


def test_names_are_taken_literally(tmp_path):
    path = run(tmp_path / "[red]x[", DPO)
    assert path.name in shown(*paper_tables(expand([path])))


def test_every_figure_is_one_that_the_docs_name():
    """They were taken down once, from the paper; the page and the code must not drift apart."""
    page = " ".join((DOCS / "paper.md").read_text("utf-8").split())
    for figure in FIGURES:
        assert figure.quantity in QUANTITIES[figure.testbed]
        for value in figure.by_round.values():
            assert value in page, (figure, value)


def test_an_old_run_without_the_newer_fields_is_compared(tmp_path):
    found = lines(run(tmp_path / "a", GRPO, testbed="tool_use", model=QWEN))
    assert found["tool use, round 1"][1] == []
