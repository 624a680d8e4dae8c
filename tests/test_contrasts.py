"""Contrasts of two arms: by hand, against scipy and statsmodels, published numbers, and simulated arms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_rl.evaluate import contrasts
from atp_rl.evaluate.contrasts import Contrast, PairsNeeded

bits = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
few = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=1, max_size=8)


def ends(result) -> tuple[float, float]:
    assert result.low is not None
    assert result.high is not None
    return result.low, result.high


# Sign flips over seeds.


@given(few)
@settings(max_examples=60, deadline=None)
def test_permutation_is_that_of_all_sign_flips(d):
    flips = np.array(list(itertools.product([-1, 1], repeat=len(d)))) @ np.array(d)
    by_hand = np.mean(np.abs(flips) >= abs(sum(d)) - 1e-9)
    result = contrasts.paired_permutation(d, np.zeros(len(d)))
    assert result.p_value == pytest.approx(by_hand)
    assert result.smallest_p is not None
    assert result.p_value is not None
    assert result.smallest_p <= result.p_value + 1e-12
    assert result.difference == pytest.approx(np.mean(d))


@given(few, few)
@settings(max_examples=40, deadline=None)
def test_swapped_arms_give_the_opposite_difference(a, b):
    a, b = a[: len(b)], b[: len(a)]
    one, other = contrasts.paired_permutation(a, b), contrasts.paired_permutation(b, a)
    assert one.p_value == pytest.approx(other.p_value)
    assert one.difference == pytest.approx(-(other.difference or 0))


@pytest.mark.parametrize(("n", "smallest"), [(5, 0.0625), (6, 0.03125), (8, 0.0078125), (1, 1.0)])
def test_few_seeds_cannot_be_significant_and_the_result_says_so(n, smallest):
    result = contrasts.paired_permutation(np.arange(n) + 1.0, np.zeros(n))
    assert result.p_value == result.smallest_p == smallest


def test_seeds_that_do_not_differ_raise_the_floor():
    assert contrasts.paired_permutation([1, 2, 3, 4, 0], [0] * 5).smallest_p == 0.125
    same = contrasts.paired_permutation([0.5] * 5, [0.5] * 5)
    assert same == Contrast(0.0, None, None, 1.0, 1.0, 5)


def test_the_interval_is_students_and_unknown_where_all_differences_are_alike():
    from scipy.stats import ttest_rel

    a, b = [0.1, 0.4, 0.3, 0.8, 0.2], [0.0, 0.1, 0.2, 0.3, 0.4]
    theirs = ttest_rel(a, b).confidence_interval()
    assert ends(contrasts.paired_permutation(a, b)) == pytest.approx((theirs.low, theirs.high))
    alike = contrasts.paired_permutation([2.0] * 5, [1.0] * 5)
    assert (alike.difference, alike.low, alike.high) == (1.0, None, None)


def test_many_pairs_are_sampled_and_agree_with_the_t_test():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, 40), rng.normal(0, 1, 40)
    result = contrasts.paired_permutation(a, b)
    assert result.p_value == pytest.approx(ttest_rel(a, b).pvalue, abs=0.01)
    assert result == contrasts.paired_permutation(a, b)


def test_missing_seeds_are_dropped_in_pairs():
    full = contrasts.paired_permutation([1.0, 2.0, 4.0], [0.0, 0.5, 0.0])
    assert contrasts.paired_permutation([1.0, np.nan, 2.0, 4.0, 1.0], [0.0, 0.3, 0.5, 0.0, np.nan]) == full
    assert contrasts.paired_permutation([np.nan], [1.0]) == Contrast(None, None, None, None, None, 0)
    with pytest.raises(ValueError, match="pair up"):
        contrasts.paired_permutation([1.0, 2.0], [1.0])


# McNemar.


@given(bits)
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_binomial_test_of_the_discordant_and_symmetric(pairs):
    from scipy.stats import binomtest

    a, b = np.array(pairs).T
    result, mirror = contrasts.mcnemar(a, b), contrasts.mcnemar(b, a)
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    assert result.p_value == mirror.p_value
    assert ends(result) == pytest.approx((-ends(mirror)[1], -ends(mirror)[0]))
    assert result.p_value == pytest.approx(binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1)
    low, high = ends(result)
    assert -1 <= low <= high <= 1
    assert low < (only_a - only_b) / (len(pairs) + 2) < high  # the interval is about the shrunk difference
    assert (result.smallest_p or 0) <= (result.p_value or 0)


def test_mcnemar_by_hand():
    # airway hyper-responsiveness before and after a transplantation (Bentur et al. 2009), the example of Fagerland,
    # Lydersen and Laake (2014): 1 child before only, 7 after only, of 21; both halves: 2 * 9 / 256
    a = [1] * 1 + [0] * 7 + [1] * 1 + [0] * 12
    b = [0] * 1 + [1] * 7 + [1] * 1 + [0] * 12
    result = contrasts.mcnemar(a, b)
    assert result.difference == pytest.approx(-6 / 21)
    assert result.p_value == pytest.approx(2 * 9 / 256)
    # p = 2 / 23 and 8 / 23, standard error sqrt((10 / 23 - (6 / 23) ** 2) / 23)
    assert ends(result) == pytest.approx((-0.508, -0.013), abs=0.001)
    assert result.smallest_p == 2 / 256


def test_mcnemar_takes_zeros_and_ones_and_drops_invalid_pairs():
    assert contrasts.mcnemar([1, np.nan, 0], [0, 1, 0]).n == 2
    with pytest.raises(ValueError, match="0 or 1"):
        contrasts.mcnemar([0.5, 1], [0, 1])


def test_pairs_needed_are_the_known_ones():
    # metrics.md: 155 to 390 pairs for 80 % at discordances (.15, .05) and (.3, .2), which is the asymptotic formula
    assert contrasts.pairs_needed(0.15, 0.05) == PairsNeeded(155, 168)
    assert contrasts.pairs_needed(0.2, 0.3) == PairsNeeded(390, 408)
    with pytest.raises(ValueError, match="differ"):
        contrasts.pairs_needed(0.1, 0.1)


@pytest.mark.parametrize(("n", "enough"), [(168, True), (140, False)])
def test_the_exact_number_of_pairs_has_the_power(n, enough):
    from scipy.stats import binomtest

    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [0.15, 0.05, 0.8], 4000)
    cache = {}
    for a, b, _ in draws:
        cache.setdefault((a, b), binomtest(a, a + b).pvalue < 0.05 if a + b else False)
    power = np.mean([cache[a, b] for a, b, _ in draws])
    assert (power > 0.785) == enough


# Both levels.


def test_two_level_is_min_f_of_the_two_one_way_tests():
    from scipy.stats import f, ttest_1samp

    d = np.random.default_rng(0).normal(0.3, 1, (6, 20))
    by_seed, by_scenario = (float(ttest_1samp(d.mean(axis), 0).statistic) ** 2 for axis in (1, 0))  # pyright: ignore
    # Clark 1973: min F' = F1 F2 / (F1 + F2) with (F1 + F2)^2 / (F1^2 / n2 + F2^2 / n1) degrees of freedom
    min_f = by_seed * by_scenario / (by_seed + by_scenario)
    df = (by_seed + by_scenario) ** 2 / (by_seed**2 / 19 + by_scenario**2 / 5)
    result = contrasts.two_level(d, np.zeros_like(d))
    assert result.p_value == pytest.approx(f.sf(min_f, 1, df))
    assert result.difference == pytest.approx(d.mean())
    assert (ends(result)[0] > 0) == ((result.p_value or 0) < 0.05)


@pytest.mark.parametrize("seed_spread", [0.0, 0.3])
def test_two_level_holds_its_level_and_flipped_cells_would_not(seed_spread):
    rng = np.random.default_rng(0)
    found = cells = 0
    for _ in range(400):
        d = seed_spread * rng.normal(size=(5, 1)) + 0.2 * rng.normal(size=(1, 30)) + 0.5 * rng.normal(size=(5, 30))
        found += (contrasts.two_level(d, 0 * d).p_value or 0) < 0.05
        cells += abs(d.mean()) > 1.96 * np.sqrt((d**2).sum()) / d.size  # what flipping the sign of each cell amounts to
    assert found / 400 < 0.08
    assert cells / 400 > (0.4 if seed_spread else 0.05)


def test_two_level_can_find_what_five_sign_flips_cannot():
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 60)) < 0.6, rng.random((5, 60)) < 0.3
    assert (contrasts.two_level(a, b).p_value or 1) < 0.01
    assert contrasts.paired_permutation(a.mean(1), b.mean(1)).p_value == 0.0625


def test_two_level_without_variation_or_data():
    assert contrasts.two_level(np.ones((3, 4)), np.zeros((3, 4))) == Contrast(1.0, None, None, None, 0.0, 12)
    assert contrasts.two_level([[np.nan]], [[1.0]]).difference is None
    one_seed = contrasts.two_level([[0.0, 1.0, 0.0, 0.5]], np.zeros((1, 4)))
    from scipy.stats import ttest_1samp

    assert one_seed.p_value == pytest.approx(ttest_1samp([0.0, 1.0, 0.0, 0.5], 0).pvalue)  # pyright: ignore
    with pytest.raises(ValueError, match=r"\[seed, scenario\]"):
        contrasts.two_level([1.0], [0.0])


# Several contrasts, and unpaired comparison.


def test_holm_by_hand():
    # times 3, 2, 1 from the smallest on, and never below an earlier one
    assert contrasts.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert contrasts.holm([]) == []
    assert contrasts.holm([0.5]) == [0.5]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
@settings(max_examples=15, deadline=None)  # statsmodels collects garbage in each call
def test_holm_lies_between_no_correction_and_bonferroni(p_values):
    for p, corrected in zip(p_values, contrasts.holm(p_values), strict=True):
        assert p - 1e-12 <= corrected <= min(1, len(p_values) * p) + 1e-12


@given(few, few)
@settings(max_examples=60, deadline=None)
def test_improvement_counts_pairs_mirrors_and_holds_its_value(a, b):
    rate, mirror = contrasts.probability_of_improvement(a, b), contrasts.probability_of_improvement(b, a)
    by_hand = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert rate.value == pytest.approx(by_hand)
    low, high = ends(rate)
    assert 0 <= low <= by_hand + 1e-9
    assert by_hand - 1e-9 <= high <= 1
    assert (low, high) == pytest.approx((1 - ends(mirror)[1], 1 - ends(mirror)[0]), abs=1e-6)


def test_arms_that_do_not_overlap_are_not_certain():
    rate = contrasts.probability_of_improvement([1, 2, 3, 4, 5], [0] * 5)
    assert rate.value == 1
    assert ends(rate) == pytest.approx((0.643, 1), abs=0.001)  # Newcombe's equation at 1 and 5 against 5
    assert contrasts.probability_of_improvement([], [1.0]).value is None
