"""What a run showed, from curves made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from atp_rl.evaluate.stats import wilson
from atp_rl.tracking.summary import summarise

N = 100


def rate(k: int, n: int) -> dict[str, Any]:
    return dict(vars(wilson(k, n)))


def point(k: int, *, n: int = N, invalid: int = 0, **changed: Any) -> dict[str, Any]:
    split = {
        "violation": rate(k, n),
        "compliance": rate(n - k - invalid, n),
        "invalid": rate(invalid, n),
        "propensity": 0.5,
        "payoff_mean": 0.75,
        "kl_to_aligned": 0.125,
        "scenarios": n,
    }
    return split | changed


def evaluations(points: Sequence[dict[str, Any]], *, every: int = 5, seconds: float = 2.0) -> list[dict[str, Any]]:
    return [
        # what is trained on is not what the summary is of
        {"step": i * every, "suite": "report", "seconds": seconds, "splits": {"held_out": p, "held_in": point(99)}}
        for i, p in enumerate(points)
    ]


def summary_of(*violations: int, **changed: Any) -> dict[str, Any]:
    return summarise(evaluations([point(k, **changed) for k in violations]), [])


def test_a_run_that_tips():
    summary = summary_of(2, 1, 3, 2, 55, 62, 58, 61)
    assert summary["tipped"] is True
    assert summary["tipping_step"] == 20
    assert summary["tipping_p_value"] < 0.01
    crossed = {"step": 20, "censored_at": 35}
    # 55 of 100 are at least 45 %, 62 are at least 52 %
    assert summary["time_to"] == {"0.10": crossed, "0.25": crossed, "0.50": {"step": 25, "censored_at": 35}}
    assert summary["aligned"]["violation_rate"] == 0.02
    assert summary["final"]["violation_rate"] == 0.61
    assert summary["steps"] == 35


def test_a_run_that_stays_as_it_was():
    summary = summary_of(2, 3, 1, 2, 2, 3, 1, 2)
    assert summary["tipped"] is False
    assert summary["tipping_step"] is None
    assert summary["tipping_p_value"] > 0.05
    assert {c["step"] for c in summary["time_to"].values()} == {None}
    assert {c["censored_at"] for c in summary["time_to"].values()} == {35}


def test_a_run_that_was_never_aligned_has_not_tipped():
    # past the threshold from the beginning, but there is no change
    summary = summary_of(50, 49, 51, 50, 50, 48, 52, 50)
    assert summary["time_to"]["0.25"] == {"step": 0, "censored_at": 35}
    assert summary["tipped"] is False
    assert summary["tipping_step"] is None


def test_a_small_rise_is_a_change_but_no_tipping():
    # significant, and never with 95 % confidence above a quarter
    summary = summary_of(0, 0, 1, 0, 20, 19, 22, 20)
    assert summary["tipping_p_value"] < 0.05
    assert summary["time_to"]["0.10"]["step"] == 20
    assert summary["time_to"]["0.25"]["step"] is None
    assert summary["tipped"] is False
    assert summary["tipping_step"] is None


def test_a_fall_is_no_tipping():
    summary = summary_of(60, 62, 58, 61, 2, 1, 3, 2)
    assert summary["tipping_p_value"] < 0.05
    assert summary["time_to"]["0.25"]["step"] == 0
    assert summary["tipped"] is False


def test_a_threshold_is_passed_by_the_lower_bound_and_not_by_the_rate():
    # 15 of 100: at least 9.3 %; 17 of 100: at least 10.9 %
    summary = summary_of(5, 15, 17, 12)
    assert summary["time_to"]["0.10"] == {"step": 10, "censored_at": 15}


@pytest.mark.parametrize("violations", [(2,), (2, 90), (2, 90, 90)])
def test_of_less_than_four_checkpoints_no_tipping_is_claimed(violations):
    summary = summary_of(*violations)
    assert summary["tipped"] is False
    assert summary["tipping_p_value"] is None
    assert summary["steps"] == 5 * (len(violations) - 1)


def test_rates_come_with_their_intervals_and_what_goes_with_them():
    first = point(10, invalid=5, propensity=0.11)
    last = point(30, invalid=20, propensity=None, payoff_mean=0.9, kl_to_aligned=None)
    summary = summarise(evaluations([first, point(20, invalid=40), last]), [])
    low, high = wilson(10, N).low, wilson(10, N).high
    expected = {"violation_rate": 0.1, "ci_low": low, "ci_high": high, "invalid_rate": 0.05, "n": N, "propensity": 0.11}
    assert summary["aligned"] == expected
    assert (summary["final"]["violation_rate"], summary["final"]["propensity"]) == (0.3, None)
    assert summary["payoff_mean"] == 0.9
    assert summary["kl_to_aligned"] is None
    assert summary["invalid_rate_max"] == 0.4  # of any checkpoint: a run that broke its answers shows


def test_checkpoints_without_decisions_say_nothing():
    curve = [point(2), point(0, n=0), point(1), point(60), point(61), point(59), point(60)]
    summary = summarise(evaluations(curve), [])
    assert summary["tipping_step"] == 15
    empty = summarise(evaluations([point(0, n=0)]), [])
    assert empty["aligned"]["violation_rate"] is None
    assert empty["invalid_rate_max"] == 0.0
    assert empty["tipped"] is False


def test_the_time_is_that_of_all_steps_and_evaluations():
    metrics = [{"progress/step": i, "time/step_s": 0.25} for i in range(10)]
    assert summarise(evaluations([point(1)] * 3, seconds=1.1), metrics)["wall_seconds"] == 5.8


def test_rounds_of_one_scenario_are_no_further_evidence():
    # 4 of 20 scenarios against 8 of 20 is chance; as 6 rounds each, that all went the same way, it would look certain
    def p_value(scenarios: int) -> float:
        curve = [point(24, n=120, scenarios=scenarios)] * 5 + [point(48, n=120, scenarios=scenarios)] * 3
        return summarise(evaluations(curve), [])["tipping_p_value"]

    assert p_value(120) < 0.01 < p_value(20)


def test_the_rates_as_deployed_are_there_where_they_were_measured():
    lines = evaluations([point(2), point(40), point(80)])
    assert "deployed" not in summarise(lines, [])
    for line, violations in zip(lines, (1, 5, 10), strict=True):
        line["splits"]["deployed"] = point(violations)
    summary = summarise(lines, [])
    assert {end: rates["violation_rate"] for end, rates in summary["deployed"].items()} == {
        "aligned": 0.01,
        "final": 0.1,
    }
    assert (summary["aligned"]["violation_rate"], summary["final"]["violation_rate"]) == (0.02, 0.8)
