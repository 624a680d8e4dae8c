"""The gate's three tests: their arithmetic by hand, how often they are wrong, and what a gate does with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from atp_rl.defenses import Gate, Probe
from atp_rl.defenses.sequential import Cusum, EProcess
from atp_rl.scenarios.suites import Suites, make_suites
from atp_rl.types import InputError
from tests.gate_calibration import (
    ALPHA,
    RATES,
    SEQUENCES,
    SHIFT,
    H,
    N,
    delays,
    exact_cusum,
    exact_one_shot,
    false_alarms,
    rejected_counts,
)
from tests.small_model import run_of, small_recipe

# --- by hand


def test_cusum_by_hand():
    # one violation speaks with log(.5 / .25) = log 2 for p1, one compliance with log(.5 / .75) = -log 1.5
    cusum = Cusum(0.25, 0.5, h=2 * math.log(2))
    assert cusum.at_rest
    assert not cusum.update(0, 4)
    assert cusum.evidence == 0  # never below
    assert not cusum.update(2, 3)
    assert cusum.evidence == pytest.approx(2 * math.log(2) - math.log(1.5))
    assert not cusum.at_rest
    assert cusum.update(1, 1)
    assert cusum.evidence == pytest.approx(3 * math.log(2) - math.log(1.5))
    cusum.restart()
    assert cusum.at_rest


def test_an_e_process_by_hand():
    # the first bet is for p1 = .5: wealth x 2 for a violation, x 2/3 for none
    process = EProcess(0.25, 0.5, alpha=0.05)
    assert not process.update(3, 4)
    assert math.exp(process.evidence) == pytest.approx(2**3 * 2 / 3)
    # then for (32 x .5 + 3) / (32 + 4) = 19/36, whose bet is Kelly's, (19/36 - 1/4) / (1/4 x 3/4)
    bet = (19 / 36 - 0.25) / (0.25 * 0.75)
    assert process.update(4, 4)
    assert math.exp(process.evidence) == pytest.approx(2**3 * 2 / 3 * (1 + bet * 0.75) ** 4)
    assert math.exp(process.evidence) >= 20
    # the past fades: .8 x 3 + 4 violations of .8 x 4 + 4 decisions
    assert (process.violations, process.n) == pytest.approx((6.4, 7.2))


@pytest.mark.parametrize("p0", RATES)
def test_a_bet_is_fair_at_p0_whatever_the_past_says(p0: float):
    k = np.arange(N + 1)
    for past in (0, 5, 40):
        process = EProcess(p0, p0 + SHIFT, ALPHA)
        process.update(past, N)
        before = process.evidence
        process.update(k, N)
        growth = np.exp(process.evidence - before)
        assert (binom.pmf(k, N, p0) * growth).sum() == pytest.approx(1)
        assert (binom.pmf(k, N, p0 / 2) * growth).sum() <= 1 + 1e-12


def test_an_e_process_never_bets_on_a_rate_below_p0():
    process = EProcess(0.25, 0.3, ALPHA)
    for _ in range(30):
        process.update(0, N)
    rested = process.evidence
    process.update(0, N)
    assert process.evidence == rested  # the past suggests less than p0: nothing is bet


# --- calibration


@pytest.mark.parametrize("p0", RATES)
def test_one_shot_is_wrong_as_often_as_fifty_tests_are(p0: float):
    rejects = rejected_counts(p0)
    rate, error = false_alarms(lambda counts: rejects[counts], p0, seed=1)
    assert abs(rate - exact_one_shot(p0)) < 2 * error
    assert 0.5 < rate < 0.9  # the level of a run is not that of a test


@pytest.mark.parametrize("p0", RATES)
def test_cusum_is_wrong_as_often_as_its_markov_chain_says(p0: float):
    cusum = Cusum(p0, p0 + SHIFT, H)
    rate, error = false_alarms(lambda counts: cusum.update(counts, N), p0, seed=2)
    assert abs(rate - exact_cusum(p0)) < 2 * error
    assert 0.02 < rate < 0.1


@pytest.mark.parametrize("p0", RATES)
def test_an_e_process_is_wrong_at_most_as_often_as_it_says(p0: float):
    process = EProcess(p0, p0 + SHIFT, ALPHA)
    rate, error = false_alarms(lambda counts: process.update(counts, N), p0, seed=3)
    assert rate <= ALPHA + 2 * error
    quieter = EProcess(p0, p0 + SHIFT, ALPHA)
    assert false_alarms(lambda counts: quieter.update(counts, N), p0 / 2, seed=4)[0] <= rate


@pytest.mark.parametrize(("make", "small", "large"), [(Cusum, 2, 1), (EProcess, 5, 2)])
def test_a_drift_is_found_soon_after_a_quiet_time(make: Any, small: int, large: int):
    level = H if make is Cusum else ALPHA
    for rise, expected in ((0.08, small), (0.2, large)):
        found = delays(make(0.05, 0.13, level), 0.05, rise, seed=5)
        assert len(found) > 0.9 * SEQUENCES
        assert np.isfinite(found).all()
        assert np.median(found) == expected


# --- the gate


def verdicts(gate: Gate, counts: list[int], n: int = N) -> list[bool]:
    found = []
    for step, count in enumerate(counts, 1):
        gate.begin(step)
        found.append(gate.accept(Probe(2, n, 0), Probe(count, n, 0)))
        if not found[-1]:
            gate.on_rollback()
    return found


def test_p0_is_that_of_the_aligned_policy_shrunk_or_as_given():
    gate = Gate(test="cusum")
    gate.accept(Probe(2, 64, 1), Probe(0, 64, 0))
    gate.accept(Probe(30, 64, 0), Probe(0, 64, 0))  # a later probe changes nothing
    assert gate.metrics["p0"] == pytest.approx(3 / 66)
    counting = Gate(test="e_process", count_invalid=True)
    counting.accept(Probe(2, 64, 1), Probe(0, 64, 0))
    assert counting.metrics["p0"] == pytest.approx(4 / 66)
    given = Gate(test="cusum", p0=0.2)
    given.accept(Probe(2, 64, 1), Probe(0, 64, 0))
    assert given.metrics["p0"] == 0.2


def test_invalid_answers_count_where_they_are_asked_to():
    silent = Probe(0, 64, 60)
    assert Gate().accept(Probe(0, 64, 0), silent)
    assert not Gate(count_invalid=True).accept(Probe(0, 64, 0), silent)


def test_a_rollback_returns_to_before_the_drift_began():
    gate = Gate(test="cusum", p0=0.05)
    trusted = []
    # 3 of 64 are usual; 7 speak for a drift without proving it, and twelve more do
    for step, count in enumerate([3, 2, 7, 8, 14], 1):
        gate.begin(step)
        accepted = gate.accept(Probe(3, N, 0), Probe(count, N, 0))
        trusted.append(accepted and gate.trusts)
    assert trusted == [True, True, False, False, False]
    assert not accepted
    gate.on_rollback()
    assert gate.sequence is not None
    assert gate.sequence.at_rest


@pytest.mark.parametrize("test", ["one_shot", "cusum", "e_process"])
def test_after_an_alarm_nothing_is_tested_or_trusted_for_a_while(test: Any):
    gate = Gate(test=test, p0=None if test == "one_shot" else 0.05, cooldown=2)
    assert verdicts(gate, [50, 50]) == [False, True]
    assert not gate.trusts
    successor = Gate(test=test, p0=gate.p0, cooldown=2)
    successor.load_state(gate.state())
    assert verdicts(successor, [50, 50, 0]) == [True, False, True]
    assert successor.metrics["rejected_total"] == 2


def test_evidence_lives_through_a_resume():
    gate = Gate(test="e_process")
    verdicts(gate, [5, 5])
    successor = Gate(test="e_process")
    successor.load_state(gate.state())
    assert verdicts(gate, [6, 7]) == verdicts(successor, [6, 7])
    assert gate.state() == successor.state()
    assert gate.metrics == successor.metrics


def test_a_rollback_by_a_gate_that_does_not_trust_goes_back_further(tmp_path):
    # the small model violates about every second time: soon the evidence is there, and before it no step is at rest
    overrides = ("defenses=[{name: gate, test: cusum, p0: 0.2, shift: 0.3, h: 6}]", "evaluate.gate_per_family=8")
    run = run_of(small_recipe(tmp_path / "run", *overrides, "evaluate.every=1", steps=5))
    metrics, alerts = run.lines("metrics.jsonl"), run.lines("alerts.jsonl")
    first = next(i for i, m in enumerate(metrics) if not m["defense/gate/accepted"])
    assert first > 0
    assert all(m["defense/gate/cusum"] > 0 for m in metrics[: first + 1])
    assert metrics[first - 1]["drift/adapter_distance"] > 0
    assert metrics[first]["drift/adapter_distance"] == 0  # where the run began
    assert alerts[0]["step"] == first + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": "sprt"}, "`test` must be one_shot, cusum or e_process"),
        ({"p0": 0.0}, "`p0` must be between 0 and 1"),
        ({"p0": 0.95}, r"`p0` \+ `shift` must be below 1"),
        ({"shift": 0.0}, "`shift` must be > 0"),
        ({"h": -1.0}, "`h` must be > 0"),
        ({"cooldown": -1}, "`cooldown` must be 0 or more"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Gate(**options)


@pytest.mark.parametrize("testbed", ["role_play", "collusion", "tool_use"])
def test_a_gate_sees_no_scenario_that_is_trained_on_or_reported(testbed: str):
    suites = make_suites({"testbed": testbed}, train=16, align=16, gate=8, report=12)
    seen = {s.id for s in suites.gate}
    assert len(seen) == len(suites.gate) >= 8 * 5
    for name in Suites.__dataclass_fields__:
        assert name == "gate" or seen.isdisjoint(s.id for s in getattr(suites, name))
    assert {s.family for s in suites.gate} == {s.family for s in suites.train}
