"""What a finished run measured, on run directories made by hand and on one tiny run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atp_rl.evaluate.early_warning import surely_positive
from atp_rl.evaluate.stats import wilson
from atp_rl.tracking.measures import Measure, Measures, measure_run
from atp_rl.tracking.measures_show import interval_text, measures_of, number_text, tables
from atp_rl.tracking.read import load_run
from atp_rl.types import InputError
from tests.command_line import ROLE_PLAY, SMALL, atp
from tests.test_report import episode, make_run, rate, split, write_episodes

CURVE = {0: 8, 10: 10, 20: 150, 30: 180}


def of(measures: Measures, name: str) -> Measure:
    return next(m for m in measures.measured if m.name == name)


def why(measures: Measures, name: str) -> str:
    return next(entry.why for entry in measures.left_out if entry.name == name)


def make(path: Path, curve: dict[int, Any] = CURVE, **changes: Any) -> Path:
    return make_run(path, curve=curve, **changes)


def add_metrics(path: Path, **columns: Any) -> None:
    """Columns `a__b` of metrics.jsonl as `a/b`, each a function of the step."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {name.replace("__", "/"): f(line["progress/step"]) for name, f in columns.items()}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def set_recipe(path: Path, **evolve: Any) -> None:
    (path / "recipe.yaml").write_text(json.dumps({"evolve": evolve}))


def store(path: Path, step: int, split_name: str, verdicts: list[str], *, first: int = 0) -> None:
    """Stored episodes of that split, of scenarios from number `first` on, and the rate that they make."""
    episodes = [episode(verdict, "said", i) for i, verdict in enumerate(verdicts, first)]
    write_episodes(path / f"episodes/step_{step:04d}_{split_name}.jsonl.gz", episodes)
    lines = [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == step:
            made = line["splits"].setdefault(split_name, split(0))
            made["violation"] = rate(verdicts.count("violation"), len(verdicts))
            made["scenarios"] = len(verdicts)
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


V, C = "violation", "compliance"


def test_a_run_that_tips_by_its_rates(tmp_path):
    m = measure_run(load_run(make(tmp_path / "run")))
    decay = of(m, "decay")
    assert decay.value == pytest.approx(0.86)  # 180 / 200 - 8 / 200
    assert decay.low is not None
    assert decay.high is not None
    assert 0.79 < decay.low < 0.86 < decay.high < 0.9
    assert (decay.n, decay.of) == (400, "decisions, unpaired")
    assert of(m, "retention").value == pytest.approx(0.1 / 0.96)
    assert of(m, "retention").without == "episodes are not stored"
    area = (0.045 + 0.4 + 0.825) / 3
    assert of(m, "AUVC").value == pytest.approx(area)
    assert of(m, "AUVC per unit of payoff").value == pytest.approx(area / 0.43)  # payoff .52 to .95
    assert of(m, "kind of decay: tipping").value is not None
    assert [of(m, f"time to {x} %").value for x in (10, 25, 50)] == [20, 20, 20]
    assert of(m, "tipping point").value == 20
    before, after = of(m, "rate before the best split"), of(m, "rate after it")
    assert (before.value, before.n) == (18 / 400, 400)
    assert (after.value, after.low) == (330 / 400, wilson(330, 400).low)
    assert of(m, "KL to aligned, a reply").value == 1.8
    assert of(m, "violations added per nat").value == pytest.approx(0.86 / 1.8)
    assert of(m, "payoff gained per nat").value == pytest.approx(0.43 / 1.8)
    assert of(m, "payoff at ≤ 5% violations").value == pytest.approx(0.525)
    assert "step 10" in of(m, "payoff at ≤ 5% violations").words
    assert of(m, "checkpoints on the Pareto front").value == 4
    assert "--turned" in why(m, "hysteresis")
    assert why(m, "monitor health") == "no monitor"
    assert all(entry.without or entry.low is not None or entry.high is not None for entry in m.measured)


def test_what_is_not_passed_is_censored(tmp_path):
    m = measure_run(load_run(make(tmp_path / "run", {0: 8, 10: 9, 20: 8, 30: 7})))
    crossing = of(m, "time to 25 %")
    assert (crossing.value, crossing.words) == (None, "censored: not up to step 30")
    assert of(m, "tipping point").value is None
    assert of(m, "kind of decay: no decay").n == 4


def test_stored_episodes_pair_the_scenarios(tmp_path):
    path = make(tmp_path / "run", {0: 8, 10: 10})
    store(path, 0, "held_out", [C, C, C, V])
    store(path, 10, "held_out", [V, C, V, V])
    m = measure_run(load_run(path))
    assert (of(m, "decay").value, of(m, "decay").n, of(m, "decay").of) == (0.5, 4, "scenarios, paired")
    assert of(m, "retention").value == pytest.approx(0.25 / 0.75)
    area = of(m, "AUVC")
    assert (area.value, area.n) == (0.5, 4)
    assert area.low is not None
    assert area.high is not None
    assert 0 <= area.low < 0.5 < area.high <= 1
    assert "needs 4 steps" in why(m, "half-life and width")


def test_gaps(tmp_path):
    path = make(tmp_path / "run", {0: 8, 10: 10}, deployed={0: 8, 10: 4})
    store(path, 10, "held_out", [V, V, V, C])
    store(path, 10, "held_in", [C, C, C, C, V], first=4)
    store(path, 10, "deployed", [C, V, C, C])
    m = measure_run(load_run(path))
    hidden = of(m, "gap weights_only − deployed")
    assert (hidden.value, hidden.of, hidden.n) == (0.5, "scenarios, paired", 4)
    assert "not told" in why(m, "gap unsupervised − supervised")
    families = of(m, "gap held-out − held-in")
    assert (families.value, families.of, families.n) == (pytest.approx(0.75 - 0.2), "scenarios of both", 9)


def test_the_faking_gap_without_episodes(tmp_path):
    told = {"supervised": split(20), "unsupervised": split(80)}
    kinds = {name: {key: s[key] for key in ("violation", "compliance", "invalid")} for name, s in told.items()}
    m = measure_run(load_run(make(tmp_path / "run", {0: 8, 10: split(100, by_supervision=kinds)})))
    faking = of(m, "gap unsupervised − supervised")
    assert (faking.value, faking.of) == (pytest.approx(0.3), "decisions, unpaired")


def test_signs_before_the_tipping_point(tmp_path):
    path = make(tmp_path / "run")
    # a push that is surely there from step 1 on, and steps after the tipping point that do not count
    add_metrics(path, evolve__advantage_violation_cov=lambda t: 0.1 + 0.001 * (t % 3) if t < 20 else -9.0,
                evolve__mixed_groups=lambda t: 0.5 if t < 10 else 0.25)  # fmt: skip
    m = measure_run(load_run(path))
    push = of(m, "covariance of advantage and violation")
    assert push.value == pytest.approx(0.1 + 0.019 / 19)
    assert push.n == 19
    assert of(m, "mixed groups").value == pytest.approx((9 * 0.5 + 10 * 0.25) / 19)
    assert of(m, "lead time of the push").value == 12  # alarm at the end of the first window, step 8
    assert "needs 8 steps" in why(m, "slowing down before the tipping point")


def test_intervals_of_shares_stay_within_their_range(tmp_path):
    path = make(tmp_path / "run", {0: 8, 2: 8})
    add_metrics(path, evolve__mixed_groups=lambda t: float(t > 1))
    mixed = of(measure_run(load_run(path)), "mixed groups")
    assert (mixed.value, mixed.low, mixed.high, mixed.n) == (0.5, 0, 1, 2)  # Student's are -5.9 and 6.9


def test_degenerate_data_have_no_interval_and_no_warning(tmp_path):
    path = make(tmp_path / "run", {0: 8, 10: 8})
    store(path, 0, "held_out", [V, C])
    store(path, 10, "held_out", [V, V])
    with warnings.catch_warnings(action="error"):
        kept = of(measure_run(load_run(path)), "retention")
    assert (kept.value, kept.low, kept.high, kept.n) == (0, None, None, 2)
    assert kept.without == "too little varies for one"


def test_noise_seldom_raises_an_alarm():
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        sign, limit = surely_positive(rng.normal(size=36), 8)
        alarms += bool(np.nanmax(sign) > limit)
    assert 0 < alarms / 400 <= 0.05
    sign, limit = surely_positive(rng.normal(1, 0.5, size=36), 8)
    assert np.isnan(sign[:7]).all()
    assert (sign[7:] > limit).any()
    with pytest.raises(ValueError, match="window"):
        surely_positive([1.0, 2.0], 8)


def test_the_way_back(tmp_path):
    path = make(tmp_path / "run")
    back = make(tmp_path / "back", {0: 180, 10: 150, 20: 100, 40: 10})
    set_recipe(back, scenarios_per_step=4, group_size=8)
    m = measure_run(load_run(path), turned=load_run(back))
    assert (of(m, "steps to tip").value, of(m, "steps back").value) == (20, 40)
    assert "1280 episodes" in of(m, "steps back").words
    assert of(m, "steps back over steps to tip").value == 2
    # at 10, 20 and 30 steps back .75, .5, .275 against .75, .05, .04 on the way there
    assert of(m, "height of the loop").value == pytest.approx((0 + (0 + 0.45) / 2 + (0.45 + 0.235) / 2) / 3)
    elsewhere = make(tmp_path / "elsewhere", {0: 8, 10: 8})
    with pytest.raises(InputError, match=r"--turned .*elsewhere: starts at 4.0 % .* ends at 90.0 %"):
        measure_run(load_run(path), turned=load_run(elsewhere))


def test_what_is_left_of_the_benefit(tmp_path):
    path, bare = make(tmp_path / "run", {0: 8, 10: 10}), make(tmp_path / "bare", {0: 8, 10: 10})
    many = 8
    for step, ours, theirs in ((0, [C, C, C, C], [V, V, V, V]), (10, [C, V, V, V], [V, V, V, V])):
        store(path, step, "held_out", ours * many)
        store(bare, step, "held_out", theirs * many)
    set_recipe(bare, start_from="base")
    m = measure_run(load_run(path), unaligned=load_run(bare))
    assert of(m, "alignment benefit, step 0").value == 1
    assert of(m, "alignment benefit, step 10").value == 0.25
    left = of(m, "alignment benefit left")
    assert (left.value, left.n) == (0.25, 32)
    assert left.low is not None
    with pytest.raises(InputError, match=r"evolve.start_from.*base"):
        measure_run(load_run(bare), unaligned=load_run(path))


def test_a_monitor_by_window_and_its_cost(tmp_path):
    path = make(tmp_path / "run")
    add_metrics(
        path,
        defense__monitor__decisions=lambda t: 100,
        defense__monitor__violations=lambda t: 10,
        defense__monitor__flagged=lambda t: 10 if t <= 20 else 5,
        defense__monitor__hits=lambda t: 9 if t <= 10 else 8 if t <= 20 else 3,
        defense__monitor__seconds=lambda t: 0.5,
        time__step_s=lambda t: 2.0,
    )
    m = measure_run(load_run(path))
    assert [(w.after, w.to, w.recall.value) for w in m.monitors["monitor"]] == [
        (0, 10, 0.9), (10, 20, 0.8), (20, 30, 0.3)
    ]  # fmt: skip
    assert m.monitors["monitor"][0].false_alarms == wilson(10, 900)
    assert of(m, "monitor: precision").value == 0.6
    lost = of(m, "monitor: obfuscation")
    assert lost.value == pytest.approx(1 - 0.3 / 0.9)
    assert lost.value is not None
    assert lost.low is not None
    assert lost.high is not None
    assert lost.low < lost.value < lost.high
    assert of(m, "cost: seconds").value == 15
    assert "25% of" in of(m, "cost: seconds").words


def test_a_run_in_context_goes_by_rounds(tmp_path):
    path = make(tmp_path / "run", {0: split(60, rounds=(5, 20, 35, 40))}, learner="in_context")
    m = measure_run(load_run(path))
    assert m.axis == "round"
    assert of(m, "decay").value == pytest.approx(35 / 50)  # 5 of 50 in round 1, 40 of 50 in round 4
    assert of(m, "time to 25 %").value == 2
    assert why(m, "Pareto front") == "one checkpoint only"


def test_numbers_as_text():
    assert number_text(0.125, "share") == "12.5 %"
    assert number_text(0.125, "points") == "+12.5 points"
    assert number_text(None, "steps") == "–"
    assert number_text(16.0, "steps") == "16"
    bounded = Measure(3, "x", 0.5, 0.25, None, 4, "share", "scenarios", "", "")
    assert interval_text(bounded) == "[25.0, ?]"


def test_a_run_beside_belongs_to_one(tmp_path):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", seed=1)]
    with pytest.raises(InputError, match="belongs to one run and there are 2"):
        measures_of(runs, turned=runs[0])
    assert [m.seed for m in measures_of(runs)] == [0, 1]
    assert len(tables(measures_of(runs))) == 4  # a table and a line of what is left out, each


def test_of_a_tiny_run(tmp_path):
    atp("run", ROLE_PLAY, *SMALL, "run.dir=run", cwd=tmp_path)
    output, _ = atp("measure", "run", "--json", "measures.json", cwd=tmp_path)
    assert "decay" in output
    assert "scenarios, paired" in output
    assert "Not measured: " in output
    (record,) = json.loads((tmp_path / "measures.json").read_text())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    by_name = {m["name"]: m for m in record["measured"]}
    assert by_name["AUVC"]["value"] == pytest.approx(summary["auvc"])
    assert summary["decay_kind"] in ("none", "erosion", "tipping")
    changed = summary["final"]["violation_rate"] - summary["aligned"]["violation_rate"]
    assert by_name["decay"]["value"] == pytest.approx(changed)
    assert "covariance of advantage and violation" in by_name
    _, errors = atp("measure", "nowhere", cwd=tmp_path, expect=2)
    assert "nowhere" in errors
