"""Known answers, agreement with scipy, statsmodels and lifelines, and simulated curves whose truth is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_rl.evaluate import stats
from atp_rl.evaluate.stats import Crossing, Rate
from atp_rl.types import Verdict

STEPS = list(range(0, 200, 10))  # 20 checkpoints
shares = st.floats(0, 1)
bits = st.sampled_from([0.0, 1.0])
grids = st.integers(1, 6).flatmap(  # one seed: [scenario, sample]
    lambda samples: st.lists(st.lists(bits | st.just(np.nan), min_size=samples, max_size=samples), min_size=1)
)


def ends(rate: Rate) -> tuple[float, float]:
    assert rate.low is not None
    assert rate.high is not None
    return rate.low, rate.high


def holds(rate: Rate, truth: float) -> bool:
    low, high = ends(rate)
    return low <= truth <= high


def width(rate: Rate) -> float:
    low, high = ends(rate)
    return high - low


# Rates and intervals.


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 64, 0.000, 0.057),
        (3, 64, 0.016, 0.129),
        (16, 64, 0.160, 0.368),  # the "16 to 37 %" of metrics.md
        (0, 160, 0.000, 0.023),
        (0, 350, 0.000, 0.011),
    ],
)
def test_wilson_gives_the_known_answers(k, n, low, high):
    assert ends(stats.wilson(k, n)) == pytest.approx((low, high), abs=0.0005)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=50, deadline=None)
def test_wilson_agrees_with_statsmodels_contains_its_value_and_mirrors(kn):
    from statsmodels.stats.proportion import proportion_confint

    k, n = kn
    rate, mirror = stats.wilson(k, n), stats.wilson(n - k, n)
    assert ends(rate) == pytest.approx(proportion_confint(k, n, alpha=0.05, method="wilson"), abs=1e-9)
    assert ends(mirror) == pytest.approx((1 - ends(rate)[1], 1 - ends(rate)[0]), abs=1e-9)
    assert holds(rate, k / n)
    assert rate.n == n


def test_nothing_measured_is_none_and_not_zero():
    nothing = Rate(None, None, None, 0)
    assert stats.wilson(0, 0) == nothing
    assert stats.cluster_rate([]) == nothing
    assert stats.cluster_rate([[[np.nan, np.nan]]]) == nothing
    assert stats.decay([np.nan], [0.5]) == nothing
    assert stats.verdict_rates([]) == stats.VerdictRates(nothing, nothing, nothing, (None, None))


def test_one_seed_with_one_sample_per_scenario_is_wilson():
    one_sample = np.array([[1.0]] * 3 + [[0.0]] * 61)
    assert stats.cluster_rate([one_sample]) == stats.wilson(3, 64)
    # Of two samples one is missing everywhere: the same.
    assert stats.cluster_rate([np.hstack([one_sample, np.full((64, 1), np.nan)])]) == stats.wilson(3, 64)


def test_one_seed_with_several_samples_is_the_bca_bootstrap_over_scenarios():
    from scipy.stats import bootstrap

    x = np.random.default_rng(0).binomial(1, 0.3, (40, 4)) * np.random.default_rng(1).binomial(1, 0.5, (40, 1))
    theirs = bootstrap((x.mean(axis=1),), np.mean, rng=np.random.default_rng(5)).confidence_interval
    rate = stats.cluster_rate([x])
    assert rate.value == pytest.approx(x.mean())
    assert rate.n == 160
    assert ends(rate) == pytest.approx(tuple(theirs), abs=0.01)


def test_copies_of_a_sample_add_no_certainty():
    x = np.random.default_rng(0).binomial(1, 0.3, (60, 1))
    copied = stats.cluster_rate([np.repeat(x, 8, axis=1)])
    assert width(copied) == pytest.approx(width(stats.wilson(int(x.sum()), 60)), rel=0.1)


def test_copies_of_a_seed_add_no_certainty():
    x = np.random.default_rng(0).binomial(1, 0.3, (60, 4))
    assert width(stats.cluster_rate([x] * 5)) == pytest.approx(width(stats.cluster_rate([x])), rel=0.1)


def test_seeds_that_tip_or_do_not_leave_the_rate_uncertain():
    two_of_five = [np.full((200, 4), seed < 2) for seed in range(5)]
    rate = stats.cluster_rate(two_of_five)
    assert rate.value == pytest.approx(0.4)
    assert holds(rate, 0.1)
    assert holds(rate, 0.8)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("seeds", [1, 3])
def test_where_all_decisions_agree_wilson_counts_the_distinct_scenarios(value, seeds):
    rate = stats.cluster_rate([np.full((160, 4), value)] * seeds)
    wilson = stats.wilson(160 * value, 160)
    assert rate == Rate(float(value), wilson.low, wilson.high, 640 * seeds)


def test_ragged_seeds_are_weighted_by_decision():
    # 2 of 4, and 1 of 2 with a row less, a column more and a NaN: 3 of 6.
    rate = stats.cluster_rate([[[0, 1], [1, 0]], [[1, 0, np.nan]]])
    assert rate.value == 0.5
    assert rate.n == 6


@given(st.lists(grids, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_a_cluster_interval_holds_its_value_within_0_and_1_and_repeats(x):
    rate = stats.cluster_rate(x)
    if rate.value is not None:
        low, high = ends(rate)
        assert 0 <= low <= rate.value <= high <= 1
    assert rate == stats.cluster_rate(x)
    decisions = np.concatenate([np.ravel(seed) for seed in x])
    assert rate.n == np.isfinite(decisions).sum()


def test_order_of_seeds_scenarios_and_samples_does_not_matter():
    rng = np.random.default_rng(0)
    x = rng.random((4, 50, 4)) < rng.random((4, 50, 1))
    rate = stats.cluster_rate(list(x))
    shuffled = stats.cluster_rate(list(x[rng.permutation(4)][:, rng.permutation(50)][:, :, rng.permutation(4)]))
    assert shuffled.value == rate.value
    assert ends(shuffled) == pytest.approx(ends(rate), abs=0.02)


@pytest.mark.parametrize(("seeds", "scenarios", "seed_spread"), [(1, 64, 0.0), (5, 40, 0.0), (5, 40, 1.0)])
def test_cluster_intervals_cover_the_truth(seeds, scenarios, seed_spread, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 1999)
    rng = np.random.default_rng(0)

    def propensity(rows, columns):
        spread = seed_spread * rng.normal(size=(rows, 1)) + rng.normal(size=(1, columns))
        return 1 / (1 + np.exp(1 - spread))

    truth = float(np.mean([propensity(1000, 1000).mean() for _ in range(5)]))
    hits = 0
    for _ in range(300):
        x = rng.random((seeds, scenarios, 4)) < propensity(seeds, scenarios)[:, :, None]
        hits += holds(stats.cluster_rate(list(x)), truth)
    assert 0.90 <= hits / 300 <= 0.99


def test_several_seeds_have_the_two_way_clustered_variance():
    from scipy.stats import t

    rng = np.random.default_rng(0)
    x = rng.random((6, 30, 1)) < 0.3 + 0.2 * rng.normal(size=(6, 1, 1)) + 0.1 * rng.normal(size=(1, 30, 1))
    cells = x[:, :, 0].astype(float)
    # mean squares of the two-way layout: rows / (R C) + columns / (R C) - rest / (R C)
    rate = cells.mean()
    by_seed, by_scenario = cells.mean(1).var(ddof=1) / 6, cells.mean(0).var(ddof=1) / 30
    rest = cells - cells.mean(1, keepdims=True) - cells.mean(0) + rate
    own = (rest**2).sum() / (5 * 29) / 180
    variance = by_seed + by_scenario - own
    assert variance > max(by_seed, by_scenario)
    df = variance**2 / (by_seed**2 / 5 + by_scenario**2 / 29 + own**2 / (5 * 29))
    q, n = t.ppf(0.975, df), rate * (1 - rate) / variance
    centre, margin = rate + q**2 / (2 * n), q * np.sqrt(rate * (1 - rate) / n + q**2 / (4 * n**2))
    expected = ((centre - margin) / (1 + q**2 / n), (centre + margin) / (1 + q**2 / n))
    assert ends(stats.cluster_rate(list(x))) == pytest.approx(expected)


def test_a_single_scenario_tells_of_seeds_alone():
    rate = stats.cluster_rate([[[0, 0, 1]], [[1, 1, 1]], [[0, 1, 0]]])
    assert rate.value == pytest.approx(5 / 9)
    assert width(rate) > 0.5


# Verdicts, decay, retention, benefit.


def test_invalid_decisions_are_counted_each_way():
    few: list[Verdict] = ["violation", "violation", "invalid", "invalid", "invalid"]
    rates = stats.verdict_rates([*few, "compliance", "compliance", "compliance", "compliance", "compliance"])
    assert rates.violation == stats.wilson(2, 10)
    assert rates.compliance == stats.wilson(5, 10)
    assert rates.invalid == stats.wilson(3, 10)
    assert rates.violation_bounds == (0.2, 0.5)


def test_an_unknown_verdict_is_an_error():
    with pytest.raises(ValueError, match="unknown verdict"):
        stats.verdict_rates(["violation", "maybe"])  # pyright: ignore[reportArgumentType]


@given(st.lists(st.sampled_from(["violation", "compliance", "invalid"]), min_size=1))
@settings(max_examples=30, deadline=None)
def test_verdict_rates_sum_to_one_in_any_order(verdicts: list[Verdict]):
    rates = stats.verdict_rates(verdicts)
    values = [rate.value for rate in (rates.violation, rates.compliance, rates.invalid)]
    assert sum(v for v in values if v is not None) == pytest.approx(1)
    assert rates == stats.verdict_rates(verdicts[::-1])


def test_decay_is_paired():
    rng = np.random.default_rng(0)
    v_0 = rng.random(100) * 0.8
    v_k = v_0 + 0.1 + rng.normal(0, 0.01, 100)  # every scenario rises by .1, whatever its level
    rate = stats.decay(v_k, v_0)
    assert rate.value == pytest.approx(0.1, abs=0.01)
    assert width(rate) < 0.01
    assert rate.n == 100
    order = rng.permutation(100)
    assert stats.decay(v_k[order], v_0[order]) == rate


def test_decay_is_scipys_bca_and_close_to_the_t_interval():
    from scipy.stats import ttest_1samp

    rng = np.random.default_rng(1)
    differences = rng.choice([-0.25, 0, 0.25, 0.5], 200)
    theirs = ttest_1samp(differences, 0).confidence_interval()
    assert ends(stats.decay(differences, np.zeros(200))) == pytest.approx(tuple(theirs), abs=0.01)


def test_decay_without_variation_stays_uncertain():
    unseen = stats.wilson(0, 20).high
    assert unseen is not None
    assert stats.decay([0.5] * 20, [0.5] * 20) == Rate(0, -unseen, unseen, 20)
    assert stats.decay([1.0, np.nan], [0.0, 0.0]).high == 1.0  # one pair, at the edge


def test_retention_and_alignment_benefit():
    assert stats.retention(v_k=0.4, v_0=0.2) == pytest.approx(0.75)
    assert stats.retention(v_k=0.4, v_0=1) is None
    # The benefit was .8 - .1 = .7; at k it is .9 - .55 = .35.
    assert stats.alignment_benefit_left(0.9, 0.55, 0.8, 0.1) == pytest.approx(0.5)
    assert stats.alignment_benefit_left(0.9, 0.55, 0.1, 0.1) is None


# Curves.


def test_area_under_the_curve():
    assert stats.auvc([0, 10, 20], [0, 0, 1]) == pytest.approx(0.25)
    assert stats.auvc([0, 10, 30], [0, 1, 1]) == pytest.approx(25 / 30)  # uneven steps
    with pytest.raises(ValueError, match="increase"):
        stats.auvc([0, 10, 10], [0, 0, 1])
    with pytest.raises(ValueError, match="at least two"):
        stats.auvc([0], [0])


@given(st.lists(st.tuples(st.integers(1, 50), shares), min_size=2, max_size=20), st.integers(1, 9))
@settings(max_examples=50)
def test_area_lies_between_the_rates_and_ignores_the_unit_of_time(gaps_and_rates, scale):
    gaps, rates = zip(*gaps_and_rates, strict=True)
    steps = np.cumsum(gaps)
    area = stats.auvc(steps, rates)
    assert min(rates) - 1e-9 <= area <= max(rates) + 1e-9
    assert stats.auvc(steps * scale + 7, rates) == pytest.approx(area)


def test_half_life_finds_erosion():
    t, rng = np.array(STEPS) + 50, np.random.default_rng(0)  # the first checkpoint need not be step 0
    compliance = 0.3 + (0.95 - 0.3) * 2 ** (-(t - 50) / 40)
    fit = stats.half_life(t, rng.binomial(800, 1 - compliance), 800)
    assert fit.kind == "erosion"
    assert fit.half_life == pytest.approx(40, rel=0.1)
    assert (fit.c_0, fit.c_inf) == (pytest.approx(0.95, abs=0.03), pytest.approx(0.3, abs=0.03))
    assert fit.erosion_aic < min(fit.tipping_aic, fit.constant_aic)


def test_half_life_finds_tipping():
    t, rng = np.array(STEPS), np.random.default_rng(0)
    violation = 0.8 / (1 + np.exp(-(t - 120) / 8))
    fit = stats.half_life(t, rng.binomial(800, violation), np.full(20, 800))
    assert fit.kind == "tipping"
    assert fit.t50 == pytest.approx(120, abs=3)
    assert fit.width == pytest.approx(8, rel=0.15)
    assert fit.v_inf == pytest.approx(0.8, abs=0.03)


def test_half_life_locates_a_jump_between_its_checkpoints():
    fit = stats.half_life(STEPS, [0] * 12 + [64] * 8, 64)
    assert fit.kind == "tipping"
    assert 110 < fit.t50 < 120


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
def test_half_life_of_a_constant_rate_is_none(rate):
    kinds = [stats.half_life(STEPS, np.random.default_rng(i).binomial(64, rate, 20), 64).kind for i in range(8)]
    assert kinds.count("none") >= 7


def test_fits_are_no_worse_than_a_global_search_and_aic_is_statsmodels_for_a_constant():
    import statsmodels.api as sm
    from scipy.optimize import differential_evolution
    from scipy.stats import binom

    t, n = np.array(STEPS), np.full(20, 64)
    k = np.random.default_rng(3).binomial(n, 1 - (0.2 + 0.7 * 2 ** (-t / 30)))
    fit = stats.half_life(t, k, n)

    def loss(p):
        compliance = p[0] * (p[1] + (1 - p[1]) * 2 ** (-t / p[2]))
        return -binom.logpmf(k, n, np.clip(1 - compliance, 1e-9, 1 - 1e-9)).sum()

    best = differential_evolution(loss, [(0, 1), (0, 1), (1, 1900)], rng=0).fun
    coefficient = binom.logpmf(k, n, k / n).sum() - stats._log_likelihood(k, n, k / n).sum()
    assert fit.erosion_aic <= 6 + 2 * (best + coefficient) + 0.1
    glm = sm.GLM(np.column_stack([k, n - k]), np.ones(20), family=sm.families.Binomial()).fit()
    assert fit.constant_aic == pytest.approx(glm.aic + 2 * coefficient)


def test_time_to_threshold_is_the_first_lower_bound_above_it():
    assert stats.time_to_threshold([0, 10, 20, 30], [0.0, None, 0.26, 0.1], 0.25) == Crossing(20, 30)
    assert stats.time_to_threshold([0, 10, 20], [0.0, 0.1, 0.25], 0.25) == Crossing(None, 20)


def test_survival_by_hand():
    # Crossings at 30 and 50 and one run censored at 100: 1 until 30, 2/3 until 50, then 1/3. The second run was watched
    # until 80 only, so RMST stops there: 30 + 20 * 2/3 + 30 * 1/3.
    result = stats.survival([Crossing(30, 100), Crossing(50, 80), Crossing(None, 100)])
    assert result.times.tolist() == [0, 30, 50, 100]
    assert result.survival == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])
    assert result.horizon == 80
    assert result.rmst == pytest.approx(30 + 20 * 2 / 3 + 30 / 3)


def test_runs_that_never_cross_have_the_horizon_as_their_mean():
    assert stats.survival([Crossing(None, 200)] * 5).rmst == pytest.approx(200)


@given(st.lists(st.tuples(st.integers(1, 100), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_survival_agrees_with_scipy_in_any_order(runs):
    from scipy.stats import CensoredData, ecdf

    crossings = [Crossing(step, 100) if crossed else Crossing(None, step) for step, crossed in runs]
    result = stats.survival(crossings)
    theirs = ecdf(
        CensoredData([s for s, crossed in runs if crossed], right=[s for s, crossed in runs if not crossed])
    ).sf
    assert result.survival == pytest.approx(theirs.evaluate(result.times))
    assert np.array_equal(result.survival, stats.survival(crossings[::-1]).survival)
    assert 0 <= result.rmst <= result.horizon


@given(st.lists(st.tuples(st.integers(1, 150), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_rmst_interval_is_about_the_kaplan_meier_mean(runs):
    crossings = [Crossing(step if crossed else None, 150) for step, crossed in runs]
    rate = stats.rmst_interval(crossings, 150)
    assert rate.value == pytest.approx(stats.survival(crossings).rmst)
    low, high = ends(rate)
    assert 0 <= low <= (rate.value or 0) + 1e-9
    assert (rate.value or 0) - 1e-9 <= high <= 150 + 1e-9
    early = stats.rmst_interval(crossings, 40)  # what came later than the horizon had not come by then
    assert early.value == pytest.approx(np.mean([min(c.step or 40, 40) for c in crossings]))


def test_rmst_interval_by_hand_and_variance_as_in_lifelines():
    from lifelines import KaplanMeierFitter
    from lifelines.utils import restricted_mean_survival_time
    from scipy.stats import t

    steps = [30, 50, 70, 100, 100]
    crossings = [Crossing(s if s < 100 else None, 100) for s in steps]
    fitted = KaplanMeierFitter().fit(steps, [s < 100 for s in steps])
    mean, of_one = restricted_mean_survival_time(fitted, t=100, return_variance=True)  # pyright: ignore
    variance = of_one / 4  # of the mean of five: that of one run, with n - 1 for n
    assert variance == pytest.approx(np.var(steps, ddof=1) / 5)
    rate = stats.rmst_interval(crossings, 100)
    assert rate.value == pytest.approx(mean)
    # both ends m solve (70 - m)^2 = q^2 variance m (100 - m) / (70 (100 - 70))
    q = t.ppf(0.975, 4)
    for end in ends(rate):
        assert (70 - end) ** 2 == pytest.approx(q**2 * variance * end * (100 - end) / (70 * 30))


def test_rmst_of_seeds_that_agree_stays_uncertain():
    unseen = stats.wilson(0, 5).high or 0
    never = stats.rmst_interval([Crossing(None, 200)] * 5, 200)
    assert (never.value, *ends(never), never.n) == pytest.approx((200, 200 * (1 - unseen), 200, 5))
    alike = stats.rmst_interval([Crossing(50, 200)] * 5, 200)
    assert ends(alike) == pytest.approx((50 * (1 - unseen), 50 * (1 - unseen) + 200 * unseen))
    assert stats.rmst_interval([], 200) == Rate(None, None, None, 0)


def test_rmst_beyond_what_was_watched_is_an_error():
    with pytest.raises(ValueError, match="step 80 only"):
        stats.rmst_interval([Crossing(None, 80), Crossing(None, 100)], 100)
    assert stats.rmst_interval([Crossing(30, 80), Crossing(None, 100)], 100).value == 65  # its crossing was seen


# Tipping points.


def test_tipping_point_finds_the_first_checkpoint_after_it():
    k = np.random.default_rng(0).binomial(64, [0.02] * 12 + [0.6] * 8)
    tipping = stats.tipping_point(STEPS, k, [64] * 20)
    assert tipping.step == STEPS[12]
    assert tipping.p_value == 1 / 1000  # none of 999 simulations did as well
    assert tipping.rate_before == stats.wilson(int(k[:12].sum()), 12 * 64)
    assert tipping.rate_after == stats.wilson(int(k[12:].sum()), 8 * 64)
    assert tipping == stats.tipping_point(STEPS, k, [64] * 20)


def test_likelihood_ratio_by_hand():
    # 0 of 2 in two checkpoints, then 2 of 2 in two: two rates explain all (log-likelihood 0), one rate 8 log(1/2).
    assert stats.tipping_point(range(4), [0, 0, 2, 2], [2] * 4).likelihood_ratio == pytest.approx(8 * np.log(2))


def test_a_fall_is_significant_and_no_tipping_point():
    tipping = stats.tipping_point(STEPS, [40] * 10 + [2] * 10, [64] * 20)
    assert tipping.step is None
    assert tipping.p_value == 1 / 1000


@pytest.mark.parametrize("k", [0, 64])
def test_a_flat_curve_has_no_tipping_point(k):
    tipping = stats.tipping_point(STEPS, [k] * 20, [64] * 20)
    assert (tipping.step, tipping.p_value) == (None, 1)
    assert tipping.likelihood_ratio == pytest.approx(0)


def test_fewer_than_four_measured_checkpoints_tell_nothing():
    tipping = stats.tipping_point([0, 1, 2, 3], [0, 0, 0, 64], [64, 64, 0, 64])
    assert (tipping.step, tipping.likelihood_ratio, tipping.p_value) == (None, None, None)


def test_null_of_twenty_checkpoints_is_the_known_one():
    # metrics.md: "20 checkpoints: LR 3.85 at 95 %" is the log-likelihood ratio; doubled it would be near 8.
    n = np.full(20, 200)
    gains = stats._best_split(np.random.default_rng(0).binomial(n, 0.2, size=(5000, 20)), n)[1]
    assert np.quantile(gains, 0.95) == pytest.approx(3.85, abs=0.25)


def test_p_values_of_constant_curves_are_uniform():
    rng = np.random.default_rng(0)
    results = [stats.tipping_point(STEPS, rng.binomial(64, 0.2, 20), [64] * 20, rng_seed=i) for i in range(300)]
    below = np.mean([result.p_value is not None and result.p_value < 0.05 for result in results])
    assert 0.02 <= below <= 0.09
    assert np.mean([result.step is not None for result in results]) <= 0.06  # only the rises among them


# Seeds.


def test_interquartile_mean_by_hand():
    assert stats.interquartile_mean([100, 1, 2, 3, -50]) == pytest.approx(2)  # five seeds: the middle three
    assert stats.interquartile_mean([0, 1, 2, 9]) == pytest.approx(1.5)
    assert stats.interquartile_mean([7]) == 7


@given(st.lists(shares, min_size=1), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_interquartile_mean_lies_in_the_data_in_any_order(values, random):
    mean = stats.interquartile_mean(values)
    assert min(values) - 1e-9 <= mean <= max(values) + 1e-9
    shuffled = random.sample(values, len(values))
    assert stats.interquartile_mean(shuffled) == pytest.approx(mean)


@given(st.lists(shares, min_size=1, max_size=8), st.floats(0.5, 200))
def test_a_bounded_mean_scales_mirrors_and_keeps_within_its_bounds(values, most):
    rate = stats.bounded_mean(values, 1)
    low, high = ends(rate)
    assert 0 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= 1 + 1e-12
    scaled, mirror = stats.bounded_mean(np.array(values) * most, most), stats.bounded_mean(1 - np.array(values), 1)
    assert ends(scaled) == pytest.approx((low * most, high * most), abs=1e-6)
    assert ends(mirror) == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_iqm_interval_is_scipys_bootstrap_with_its_tails_moved_out(monkeypatch):
    from scipy.stats import bootstrap, norm, t, trim_mean

    x = np.random.default_rng(0).random(12)
    monkeypatch.setattr(stats, "RESAMPLES", 49_999)
    rate = stats.iqm_interval({"role_play": x})
    assert rate.value == pytest.approx(stats.interquartile_mean(x))
    level = 1 - 2 * float(norm.cdf(np.sqrt(12 / 11) * t.ppf(0.025, 11)))
    theirs = bootstrap(
        (x,), lambda v, axis: trim_mean(v, 0.25, axis=axis), method="percentile", confidence_level=level, rng=1
    ).confidence_interval  # fmt: skip
    assert ends(rate) == pytest.approx(tuple(theirs), abs=0.02)


def test_strata_are_resampled_apart():
    rng = np.random.default_rng(0)
    near = [rng.normal(0, 0.01, 6), rng.normal(1, 0.01, 6)]
    apart = stats.iqm_interval(near)
    mixed = stats.iqm_interval([np.concatenate(near)])
    assert apart.value == mixed.value
    # within strata half of the values are always near 0 and half near 1, so that the middle half holds both alike
    assert width(apart) < 0.1 < width(mixed)
    assert stats.iqm_interval({"a": near[0], "b": near[1]}) == apart


def test_few_or_equal_seeds_have_the_mean_or_no_interval():
    assert stats.iqm_interval([[0.1, 0.5, 0.3]]) == stats.seed_mean([0.1, 0.5, 0.3])
    assert stats.iqm_interval([[0.5] * 5]) == Rate(0.5, None, None, 5)
    assert stats.iqm_interval([[0.5], [0.1, 0.2, 0.3]]).low is None  # one seed of a testbed tells of no others
    assert stats.iqm_interval([[np.nan]]) == Rate(None, None, None, 0)


@given(st.lists(st.lists(shares, min_size=2, max_size=6), min_size=2, max_size=3))
@settings(max_examples=30, deadline=None)
def test_an_iqm_interval_lies_in_the_data_and_repeats(values):
    rate = stats.iqm_interval(values)
    if rate.low is not None:
        low, high = ends(rate)
        assert min(map(min, values)) - 1e-9 <= low <= high <= max(map(max, values)) + 1e-9
    assert rate == stats.iqm_interval(values)


def test_seed_mean_is_students():
    from scipy.stats import sem, t

    x = [0.1, 0.4, 0.2, np.nan]
    rate = stats.seed_mean(x)
    mean, margin = 0.7 / 3, t.ppf(0.975, 2) * sem(x[:3])
    assert (rate.value, *ends(rate), rate.n) == pytest.approx((mean, mean - margin, mean + margin, 3))
    assert stats.seed_mean([0.3]) == Rate(0.3, None, None, 1)
    assert stats.seed_mean([]) == Rate(None, None, None, 0)


def test_import_is_fast_because_it_is_lazy():
    code = (
        "import sys, atp_rl.evaluate.stats; print({'scipy', 'statsmodels', 'lifelines', 'pandas'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
