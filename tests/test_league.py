"""The league table of a study, on run directories made by hand: numbers, pairs, escaping, same bytes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atp_rl.cli import main
from atp_rl.evaluate.stats import seed_mean
from atp_rl.tracking import league_show
from atp_rl.tracking.league import League, read_league
from atp_rl.tracking.league_picture import write_figures, write_html
from atp_rl.tracking.read import load_run
from atp_rl.types import InputError
from tests.test_report import SCRIPT, episode, make_run, rate, split, verdicts

SEEDS = range(5)
ENDS = {
    "undefended": {
        0: [4, 8, 160, 190],
        1: [4, 6, 150, 180],
        2: [4, 4, 8, 6],
        3: [4, 20, 170, 196],
        4: [4, 4, 120, 170],
    },
    "kl_3": {seed: [4, 4, 6, 6 + seed] for seed in SEEDS},
    "gate": {seed: [4, 6, 20, 40] for seed in SEEDS},
}
"""By arm and seed, violations of 200 at steps 0, 10, 20, 30."""


def crossing(curve: list[int]) -> int | None:
    """Where the lower bound of k of 200 passes 25 %: from 63 on."""
    return next((10 * i for i, k in enumerate(curve) if rate(k)["low"] > 0.25), None)


def make_study(folder: Path, ends: dict[str, dict[int, list[int]]] = ENDS, **changes: Any) -> Path:
    members = []
    for arm, seeds in ends.items():
        for seed, curve in seeds.items():
            name = f"{arm}-seed{seed}"
            tipped = crossing(curve)
            make_run(
                folder / name, name=arm, seed=seed, tipping_step=tipped, time_to_25=tipped,
                curve={10 * i: k for i, k in enumerate(curve)},
            )  # fmt: skip
            differs = ["scenarios.supervision"] if arm == "gate" else []
            members.append({"name": name, "dir": name, "arm": arm, "testbed": "", "model": "", "knobs": {},
                            "seed": seed, "differs": differs, "state": "complete"})  # fmt: skip
    arms = list(ends)
    study = {"name": "by_hand", "arms": arms, "primary": [[arms[0], arm] for arm in arms[1:]], "members": members}
    (folder / "study.json").write_text(json.dumps(study | changes))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return make_study(tmp_path / "study")


def rows(league: League) -> dict[str, Any]:
    return {row.arm: row for row in league.blocks[0].rows}


def test_the_numbers_of_an_arm(study):
    league = read_league(study)
    assert (league.complete, league.planned, league.missing) == (15, 15, [])
    undefended = rows(league)["undefended"]
    ends = [k / 200 for k in (190, 180, 6, 196, 170)]
    assert (undefended.violation.value, undefended.violation.n) == (pytest.approx(np.mean(ends)), 1000)
    expected = seed_mean(ends)
    assert undefended.violation.low == pytest.approx(max(0, expected.low or 0))
    assert undefended.violation.high == 1  # Student's would be above
    assert undefended.iqm.value == pytest.approx(np.mean([190, 180, 170]) / 200)
    assert undefended.tipped == 4
    assert undefended.rmst.value == pytest.approx((20 + 20 + 30 + 20 + 20) / 5)
    assert rows(league)["kl_3"].rmst.value == 30
    assert 15 < (rows(league)["kl_3"].rmst.low or 0) < 30  # five seeds that hold do not show that all would
    # payoff is .5 + violations / 2 here; 10 violations of 200 are 5 %
    assert rows(league)["kl_3"].payoff_at_5.payoff.value == pytest.approx(
        np.mean([0.5 + k / 400 for k in range(6, 11)])
    )
    assert rows(league)["gate"].payoff_at_5.payoff.value == pytest.approx(0.5 + 6 / 400)
    assert rows(league)["undefended"].payoff_at_5.without == 0
    assert rows(league)["gate"].differs == ("scenarios.supervision",)
    assert undefended.deployed.value is None


def test_intervals_of_shares_stay_within_their_range_and_those_of_payoffs_do_not(tmp_path):
    study = make_study(tmp_path / "s", {"undefended": {0: [0, 198], 1: [0, 0], 2: [100, 198]}})
    row = rows(read_league(study))["undefended"]
    x = (0.75 - 7 / 12) / (0.995 - 7 / 12)  # seed 2 starts above the mean payoff, at a compliance of .5
    start, hypervolume = seed_mean([0, 0, 0.5]), seed_mean([0.01, 0, 0.5 * x + 0.01 * (1 - x)])
    assert (row.start.value, row.start.low, row.start.high) == pytest.approx((1 / 6, 0, start.high))
    assert (row.iqm.value, row.iqm.low, row.iqm.high) == pytest.approx((0.66, 0, 1))
    found = row.hypervolume
    assert (found.value, found.low, found.high) == pytest.approx((hypervolume.value, 0, hypervolume.high))
    assert row.payoff == seed_mean([0.995, 0.5, 0.995])
    assert (row.payoff.high or 0) > 1


def test_an_arm_that_earns_what_it_began_with_has_a_normalised_payoff_of_0(tmp_path):
    starts = {0: 3, 1: 5, 2: 9}
    ends = {
        "undefended": {seed: [k, 190] for seed, k in starts.items()},
        "still": {s: [k, k] for s, k in starts.items()},
    }
    league = read_league(make_study(tmp_path / "s", ends))
    (line,) = [line for line in csv.DictReader(io.StringIO(league_show.arms_csv(league))) if line["arm"] == "still"]
    assert line["payoff_normalised"] == "0.0"


def test_better_and_on_the_front(study):
    found = rows(read_league(study))
    # seed 2 of the undefended arm ends at 6 violations: as good as one seed of kl_3, better than the other four
    assert found["kl_3"].improvement.value == pytest.approx((4 * 5 + 0.5) / 25)
    assert found["undefended"].point[0] == pytest.approx(np.mean([190, 180, 6, 196, 170]) / 192 - 4 / 192)
    assert found["undefended"].point[1] == pytest.approx(1 - np.mean([190, 180, 6, 196, 170]) / 200)
    assert [arm for arm, row in found.items() if row.on_front] == ["undefended", "kl_3", "gate"]


def test_an_arm_that_earns_less_and_breaks_more_is_off_the_front(tmp_path):
    study = make_study(tmp_path / "s", {"undefended": {0: [4, 180]}, "bad": {0: [4, 100]}, "good": {0: [4, 100]}})
    metrics = study / "bad-seed0" / "evaluations.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[-1]["splits"]["held_out"]["payoff_mean"] -= 0.1
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [arm for arm, row in rows(read_league(study)).items() if row.on_front] == ["undefended", "good"]


def test_contrasts_are_paired_by_seed_and_corrected(study):
    block = read_league(study).blocks[0]
    tests = {(t.arm, t.measure): t for t in block.tests}
    steps = tests["kl_3", "steps to 25 %"]
    assert steps.contrast.difference == pytest.approx(30 - 22)
    assert steps.contrast.p_value == pytest.approx(2 / 16)  # one pair of five does not differ: 2 ** 4 flips
    assert steps.contrast.smallest_p == pytest.approx(2 / 16)
    end = tests["kl_3", "violations at the end"].contrast
    assert end.difference == pytest.approx(np.mean([6 - 190, 7 - 180, 8 - 6, 9 - 196, 10 - 170]) / 200)
    primary = sorted((t for t in block.tests if t.primary), key=lambda t: t.contrast.p_value or 0)
    assert {t.measure for t in primary} == {"steps to 25 %", "payoff at ≤ 5 %"}
    assert len(primary) == 4
    assert primary[0].adjusted_p == pytest.approx(min(1, 4 * (primary[0].contrast.p_value or 0)))
    assert all((t.adjusted_p or 0) >= (t.contrast.p_value or 0) for t in block.tests)


@pytest.mark.parametrize(("seeds", "least", "in_vain"), [(6, 8 / 2**5, True), (10, 8 / 2**9, False)])
def test_the_least_p_value_is_the_one_after_the_correction(tmp_path, seeds, least, in_vain):
    ends = {"undefended": 160, "a": 80, "b": 100, "c": 120, "d": 140}
    curves = {arm: {s: [4, 70, k + s] if arm == "undefended" else [4, 4, k + s] for s in range(seeds)}
              for arm, k in ends.items()}  # fmt: skip
    block = (league := read_league(make_study(tmp_path / "s", curves))).blocks[0]
    tests = [t for t in block.tests if t.measure == "steps to 25 %"]
    # four arms: RMST differs in all pairs, the best payoff at 5 % (that of step 0, or of step 10) in none
    assert [t.contrast.smallest_p for t in tests] == [2 / 2**seeds] * 4
    assert [t.least_p for t in tests] == [pytest.approx(least)] * 4
    payoffs = [t.least_p for t in block.tests if t.measure == "payoff at ≤ 5 %"]
    assert payoffs == [1.0] * 4
    sheet = league_show.sheets(league, block)[-1]
    assert sheet.headings[6] == "least p (Holm)"
    assert ("That is so of every pre-registered test here." in sheet.caption) is in_vain
    assert sheet.rows[0][6] == (f"{least:.3f}",)


def test_arms_that_start_from_another_adapter_do_not_set_the_scale_of_payoff(tmp_path):
    study = make_study(tmp_path / "s", {"undefended": {0: [4, 160]}, "longer": {0: [40, 160]}})
    listed = json.loads((study / "study.json").read_text())
    assert read_league(study).blocks[0].aligned_payoff == pytest.approx(0.5 + (4 + 40) / 2 / 400)
    listed["members"][1]["differs"] = ["align"]
    (study / "study.json").write_text(json.dumps(listed))
    league = read_league(study)
    assert league.blocks[0].aligned_payoff == pytest.approx(0.5 + 4 / 400)
    assert league_show.sheets(league, league.blocks[0])[1].rows[1][0] == ("longer", "1 seed", "differs in align")


def test_pairs_are_of_the_same_seed_even_where_one_is_missing(study):
    shutil.rmtree(study / "kl_3-seed2")
    league = read_league(study)
    assert league.missing == ["kl_3-seed2"]
    steps = next(t for t in league.blocks[0].tests if (t.arm, t.measure) == ("kl_3", "steps to 25 %"))
    assert (steps.contrast.n, steps.contrast.difference) == (4, 10)
    assert "4 of 5 seeds" in str(league_show.sheets(league, league.blocks[0])[0].rows[1][0])
    assert league_show.headline(league) == "by_hand: 14 of 15 runs complete; without kl_3-seed2"
    many = replace(league, missing=[f"run{i}" for i in range(12)])
    assert league_show.headline(many).endswith("without " + ", ".join(f"run{i}" for i in range(10)) + " and 2 more")


def store(run: Path, wrong: set[int], *, scenarios: int = 20) -> None:
    """Give a run the episodes that its last checkpoint counts; `wrong` are the scenarios with a violation."""
    file = run / "evaluations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[-1]["splits"]["held_out"] |= verdicts(len(wrong), 0, scenarios) | {"scenarios": scenarios}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    played = [episode("violation" if i in wrong else "compliance", "x", i) for i in range(scenarios)]
    text = "".join(json.dumps(e) + "\n" for e in played)
    place = run / "episodes" / f"step_{lines[-1]['step']:04d}_held_out.jsonl.gz"
    place.write_bytes(gzip.compress(text.encode()))


def test_one_seed_is_compared_by_scenario_with_mcnemar(tmp_path):
    study = make_study(tmp_path / "s", {"undefended": {0: [4, 180]}, "kl_3": {0: [4, 10]}})
    store(study / "undefended-seed0", set(range(12)))
    store(study / "kl_3-seed0", {0, 15})
    league = read_league(study)
    test = next(t for t in league.blocks[0].tests if t.measure == "violations, by scenario")
    assert test.contrast.difference == pytest.approx((2 - 12) / 20)
    assert test.contrast.p_value == pytest.approx(2 * (1 + 12) / 2**12)  # 11 scenarios against 1 of 12 that differ
    row = rows(league)["undefended"]
    assert (row.violation.value, row.violation.n) == (0.6, 20)
    assert row.violation.low == pytest.approx(rate(12, 20)["low"])


def test_several_seeds_are_compared_over_seeds_and_scenarios(tmp_path):
    ends = {"undefended": {s: [4, 180] for s in range(3)}, "kl_3": {s: [4, 10] for s in range(3)}}
    study = make_study(tmp_path / "s", ends)
    for seed in range(3):
        store(study / f"undefended-seed{seed}", set(range(10 + seed)))
        store(study / f"kl_3-seed{seed}", {seed})
    league = read_league(study)
    test = next(t for t in league.blocks[0].tests if t.measure == "violations, by scenario")
    assert test.contrast.difference == pytest.approx((3 - 33) / 60)
    assert (test.contrast.n, rows(league)["kl_3"].violation.n) == (60, 60)
    assert (test.contrast.p_value or 1) < 0.01


def test_cost_is_the_sum_over_steps_and_the_mean_over_seeds(tmp_path):
    study = make_study(tmp_path / "s", {"undefended": {0: [4, 6]}, "gate": {0: [4, 6], 1: [4, 6]}})
    for seed in (0, 1):
        run = study / f"gate-seed{seed}"
        lines = [{"progress/step": t, "defense/gate/tokens": 100 * (seed + 1), "defense/gate/forwards": 2,
                  "defense/gate/seconds": 0.5, "defense/kl_anchor/forwards": 1, "defense/gate/rate": 0.1}
                 for t in range(1, 11)]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alerts = [{"step": 3, "alert": "rollback"}, {"step": 4, "alert": "rollback"}, {"step": 4, "alert": "monitor"}]
    (study / "gate-seed1" / "alerts.jsonl").write_text("".join(json.dumps(a) + "\n" for a in alerts))
    found = rows(read_league(study))
    assert found["gate"].cost == (1500.0, 30.0, 5.0, 1.0, 30.5)
    assert found["undefended"].cost == (0.0, 0.0, 0.0, 0.0, 30.5)


def test_what_is_deployed_is_shown_beside_the_weights(tmp_path):
    study = make_study(tmp_path / "s", {"undefended": {0: [4, 180]}, "reminder": {0: [4, 160]}})
    file = study / "reminder-seed0" / "evaluations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["splits"]["deployed"] = split(20)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = rows(read_league(study))["reminder"]
    assert (row.violation.value, row.deployed.value) == (0.8, 0.1)
    assert load_run(study / "reminder-seed0").split == "held_out"


def test_every_testbed_is_a_block_of_its_own(tmp_path):
    study = make_study(tmp_path / "s", {"undefended": {0: [4, 180], 1: [4, 180]}, "kl_3": {0: [4, 6], 1: [4, 6]}})
    listed = json.loads((study / "study.json").read_text())
    for member in listed["members"]:
        member |= {"testbed": "role_play" if member["seed"] else "collusion", "knobs": {"evolve.steps": 10}}
    (study / "study.json").write_text(json.dumps(listed))
    league = read_league(study)
    assert [(block.title, [row.seeds for row in block.rows]) for block in league.blocks] == [
        ("collusion", [[0], [0]]), ("role_play", [[1], [1]]),
    ]  # fmt: skip
    assert len([path for path in write_figures(league, tmp_path / "fig") if "collusion" in path.name]) == 2


def test_csv_latex_and_figures(study, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["atp", "compare", str(study), "--csv", str(out / "l.csv"), "--latex",
                                     str(tmp_path / "l.tex"), "--html", str(out / "l.html"), "--figures",
                                     str(out / "fig")])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "15 of 15 runs complete" in shown
    assert "What they cost" in shown
    arms = list(csv.DictReader(io.StringIO((out / "l.csv").read_text())))
    assert [arm["arm"] for arm in arms] == ["undefended", "kl_3", "gate"]
    assert float(arms[0]["rmst"]) == pytest.approx(22)
    assert float(arms[0]["start_weights_only"]) == pytest.approx(0.02)
    assert float(arms[0]["violation_weights_only"]) == pytest.approx((190 + 180 + 6 + 196 + 170) / 1000)
    assert arms[0]["violation_deployed"] == ""
    contrasts = list(csv.DictReader(io.StringIO((out / "l-contrasts.csv").read_text())))
    assert len(contrasts) == 6
    steps = next(c for c in contrasts if (c["arm"], c["measure"]) == ("kl_3", "steps to 25 %"))
    shown_p = [steps[key] for key in ("smallest_p", "smallest_p_holm", "p_holm")]
    assert shown_p == ["0.125", "0.5", "0.5"]  # four tests, each of four pairs that differ
    for place in ("l.html", "../l.tex"):
        written = (out / place).read_text().replace(r"\_", "_")
        assert "least p (Holm)" in written
        assert "end: weights_only" in written
        assert "end: deployed" in written
    text = (tmp_path / "l.tex").read_text()
    assert r"kl\_3 5 seeds &" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 4
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert {line.count(" & ") for line in body} == {7}
    for name in ("curves", "pareto"):
        root = ET.fromstring((out / "fig" / f"{name}.svg").read_text())
        assert "kl_3" in "".join(root.itertext())


def test_latex_is_what_latex_reads(study, tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex")
    body = league_show.latex(read_league(study))
    (tmp_path / "t.tex").write_text(
        f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{body}\\end{{document}}"
    )
    subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, timeout=60)


def test_the_page_is_escaped_and_has_the_same_bytes_twice(tmp_path):
    evil = f"kl {SCRIPT}".replace("/", "_")
    study = make_study(tmp_path / "s", {"undefended": {0: [4, 180], 1: [4, 180]}, evil: {0: [4, 6], 1: [4, 8]}})
    first = write_html(read_league(study), tmp_path / "a.html").read_bytes()
    assert write_html(read_league(study), tmp_path / "b.html").read_bytes() == first
    page = first.decode()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert page.count("<svg") == 2
    assert str(tmp_path) not in page


def test_a_line_for_every_seed_is_drawn(study, tmp_path):
    write_figures(read_league(study), tmp_path)
    root = ET.fromstring((tmp_path / "curves.svg").read_text())
    axes = [g for g in root.iter("{http://www.w3.org/2000/svg}g") if g.get("id", "").startswith("axes_")]
    assert len(axes) == 3
    bands = [g for g in axes[0] if g.get("id", "").startswith("FillBetweenPolyCollection")]
    assert len(bands) == len(SEEDS)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (None, "`atp study FILE` makes it"),
        ("{", "invalid json"),
        ('{"name": "x"}', "`arms`: field required"),
    ],
)
def test_a_study_that_cannot_be_read(study, change, expected):
    file = study / "study.json"
    file.unlink()
    if change:
        file.write_text(change)
    with pytest.raises(InputError, match=expected):
        read_league(study)


def test_a_study_without_a_complete_run(study):
    for run in study.glob("*-seed*"):
        (run / "summary.json").unlink()
    with pytest.raises(InputError, match="no run of this study is complete"):
        read_league(study)


def test_options_of_a_study_are_refused_for_runs(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["atp", "compare", str(study / "kl_3-seed0"), "--csv", str(tmp_path / "x.csv")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "for one study" in capsys.readouterr().err
