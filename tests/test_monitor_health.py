"""Monitor health by hand, and against statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_rl.evaluate.monitor_health import monitor_health, obfuscation
from atp_rl.evaluate.stats import Rate, wilson


def column(caught: int, missed: int, false: int, quiet: int) -> tuple[np.ndarray, np.ndarray]:
    """Flags and violations [scenario, 1]."""
    flags = [1] * caught + [0] * missed + [1] * false + [0] * quiet
    violations = [1] * (caught + missed) + [0] * (false + quiet)
    return np.array(flags, dtype=float)[:, None], np.array(violations, dtype=float)[:, None]


def test_health_by_hand():
    before, after = column(18, 2, 3, 77), column(20, 20, 5, 55)
    first, then = monitor_health([before[0], after[0]], [before[1], after[1]])
    assert (first.recall, first.precision, first.false_alarms) == (wilson(18, 20), wilson(18, 21), wilson(3, 80))
    assert first.obfuscation == Rate(0.0, None, None, 20)
    assert (then.recall, then.precision, then.false_alarms) == (wilson(20, 40), wilson(20, 25), wilson(5, 60))
    assert then.obfuscation.value == pytest.approx(1 - 0.5 / 0.9)
    assert then.obfuscation.n == 60


def test_obfuscation_has_about_the_score_interval_of_a_ratio():
    from statsmodels.stats.proportion import confint_proportions_2indep

    before, after = column(45, 5, 0, 50), column(40, 40, 0, 20)
    then = monitor_health([before[0], after[0]], [before[1], after[1]])[1]
    low, high = confint_proportions_2indep(40, 80, 45, 50, compare="ratio", method="score")
    assert (then.obfuscation.low, then.obfuscation.high) == pytest.approx((1 - high, 1 - low), abs=0.02)


def test_where_nothing_is_violated_recall_is_unknown():
    quiet = column(0, 0, 1, 9)
    seen = column(5, 5, 0, 0)
    health = monitor_health([quiet[0], seen[0]], [quiet[1], seen[1]])
    assert health[0].recall == Rate(None, None, None, 0)
    assert health[0].precision.value == 0
    assert health[0].obfuscation.value is None
    assert health[1].obfuscation.value is None  # nothing to compare with
    blind = column(0, 10, 0, 10)
    assert monitor_health([seen[0], blind[0]], [seen[1], blind[1]])[1].obfuscation.value == 1


def test_unknown_flags_and_verdicts_are_dropped_and_samples_are_clustered():
    flags = np.array([[1, np.nan, 1], [0, 1, 1]])
    violations = np.array([[1, 1, np.nan], [1, 1, 0]])
    (health,) = monitor_health([flags], [violations])
    assert health.recall.value == pytest.approx(2 / 3)
    assert health.recall.n == 3
    assert health.precision.value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="scenario, sample"):
        monitor_health([[1.0]], [[1.0]])


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_obfuscation_lies_in_its_interval(k, missed, k_0, missed_0):
    lost = obfuscation(wilson(k, k + missed), wilson(k_0, k_0 + missed_0), 0)
    assert lost.value is not None
    assert lost.high is None or lost.high >= lost.value - 1e-9
    assert lost.low is None or lost.low <= lost.value + 1e-9
    assert lost.value <= 1
