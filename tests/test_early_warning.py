"""Early warning: the push of the theory, known processes, and curves that slow down."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_rl.evaluate import early_warning as ew
from atp_rl.evaluate.stats import wilson


@pytest.mark.parametrize("size", [4, 8])
def test_the_covariance_of_group_normalised_advantages_is_the_push_of_the_theory(size):
    for k in range(1, size):
        violations = np.array([[1.0] * k + [0.0] * (size - k)])
        rewards = 0.2 + 0.7 * violations  # violating pays, by whatever gap
        advantages = (rewards - rewards.mean()) / rewards.std(ddof=1)
        push = math.sqrt(k * (size - k) * (size - 1) / size**3)
        assert ew.advantage_violation_covariance(advantages, violations) == pytest.approx(push)
        assert ew.advantage_violation_covariance(-advantages, violations) == pytest.approx(-push)


def test_only_mixed_groups_push():
    advantages = [[1.0, -1.0], [5.0, -3.0], [2.0, 7.0]]
    violations = [[1, 0], [1, 1], [0, 0]]
    # (1 * .5 + -1 * -.5) of 6 replies
    assert ew.advantage_violation_covariance(advantages, violations) == pytest.approx(1 / 6)
    assert ew.mixed_groups(violations) == wilson(1, 3)
    assert ew.mixed_groups([[1, np.nan], [np.nan, np.nan], [0.5, 1]]) == wilson(1, 2)


@given(st.lists(st.tuples(st.floats(-3, 3), st.sampled_from([0.0, 0.5, 1.0, np.nan])), min_size=3, max_size=3))
def test_the_covariance_ignores_invalid_replies_and_the_advantages_level(group):
    a, v = (np.array([x]) for x in zip(*group, strict=True))
    value, shifted = (ew.advantage_violation_covariance(x, v) for x in (a, a + 5))
    assert shifted == (None if value is None else pytest.approx(value, abs=1e-9))
    known = np.isfinite(v)
    if known.any():
        by_hand = np.mean(a[known] * v[known]) - a[known].mean() * v[known].mean()
        assert value == pytest.approx(by_hand, abs=1e-9)
    else:
        assert value is None


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\[N, G\]"):
        ew.advantage_violation_covariance([1.0], [1.0])


def test_autocorrelation_and_variance_agree_with_statsmodels():
    from statsmodels.tsa.stattools import acf

    k, n, steps = np.array([2, 5, 3, 9, 8, 4, 10, 12, 9, 15]), 64, np.arange(0, 100, 10)
    result = ew.slowing_down(steps, k, np.full(10, n), window=10)
    logit = ew.logit_rate(k, n)
    rest = logit - np.polyval(np.polyfit(steps, logit, 1), steps)
    assert result.autocorrelation == pytest.approx([acf(rest, nlags=1)[1]])
    assert result.variance == pytest.approx([rest @ rest / 8])
    assert result.steps.tolist() == [90]
    assert result.autocorrelation_trend is None  # one window has no trend


def test_without_disturbances_the_variance_is_the_noise():
    rng = np.random.default_rng(0)
    k = rng.binomial(400, 1 / (1 + np.exp(-np.linspace(-2, 0, 400))))
    result = ew.slowing_down(np.arange(400), k, np.full(400, 400), window=40)
    assert result.variance.mean() == pytest.approx(result.noise.mean(), rel=0.1)


def test_a_system_that_forgets_ever_more_slowly_shows_it_before_it_tips():
    rng = np.random.default_rng(1)
    level, levels = 0.0, []
    for memory in np.linspace(0.0, 0.98, 600):
        level = memory * level + 0.3 * rng.normal()
        levels.append(level)
    k = rng.binomial(1000, 1 / (1 + np.exp(2 - np.array(levels))))
    rising = ew.slowing_down(np.arange(600), k, np.full(600, 1000), window=150)
    assert (rising.autocorrelation_trend or 0) > 0.6
    assert (rising.variance_trend or 0) > 0.6
    steady = rng.binomial(1000, 1 / (1 + np.exp(2 - 0.3 * rng.normal(size=600))))
    flat = ew.slowing_down(np.arange(600), steady, np.full(600, 1000), window=150)
    assert abs(flat.autocorrelation_trend or 0) < 0.6


def test_flat_short_and_unmeasured_curves():
    flat = ew.slowing_down(np.arange(6), np.zeros(6), np.full(6, 64), window=4)
    assert np.isnan(flat.autocorrelation).all()
    assert flat.variance_trend is None
    short = ew.slowing_down(np.arange(5), np.arange(5), [64, 0, 64, 0, 64], window=4)
    assert len(short.steps) == 0
    with pytest.raises(ValueError, match="at least 4"):
        ew.slowing_down(np.arange(5), np.arange(5), np.full(5, 64), window=3)


def test_lead_time():
    steps, sign = [0, 10, 20, 30], [np.nan, 0.1, 0.5, 0.9]
    assert ew.lead_time(steps, sign, 0.4, 30) == ew.LeadTime(20, 10, False)
    assert ew.lead_time(steps, sign, 0.4, 20) == ew.LeadTime(None, None, False)  # with the tipping itself: no warning
    assert ew.lead_time(steps, sign, 0.4, None) == ew.LeadTime(20, None, True)
    assert ew.lead_time(steps, sign, 2.0, None) == ew.LeadTime(None, None, False)
