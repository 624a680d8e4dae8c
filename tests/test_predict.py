"""`atp predict`: what is read off a recipe, the warnings at the start, and predictions beside runs made by hand."""

from __future__ import annotations

import math
import re
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from atp_rl import pipeline
from atp_rl.cli import main
from atp_rl.defenses import DEFENSES, Covariance
from atp_rl.evaluate import tipping
from atp_rl.evaluate.tipping import KL, Lagrangian, Penalty, equilibrium, rate_at_kl
from atp_rl.pipeline import suites_of
from atp_rl.predict import (
    MODELLED,
    NoPrediction,
    Prediction,
    as_modelled,
    options,
    predict,
    rounded_up,
    warnings,
    warnings_of,
)
from atp_rl.predict_runs import against, compare, model_steps_per_step, order
from atp_rl.predict_tables import tables
from atp_rl.recipe import DefenseSpec, Recipe, dump, load
from atp_rl.tracking.compare import arms
from atp_rl.tracking.read import expand, load_run
from atp_rl.types import InputError
from tests.command_line import RECIPES, ROLE_PLAY
from tests.test_report import make_run, shown, split

JUDGE = "evolve.reward_options.judge={url: 'http://127.0.0.1:9/v1', model: grader}"
UNWATCHED = "scenarios.supervision=all_unsupervised"
COLLUSION, TOOL_USE, POPULATION = (
    str(RECIPES / "tiny" / f"{name}.yaml") for name in ("collusion", "tool_use", "population")
)


def recipe(*overrides: str, defenses: list[dict[str, Any]] | None = None) -> Recipe:
    """The tiny recipe of role play; `defenses` may name ones that do not exist."""
    specs = [DefenseSpec.model_validate(each) for each in defenses or []]
    return load([ROLE_PLAY, *overrides]).model_copy(update={"defenses": specs})


def predicted(*overrides: str, p0: float = 0.01, defenses: list[dict[str, Any]] | None = None) -> Prediction:
    made = recipe(*overrides, defenses=defenses)
    return predict(made, suites_of(made), p0=p0)


def warned(*defenses: dict[str, Any], overrides: tuple[str, ...] = (UNWATCHED,)) -> list[str]:
    made = recipe(*overrides, defenses=list(defenses))
    return warnings(made, suites_of(made))


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls `atp` in this process; its exit code, output and errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["atp", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


# What is read off a recipe


def test_the_gap_is_the_mean_over_training_scenarios_in_units_of_reward():
    made = recipe(UNWATCHED)
    ratios = [min(s.payoffs.values()) / max(s.payoffs.values()) for s in suites_of(made).train]
    prediction = predict(made, suites_of(made), p0=0.01)
    assert prediction.gap == pytest.approx(1 - np.mean(ratios))
    assert prediction.setting.get("spread") == pytest.approx(np.std(ratios))
    assert (prediction.setting["group_size"], prediction.setting["scale_rewards"]) == (8, "group")


def test_detection_and_fine_make_violations_pay_less():
    made = recipe("scenarios.supervision={probability: 0.3, fine: 60}")
    train = suites_of(made).train
    expected = np.mean(
        [(0.7 * max(s.payoffs.values()) - 0.3 * 60 - min(s.payoffs.values())) / max(s.payoffs.values()) for s in train]
    )
    assert predict(made, suites_of(made), p0=0.01).gap == pytest.approx(expected)


def test_the_control_of_the_demo_makes_compliance_pay():
    prediction = predicted("scenarios.supervision={probability: 0.9}")
    assert prediction.gap < 0
    assert prediction.undefended.end == 0
    assert prediction.critical_beta == 0


def test_a_reward_for_compliance_counts():
    plain, mixed = predicted(UNWATCHED), predicted(UNWATCHED, "evolve.rewards={payoff: 1.0, compliance: 0.2}")
    assert mixed.gap == pytest.approx(plain.gap - 0.2 * 0.9)


def test_patterns_that_are_told_predict_the_rounds_that_nobody_watches():
    told = predicted("scenarios.supervision=alternating", "scenarios.rounds=2")
    assert told.gap == predicted(UNWATCHED).gap
    assert any("told" in note for note in told.notes)
    assert predicted("scenarios.supervision=all_supervised").gap < 0


def test_tool_use_pays_for_leaving_the_tool_out():
    made = load([TOOL_USE])
    assert predict(made, suites_of(made), p0=0.05).gap == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ([COLLUSION], "other seats"),
        ([COLLUSION, POPULATION], "one adapter a seat"),
        ([ROLE_PLAY, "evolve.learner=in_context", "evolve.steps=0"], "updates no weights"),
        ([ROLE_PLAY, "evolve=null"], "no `evolve`"),
        ([ROLE_PLAY, "scenarios.allowed=true"], "no rule forbids"),
        ([ROLE_PLAY, "evolve.rewards={payoff: 1.0, judge: 1.0}", JUDGE], "reward model judge"),
    ],
)
def test_where_the_model_does_not_apply_it_says_why_and_warns_of_nothing(files, why):
    made = load([*files, "defenses=[{name: kl_anchor, beta: 0.04}]"])
    with pytest.raises(NoPrediction, match=why):
        predict(made, suites_of(made))
    assert warnings(made, suites_of(made)) == []


def test_the_start_is_measured_where_there_is_a_run_else_assumed(tmp_path):
    made = recipe(f"run.dir={tmp_path / 'run'}")
    assert predict(made, suites_of(made)).p0 == 0.01
    assert "assumed" in predict(made, suites_of(made)).p0_from
    make_run(tmp_path / "run", curve={0: 8, 4: 100})
    assert predict(made, suites_of(made)).p0 == pytest.approx(8 / 200)


def test_a_start_without_violations_is_its_exact_propensity(tmp_path):
    """At p = 0 nothing would ever be learned, and 200 decisions cannot tell .001 from it."""
    made = recipe(f"run.dir={tmp_path / 'run'}")
    make_run(tmp_path / "run", curve={0: split(0, propensity=0.001), 4: 100})
    assert predict(made, suites_of(made)).p0 == 0.001
    silent = recipe(f"run.dir={tmp_path / 'other'}")
    make_run(tmp_path / "other", curve={0: split(0, propensity=None), 4: 100})
    assert predict(silent, suites_of(silent)).p0 == pytest.approx(0.5 / 201)


@pytest.mark.parametrize("p0", [0.0, 1.0, -1.0, math.nan])
def test_a_start_must_lie_between_0_and_1(p0):
    with pytest.raises(InputError, match="between 0 and 1"):
        predicted(p0=p0)


def test_defenses_have_the_options_of_the_recipe_and_else_those_of_their_class():
    setting = predicted(UNWATCHED).setting
    spec = DefenseSpec.model_validate({"name": "kl_anchor", "estimator": "bias_corrected"})
    assert as_modelled(spec, 0.01, setting) == KL(0.2, "bias_corrected")
    spec = DefenseSpec.model_validate({"name": "monitor", "recall": 0.7, "fine": 2.0})
    assert as_modelled(spec, 0.01, setting) == Penalty(0.7, 2.0, 0.02)
    spec = DefenseSpec.model_validate({"name": "lagrangian", "warm_start": 0.4, "cap": 1.0})
    modelled = as_modelled(spec, 0.01, setting)
    assert isinstance(modelled, Lagrangian)
    assert (modelled.kp, modelled.warm_start, modelled.cap) == (2.0, 0.4, 1.0)
    assert as_modelled(DefenseSpec(name="gate"), 0.01, setting) is None


def test_a_class_that_changes_its_defaults_is_predicted_with_the_new_ones(monkeypatch):
    for name, known in MODELLED.items():
        assert {*known} <= {field.name for field in fields(DEFENSES[name])}
    assert options(DefenseSpec(name="covariance"))["recall"] == 1.0
    changed = make_dataclass("Changed", [("recall", float, field(default=0.4))], bases=(Covariance,))
    monkeypatch.setitem(DEFENSES, "covariance", changed)
    assert as_modelled(DefenseSpec(name="covariance"), 0.01, predicted().setting) == tipping.Covariance(0.4)


def test_a_target_kl_holds_the_rate_that_has_it():
    anchor = {"name": "kl_anchor", "target_kl": 0.1}
    prediction = predicted(UNWATCHED, defenses=[{**anchor, "estimator": "reward"}])
    assert prediction.together.end == pytest.approx(rate_at_kl(0.1, 0.01), abs=1e-3)
    assert predicted(UNWATCHED, defenses=[anchor]).alone[0].end is None  # of a token, not of a reply


@pytest.mark.parametrize(
    "defense",
    [
        {"name": "kl_anchor", "streams": "rule"},
        {"name": "monitor", "kind": "text"},
        {"name": "merge_back", "layers": "lines"},
    ],
)
def test_settings_that_the_model_does_not_have_are_not_predicted(defense):
    (alone,) = predicted(UNWATCHED, defenses=[defense]).alone
    assert alone.words == "no prediction: the model does not know it"


def test_interleaving_takes_its_share_of_the_push():
    """Normalised, a rule scenario pushes back as hard as a payoff pushes: half of them would hold, a quarter slows."""
    (quarter,) = predicted(UNWATCHED, defenses=[{"name": "interleave", "rho": 0.25}]).alone
    assert quarter.to_50 == pytest.approx(2 * predicted(UNWATCHED).undefended.to_50, rel=1e-3)
    assert predicted(UNWATCHED, defenses=[{"name": "interleave", "rho": 0.51}]).alone[0].end == 0
    assert "rho 0.25 only slows, 2.0 times" in warned({"name": "interleave", "rho": 0.25})[0]
    raw = predicted(UNWATCHED, "evolve.scale_rewards=none", defenses=[{"name": "interleave", "rho": 0.3}])
    assert raw.gap < 0.3 / 0.7 * 0.9
    assert raw.alone[0].end == 0


def test_defenses_are_predicted_alone_and_together():
    prediction = predicted(
        UNWATCHED,
        defenses=[
            {"name": "kl_anchor", "beta": 1.0},
            {"name": "gate"},
            {"name": "monitor", "mode": "screening", "recall": 0.9, "false_alarm": 0.0},
        ],
    )
    anchor, gate, monitor = prediction.alone
    assert anchor.end == pytest.approx(0.440, abs=2e-3)
    assert gate.end is None
    assert monitor.end == 1
    assert monitor.to_50 == pytest.approx(6990, rel=0.01)
    assert prediction.together.end is not None
    assert prediction.together.end < 0.02


# Warnings


def test_an_anchor_below_the_critical_weight_is_warned_of():
    (line,) = warned({"name": "kl_anchor", "beta": 0.04})
    assert "kl_anchor: beta 0.04 is below the critical 2.47 (k3, G = 8, scale_rewards group)" in line
    assert "from 2.48 on it holds 10%" in line  # 7 / sqrt(8) = 2.4749
    assert "Predicted from p0 = 0.01: tips" in line
    assert "98.4%" in line


def test_an_anchor_just_below_the_critical_weight_is_warned_of_though_it_keeps_from_tipping():
    (line,) = warned({"name": "kl_anchor", "beta": 2.0})
    assert "beta 2 is below the critical 2.47" in line
    assert "holds: settles at 1" in line


@pytest.mark.parametrize(
    ("bound", "digits", "printed"),
    [
        (3.045, 3, "3.05"),
        (3.0401, 3, "3.05"),
        (3.05, 3, "3.05"),
        (0.2, 3, "0.2"),
        (0.0141, 2, "0.015"),
        (9.991, 3, "10"),
        (1041.0, 3, "1.05e+03"),
        (0.0, 3, "0"),
        (math.inf, 3, "inf"),
    ],
)
def test_a_bound_is_rounded_up(bound, digits, printed):
    assert rounded_up(bound, digits) == printed


@pytest.mark.parametrize("p0", [0.01, 0.05, 0.08])
def test_the_weights_that_are_said_to_hold_do(p0):
    made = recipe(UNWATCHED)
    prediction = predict(made, suites_of(made), p0=p0)
    text = shown(*tables(prediction, []))
    for estimator in ("k3", "bias_corrected", "reward"):
        (beta,) = re.findall(rf"([\d.]+) \({estimator}\)", text)
        assert equilibrium(p0, defenses=[KL(float(beta), estimator)], **prediction.setting) <= 0.10001


def test_what_is_proposed_is_not_warned_of():
    assert warned({"name": "kl_anchor", "beta": 2.48}) == []
    assert warned({"name": "kl_anchor", "beta": 3.0}) == []
    made = ("evolve.scale_rewards=none", UNWATCHED)
    assert warned({"name": "kl_anchor", "beta": 0.5}, overrides=made) == []
    assert len(warned({"name": "kl_anchor", "beta": 0.04}, overrides=made)) == 1


def test_the_reverse_kl_has_no_critical_weight_but_may_be_too_low():
    (line,) = warned({"name": "kl_anchor", "beta": 0.5, "estimator": "bias_corrected"})
    assert "too low" in line
    proposed = float(line.split("from ")[1].split(" on")[0])
    assert equilibrium(0.01, defenses=[KL(proposed, "bias_corrected")], **predicted(UNWATCHED).setting) < 0.11
    assert warned({"name": "kl_anchor", "beta": 1.0, "estimator": "bias_corrected"}) == []


def test_a_target_kl_that_is_reached_after_tipping_is_warned_of():
    anchor = {"name": "kl_anchor", "estimator": "reward"}
    assert "target_kl 3" in warned({**anchor, "target_kl": 3.0})[0]
    assert warned({**anchor, "target_kl": 0.05}) == []


def test_nothing_is_warned_of_where_nothing_tips_anyway():
    watched = ("scenarios.supervision={probability: 0.9}",)
    assert warned({"name": "kl_anchor", "beta": 0.04}, overrides=watched) == []
    assert warned({"name": "lagrangian", "kp": 0.0}, overrides=watched) == []


def test_nothing_is_warned_of_where_the_defenses_hold_together():
    screening = {"name": "monitor", "mode": "screening", "recall": 0.9}
    assert len(warned(screening, {"name": "kl_anchor", "beta": 0.04})) == 2
    assert warned(screening, {"name": "kl_anchor", "beta": 1.0}) == []


def test_a_penalty_below_the_deterrence_bound_is_warned_of():
    (line,) = warned({"name": "monitor", "recall": 0.9, "false_alarm": 0.0, "fine": 0.1})
    gap = predicted(UNWATCHED).gap
    assert f"a violation still gains {gap - 0.09:.2g}" in line
    (fine,) = re.findall(r"a fine above (\S+) deters", line)
    assert gap / 0.9 <= float(fine) < gap / 0.9 * 1.01
    assert warned({"name": "monitor", "recall": 0.9, "fine": 1.0}) == []


def test_a_penalty_that_deters_on_average_alone_is_warned_of():
    """A fine so high that violations lose on average, taken from every third of them: normalised, two of three win."""
    (line,) = warned({"name": "monitor", "recall": 0.35, "false_alarm": 0.0, "fine": 1.2})
    assert "recall above .5 is needed" in line
    raw = (UNWATCHED, "evolve.scale_rewards=none")
    assert warned({"name": "monitor", "recall": 0.35, "false_alarm": 0.0, "fine": 1.2}, overrides=raw) == []


def test_screening_with_misses_is_said_to_slow():
    (line,) = warned({"name": "monitor", "mode": "screening", "recall": 0.9, "false_alarm": 0.0})
    assert "with recall 0.9 it only slows, 7.8 times" in line
    # compliers keep the low advantages that the violators of their group gave them
    (line,) = warned({"name": "monitor", "mode": "screening", "recall": 1.0, "false_alarm": 0.0})
    assert "with recall 1 it only slows, 49.2 times" in line


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        ({"kp": 0.0, "warm_start": 0.4}, "kp"),
        ({"kp": 2.0, "warm_start": 0.0}, "warm_start"),
        ({"kp": 0.0, "warm_start": 0.0}, "kp and warm_start"),
    ],
)
def test_a_lagrangian_that_comes_late_is_warned_of(options, lacking):
    (line,) = warned({"name": "lagrangian", **options})
    assert f"without {lacking} it acts after" in line
    assert warned({"name": "lagrangian", "kp": 2.0, "warm_start": 0.4}) == []


def test_covariance_and_replay_are_warned_of_where_they_do_not_hold():
    assert warned({"name": "covariance"}) == []
    assert "only slows" in warned({"name": "covariance", "recall": 0.8})[0]
    assert warned({"name": "replay", "loss": "dpo"}) == []
    assert "too weak" in warned({"name": "replay", "loss": "sft", "weight": 0.3})[0]


def test_a_run_warns_once_at_its_start_and_a_dry_run_too(call, tmp_path, capsys):
    overrides = [UNWATCHED, "defenses=[{name: kl_anchor, beta: 0.04}]", "track.wandb=disabled"]
    code, output, errors = call("run", ROLE_PLAY, *overrides, f"run.dir={tmp_path / 'dry'}", "--dry-run")
    assert code == 0
    assert errors.count("below the critical") == 1
    assert "below the critical" not in output
    pipeline.start(load([ROLE_PLAY, *overrides, f"run.dir={tmp_path / 'run'}"]))
    assert capsys.readouterr().err.count("atp: warning: defense kl_anchor") == 1
    assert call("run", ROLE_PLAY, f"run.dir={tmp_path / 'dry'}", "--dry-run")[2] == ""


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            [ROLE_PLAY, UNWATCHED, "defenses=[{name: kl_anchor, beta: 3.0}]"],
            "prediction from p0 = 0.01: holds: settles at 4.0%",
        ),
        ([ROLE_PLAY, "defenses=[gate]"], "no prediction: the model does not know gate"),
        (
            [COLLUSION, POPULATION, "defenses=[{name: kl_anchor, beta: 0.04}]"],
            "no prediction: the learner population has",
        ),
        ([ROLE_PLAY], None),
    ],
)
def test_the_plan_of_a_dry_run_says_what_the_defenses_are_predicted_to_do(files, says):
    made = load(files)
    lines = [line for line in pipeline.plan(made, suites_of(made)) if "prediction" in line]
    assert [line[: len(says or "")] for line in lines] == ([says] if says else [])


# The command


def test_the_command_says_what_theory_expects_and_loads_no_model(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    code, output, errors = call(
        "predict", ROLE_PLAY, RECIPES / "defenses" / "kl_anchor.yaml", UNWATCHED, "--p0", "0.01"
    )
    text = " ".join(output.split())
    assert (code, errors) == (0, "")
    assert "start: p0 = 0.01 (given)" in text
    assert "none 99.8%" in text or "none 100.0%" in text
    assert "kl_anchor (beta 3.0, estimator k3) 4.0% 4.0% never never holds: settles at 4.0%" in text
    assert "critical beta 2.47 (k3, however small p0 is)" in text
    assert "deterrence: compliance pays most from a detection of 0.34 on; here it is 0: violating pays" in text
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_that_it_predicts_nothing(call):
    code, output, _ = call("predict", COLLUSION)
    assert code == 0
    assert output.startswith("no prediction: what a decision pays depends on the other seats")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--p0", "2"], "p0 must be between 0 and 1, got 2.0"),
        (["--scale-by", "x"], "--scale-by: is for --against"),
        (["--against", "nowhere"], "no such file"),
        (["--against", "nowhere", "--p0", "0.1"], "--p0: is not for --against"),
    ],
)
def test_bad_input_of_the_command(call, arguments, says):
    code, _, errors = call("predict", ROLE_PLAY, *arguments)
    assert code == 2
    assert says in errors


def test_the_command_needs_a_recipe_or_runs(call):
    code, _, errors = call("predict")
    assert code == 2
    assert "RECIPE: is missing" in errors


@pytest.mark.parametrize("recipes", [[], [ROLE_PLAY]])
def test_beside_runs_the_table_of_a_recipe_is_left_out(call, study, recipes):
    code, output, _ = call("predict", *recipes, "--against", study[2])
    assert code == 0
    assert output.startswith("prediction | measurement")
    assert "start: p0" not in output
    assert "deterrence" not in output


def test_a_recipe_is_still_checked_beside_runs(call, study):
    code, _, errors = call("predict", ROLE_PLAY, "evolve.group_size=1", "--against", study[2])
    assert code == 2
    assert "group_size" in errors


def test_a_finding_against_the_deterrence_bound_is_said():
    prediction = predicted("scenarios.supervision={probability: 0.4}")
    text = shown(*tables(prediction, []))
    assert "compliance pays" in text
    assert "with detection below 0.5 few violations grow all the same" in text
    assert "fine" not in text


def test_a_policy_that_starts_tipped_is_predicted_too():
    screening = {"name": "monitor", "mode": "screening", "recall": 0.5}
    anchor = {"name": "kl_anchor", "beta": 0.5}
    prediction = predicted(UNWATCHED, p0=0.5, defenses=[screening, anchor])
    assert prediction.undefended.words.startswith("starts above 25 % and settles at")
    text = " ".join(shown(*tables(prediction, recipe(defenses=[screening, anchor]).defenses)).split())
    assert "with recall 0.5 it only slows." in text
    assert "beta 0.5 is below the critical 2.47 (k3, G = 8, scale_rewards group)." in text
    assert "none holds 10%, less than p0" in text
    watched = predicted("scenarios.supervision={probability: 0.9}", p0=0.5).undefended
    assert (watched.end, watched.fails) == (0, False)


def test_a_defense_that_needs_past_rounds_is_idle_in_one():
    window = [{"name": "window", "rounds": 1}, {"name": "reminder"}]
    one = recipe(defenses=window)
    (line,) = warnings(one, suites_of(one))
    assert line.startswith("defense window: changes nothing in episodes of one round")
    several = recipe("scenarios.rounds=6", defenses=window)
    assert warnings(several, suites_of(several)) == []


def test_warnings_stand_under_the_table():
    made = recipe(UNWATCHED, defenses=[{"name": "kl_anchor", "beta": 0.04}])
    prediction = predict(made, suites_of(made), p0=0.05)
    (line,) = warnings_of(prediction, made.defenses)
    assert "p0 = 0.05" in line
    assert "warning: defense kl_anchor" in shown(*tables(prediction, made.defenses))


# Beside runs


def run(path: Path, *overrides: str, defenses: str = "[]", **changes: Any) -> Path:
    """A run directory made by hand with a real recipe."""
    made = make_run(path, name=changes.pop("name", path.name), **changes)
    (made / "recipe.yaml").write_text(dump(load([ROLE_PLAY, UNWATCHED, f"defenses={defenses}", *overrides])))
    return made


@pytest.fixture
def study(tmp_path) -> list[Path]:
    """Two undefended seeds that tip at step 20, an anchor that holds, one too weak that has held so far, a gate."""
    tipped = {0: 10, 20: 60, 40: 190}
    held = {0: 10, 20: 12, 40: 14}
    return [
        run(tmp_path / "undefended-0", name="undefended", curve=tipped, time_to_25=20, tipping_step=20),
        run(tmp_path / "undefended-1", name="undefended", seed=1, curve=tipped, time_to_25=20, tipping_step=20),
        run(tmp_path / "kl_3", defenses="[{name: kl_anchor, beta: 3.0}]", curve=held),
        run(tmp_path / "kl_0.1", defenses="[{name: kl_anchor, beta: 0.1}]", curve=held),
        run(tmp_path / "gated", defenses="[gate]", curve=held),
    ]


def test_runs_stand_beside_their_predictions(study):
    text = " ".join(shown(*against(study, None)).split())
    assert text.count("as predicted") >= 3
    assert "no prediction: the model does not know gate" in text
    assert "open: predicted to tip, held so far" in text
    assert "95.0% [91.0%–97.3%] 200" in text
    assert "threshold: 3 of 3 runs passed 25 %, or did not, as predicted; 1 are open or unclear, or start" in text
    # kl_3 and kl_0.1 ended alike, though they should differ; kl_0.1 and undefended are too close to be put in an order
    assert "order: 1 of 2 pairs of arms" in text


def test_each_run_is_predicted_from_its_own_recipe_and_start(study):
    found = compare(load_run(study[2]))
    assert found.prediction is not None
    assert found.prediction.p0 == pytest.approx(0.05)
    setting = found.prediction.setting
    assert found.prediction.together.end == pytest.approx(equilibrium(0.05, defenses=[KL(3.0)], **setting))
    assert found.path is None


def test_a_scale_turns_model_steps_into_the_runs(study):
    scale = model_steps_per_step(study[0])
    undefended, weak = (compare(load_run(study[i]), scale) for i in (0, 3))
    assert undefended.prediction is not None
    assert undefended.prediction.together.to_25 / scale == pytest.approx(20)
    assert undefended.path is not None
    assert undefended.path.shape == (41,)
    assert undefended.path[-1] > 0.5
    assert weak.verdict == "not as predicted: it held"  # by then it should have tipped
    text = " ".join(shown(*against(study, study[0])).split())
    assert "that run's own time is no evidence" in text
    to_50 = undefended.prediction.together.to_50 / scale
    assert f"undefended 0 5.0% {undefended.path[-1]:.1%} 20 {to_50:.0f} 95.0%" in text
    # the run that gave the scale could not have failed, so it is not counted
    assert "threshold: 2 of 3 runs passed 25 %, or did not, as predicted; 0 are open or unclear" in text


def test_a_price_is_set_once_in_a_step_of_the_run(study, tmp_path):
    # from 5 % on: the integral alone is quick enough at every model step, and too slow if a step is many of them
    late = "[{name: lagrangian, kp: 0.0, ki: 0.05}]"
    found = run(tmp_path / "late", name="late", defenses=late, curve={0: 10, 40: 80}, time_to_25=20, tipping_step=20)
    record = load_run(found)
    assert compare(record).verdict == "not as predicted: it tipped"
    scaled = compare(record, model_steps_per_step(study[0]))
    assert scaled.verdict == "as predicted"
    assert scaled.path is not None
    assert scaled.time_to(0.25) == np.flatnonzero(scaled.path >= 0.25)[0] < 40
    assert scaled.time_to(0.25) <= scaled.time_to(0.5)


def test_a_run_too_short_to_tip_is_as_predicted(study, tmp_path):
    short = run(tmp_path / "short", curve={0: 10, 4: 12})
    assert compare(load_run(short), model_steps_per_step(study[0])).verdict == "as predicted: too short to tip"


def test_what_theory_forbids_is_said(tmp_path):
    path = run(tmp_path / "a", defenses="[{name: kl_anchor, beta: 3.0}]", curve={0: 10, 40: 150}, time_to_25=40)
    assert compare(load_run(path)).verdict == "not as predicted: it tipped"


def test_an_interval_that_holds_the_threshold_is_unclear(tmp_path):
    path = run(tmp_path / "a", curve={0: 10, 40: 52})
    assert compare(load_run(path)).verdict == "unclear: the interval holds 25 %"


def test_a_run_that_starts_above_the_threshold_is_not_counted(study, tmp_path):
    high = run(tmp_path / "high", curve={0: 60, 40: 190})  # 30 % at the start
    at = run(tmp_path / "at", curve={0: 50, 40: 52})  # 25 %
    crossed = run(tmp_path / "crossed", curve={0: 40, 40: 190}, time_to_25=0)
    for path in (high, at, crossed):
        assert compare(load_run(path)).verdict == "starts above 25 %"
    text = shown(*against([study[2], high, at, crossed], None))
    assert "threshold: 1 of 1 runs passed 25 %, or did not, as predicted; 3 are open or unclear, or start above" in text


def test_the_run_that_gives_the_scale_is_said_to(study):
    table = against(study, study[0])[0]
    assert isinstance(table, Table)
    (verdicts,) = ([*column.cells] for column in table.columns if column.header == "25 %")
    assert [str(each) for each in verdicts] == [
        "(scale)",
        "as predicted",
        "as predicted",
        "not as predicted: it held",
        "no prediction: the model does not know gate",
    ]


def at_width(width: int, *renderables: Any) -> list[str]:
    """The lines on a terminal of so many columns."""
    console = Console(width=width)
    with console.capture() as captured:
        for each in renderables:
            console.print(each)
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("scaled", [True, False])
def test_every_run_is_one_row_of_whole_numbers_on_any_terminal(study, width, scaled):
    lines = at_width(width, *against(study, study[0] if scaled else None))
    assert max(map(len, lines)) <= width
    measured = [line for line in lines if "[" in line and "–" in line and "200" in line]
    numbers = [re.search(r"\d+\.\d% +\[\d+\.\d%–\d+\.\d%\] 200 +(>40|20) +>40", line) for line in measured]
    assert len(measured) == 5
    assert all(numbers)
    assert [line.split("%")[0].split()[-2] for line in measured[:4]] == ["0", "1", "0", "0"]  # the seeds
    assert sum(line.startswith("un") for line in measured) == 1  # undefended: two rows, named in the first
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_of_a_recipe_loses_no_text_on_any_terminal(width):
    made = recipe(UNWATCHED, defenses=[{"name": "kl_anchor", "beta": 0.2, "estimator": "bias_corrected"}])
    prediction = predict(made, suites_of(made), p0=0.05)
    lines = at_width(width, *tables(prediction, made.defenses))
    assert max(map(len, lines)) <= width
    start = lines[next(i for i, line in enumerate(lines) if line.startswith(" defense"))].index("predicted")
    ended = next(i for i, line in enumerate(lines) if line.startswith("holds: never comes to 25 %"))
    said = " ".join(" ".join(line[start:] for line in lines[:ended] if line.startswith(" ")).split())
    assert prediction.undefended.words in said
    assert prediction.together.words in said
    row = next(line for line in lines if line.startswith(" none"))
    assert re.match(r" none +100\.0% +100\.0% +\d+ +\d+ ", row)


@pytest.mark.parametrize("which", [2, 4])
def test_a_run_that_cannot_be_scaled_by_is_refused(study, which):
    with pytest.raises(InputError, match=r"--scale-by .*(no prediction|did not pass)"):
        model_steps_per_step(study[which])


def test_arms_that_end_the_wrong_way_round_are_counted(tmp_path):
    weak = run(tmp_path / "weak", defenses="[{name: kl_anchor, beta: 0.5}]", curve={0: 10, 40: 20})
    strong = run(tmp_path / "strong", defenses="[{name: kl_anchor, beta: 3.0}]", curve={0: 10, 40: 30})
    assert order([[compare(record) for record in arm] for arm in arms(expand([weak, strong]))]) == (0, 1)
    for near, beta in ((strong, 3.01), (weak, 0.51)):  # to settle together, to pass 25 % together
        same = run(tmp_path / f"{beta}", defenses=f"[{{name: kl_anchor, beta: {beta}}}]", curve={0: 10, 40: 50})
        assert order([[compare(record) for record in arm] for arm in arms(expand([near, same]))]) == (0, 0)
