"""Fronts, hypervolumes and the payoff at a tolerable violation rate: by hand, by brute force, by sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_rl.evaluate import pareto
from atp_rl.evaluate.stats import Rate

coordinate = st.floats(0, 1).map(lambda x: round(x, 2))
point_lists = st.lists(st.tuples(coordinate, coordinate), max_size=25)


def dominates(a, b):
    return a[0] >= b[0] and a[1] >= b[1] and a != b


def test_front_and_hypervolume_by_hand():
    points = [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.4, 0.4), (0.5, 0.5), (math.nan, 1.0), (0.5, 0.2)]
    assert pareto.front(points) == [0, 2, 4, 1]
    # (.5, 1) and (1, .5): the unit square without its upper right quarter
    assert pareto.hypervolume([(0.5, 1.0), (1.0, 0.5), (0.2, 0.2)]) == pytest.approx(0.75)
    assert pareto.hypervolume([]) == 0
    assert pareto.hypervolume([(-0.2, 1.0), (0.5, 0.4)]) == pytest.approx(0.2)  # below the reference adds nothing
    assert pareto.hypervolume([(1.0, 1.0)]) == 1


@given(point_lists)
def test_the_front_is_what_nothing_dominates(points):
    by_hand = {i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)}
    on_front = pareto.front(points)
    assert set(on_front) == by_hand
    assert len(on_front) == len(by_hand)
    assert [points[i][0] for i in on_front] == sorted(points[i][0] for i in on_front)


@given(point_lists, st.tuples(coordinate, coordinate))
def test_hypervolume_grows_with_points_and_is_the_fronts(points, new):
    area = pareto.hypervolume(points)
    assert 0 <= area <= 1
    assert pareto.hypervolume([*points, new]) >= area - 1e-12
    assert pareto.hypervolume([points[i] for i in pareto.front(points)]) == pytest.approx(area)
    assert pareto.hypervolume([(y, x) for x, y in points]) == pytest.approx(area)


def test_hypervolume_is_the_dominated_share_of_random_points():
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.random((6, 2))]
    thrown = rng.random((100_000, 2))
    below = np.any([(thrown <= point).all(axis=1) for point in points], axis=0).mean()
    assert pareto.hypervolume(points) == pytest.approx(below, abs=0.006)


def test_normalised_payoff():
    assert pareto.normalised_payoff(1500, 1000, 2000) == 0.5
    assert pareto.normalised_payoff(900, 1000, 2000) == pytest.approx(-0.1)
    assert pareto.normalised_payoff(900, 1000, 1000) is None


def test_payoff_at_takes_the_best_checkpoint_that_is_tolerable():
    checkpoints = [(0.0, 0.0), (0.05, 0.3), (0.02, 0.2), (0.051, 0.9), (math.nan, 1.0)]
    assert pareto.payoff_at(checkpoints) == 0.3  # the limit itself counts
    assert pareto.payoff_at(checkpoints, 0.01) == 0.0
    assert pareto.payoff_at(checkpoints[3:]) is None


@given(point_lists, coordinate, coordinate)
def test_payoff_at_grows_with_the_limit(points, one, other):
    least, most = sorted((one, other))
    strict, loose = pareto.payoff_at(points, least), pareto.payoff_at(points, most)
    assert strict is None or (loose is not None and strict <= loose)


def test_seeds_without_a_tolerable_checkpoint_are_counted():
    from scipy.stats import ttest_1samp

    runs = [[(0.0, 0.1), (0.5, 1.0)], [(0.04, 0.3)], [(0.05, 0.5), (0.0, 0.2)], [(0.3, 0.9)]]
    result = pareto.payoff_at_interval(runs)
    interval = ttest_1samp([0.1, 0.3, 0.5], 0).confidence_interval()
    assert result.without == 1
    payoff = result.payoff
    assert (payoff.value, payoff.low, payoff.high, payoff.n) == pytest.approx((0.3, interval.low, interval.high, 3))
    never = pareto.payoff_at_interval([[(0.3, 0.9)]])
    assert never == pareto.PayoffAt(Rate(None, None, None, 0), 1)
