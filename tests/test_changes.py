"""Retention, benefit, gaps and prices: by hand, against scipy and statsmodels, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_rl.evaluate import changes, stats
from atp_rl.evaluate.stats import Rate


def holds(rate: Rate, truth: float) -> bool:
    assert rate.low is not None
    assert rate.high is not None
    return rate.low <= truth <= rate.high


def test_retention_is_the_ratio_of_means_with_an_interval():
    rng = np.random.default_rng(0)
    v_0 = rng.random(200) * 0.4
    v_k = v_0 + 0.5 * (1 - v_0)  # half of every scenario's compliance is lost: no uncertainty about it
    rate = changes.retention_interval(v_k, v_0)
    assert (rate.value, rate.low, rate.high, rate.n) == pytest.approx((0.5, 0.5, 0.5, 200))
    noisy = changes.retention_interval(np.clip(v_k + rng.normal(0, 0.2, 200), 0, 1), v_0)
    assert noisy.value == pytest.approx(stats.retention(1 - (noisy.value or 0) * (1 - v_0.mean()), v_0.mean()))
    assert holds(noisy, 0.5)
    assert (noisy.high or 0) - (noisy.low or 0) > 0.02


def test_retention_without_variation_or_compliance():
    unseen = stats.wilson(0, 20).high or 0
    assert changes.retention_interval([0.0] * 20, [0.0] * 20) == Rate(1.0, 1 - unseen, 1 + unseen, 20)
    assert changes.retention_interval([1.0] * 3, [1.0] * 3) == Rate(None, None, None, 3)
    assert changes.retention_interval([np.nan], [0.0]) == Rate(None, None, None, 0)


@pytest.mark.parametrize("n", [40, 200])
def test_retention_intervals_cover(n, monkeypatch):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        p = rng.beta(1, 9, n)
        v_0, v_k = rng.binomial(4, p) / 4, rng.binomial(4, 0.4 + 0.6 * p) / 4
        hits += holds(changes.retention_interval(v_k, v_0), 0.6)
    assert hits >= 88


def test_benefit_and_what_is_left_of_it():
    rng = np.random.default_rng(1)
    aligned_0, unaligned_0 = rng.binomial(4, 0.1, 150) / 4, rng.binomial(4, 0.8, 150) / 4
    aligned_k, unaligned_k = rng.binomial(4, 0.55, 150) / 4, rng.binomial(4, 0.9, 150) / 4
    assert holds(changes.benefit(unaligned_0, aligned_0), 0.7)
    left = changes.benefit_left(unaligned_k, aligned_k, unaligned_0, aligned_0)
    by_hand = stats.alignment_benefit_left(*(x.mean() for x in (unaligned_k, aligned_k, unaligned_0, aligned_0)))
    assert left.value == pytest.approx(by_hand)
    assert holds(left, 0.5)


def test_a_benefit_that_may_be_none_has_no_share_left():
    rng = np.random.default_rng(0)
    v = rng.binomial(4, 0.5, (4, 30)) / 4
    v[2] = np.roll(v[3], 1) + np.where(np.arange(30) == 0, 0.02, 0)  # a benefit of less than a thousandth
    doubtful = changes.benefit_left(*v)
    assert doubtful.value is not None
    assert (doubtful.low, doubtful.high) == (None, None)
    assert changes.benefit_left(v[0], v[1], v[1] * 0, v[1]) == Rate(None, None, None, 30)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 1)), min_size=2, max_size=10))
def test_auvc_per_payoff_is_a_quotient(checkpoints):
    rates, gains = zip(*checkpoints, strict=True)
    steps, payoffs = list(range(len(rates))), np.cumsum(gains)
    price = changes.auvc_per_payoff(steps, rates, payoffs)
    area = stats.auvc(steps, rates)
    assert 0 <= area <= 1
    assert price == pytest.approx(area / (payoffs[-1] - payoffs[0]))
    assert changes.auvc_per_payoff(steps, rates, payoffs[::-1]) is None


def test_per_nat():
    assert changes.per_nat(0.3, 1.5) == pytest.approx(0.2)
    assert changes.per_nat(-0.3, 1.5) == pytest.approx(-0.2)
    assert changes.per_nat(0.3, 0.0) is None


def test_a_gap_of_shared_scenarios_is_paired():
    unsupervised = {"a": [1, 1], "b": [1, 0], "c": [0, np.nan], "only here": [1]}
    supervised = {"c": [0, 0, 0], "b": [0], "a": [0, 1], "unknown": [np.nan]}
    gap = changes.gap(unsupervised, supervised)
    assert gap.paired
    assert gap.difference == stats.decay([1, 0.5, 0], [0.5, 0, 0])


def test_a_gap_of_different_scenarios_is_newcombes():
    from statsmodels.stats.proportion import confint_proportions_2indep

    held_out = {f"out {i}": [float(i < 12)] for i in range(40)}
    held_in = {f"in {i}": [float(i < 3)] for i in range(60)}
    gap = changes.gap(held_out, held_in)
    assert not gap.paired
    theirs = confint_proportions_2indep(12, 40, 3, 60, compare="diff", method="newcomb")
    assert (gap.difference.low, gap.difference.high) == pytest.approx(theirs, abs=1e-3)
    assert gap.difference.value == pytest.approx(0.25)
    assert gap.difference.n == 100


def test_a_gap_to_nothing_is_unknown():
    assert changes.gap({"a": [1]}, {}) == changes.Gap(Rate(None, None, None, 0), False)
    assert changes.gap({"a": [1]}, {"a": [np.nan]}).difference.value is None
