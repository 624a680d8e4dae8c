"""Intervals hold a known truth about as often as they say: some of `python -m tests.benchmarks.coverage`, fewer times.

Its whole table, with 1,000 repetitions, is in `docs/statistics.md`.
"""

from __future__ import annotations

import pytest

from tests.benchmarks.coverage import Case, Row, monitor, paired_scenarios, paired_seeds, run, table

CASES = [case for part in (paired_scenarios, paired_seeds, monitor) for case in part() if not case.slow]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.measure}, {case.population}")
def test_an_interval_holds_the_truth(case: Case):
    row = run(case, 200)
    tipping = "tip" in case.population
    assert (0.8 if tipping else 0.9) <= row.coverage <= 1  # .95 is held 200 times with a standard error of .015
    assert row.unknown < 0.3 if tipping else row.unknown == 0
    if case.truth == 0 and row.rejections is not None:
        assert row.rejections <= 0.09


def test_a_row_counts_what_was_held_and_what_was_unknown():
    from atp_rl.evaluate.contrasts import Contrast

    draws = iter([(0.0, 1.0, 0.01), (0.6, 1.0, 0.5), (None, None, 1.0), (0.4, 0.5, 0.04)])

    def draw(_):
        low, high, p = next(draws)
        return Contrast(0.5, low, high, p, 0.0, 5)

    row = run(Case("m", "p", 0.5, draw), 4)
    assert row == Row("m", "p", 0.5, pytest.approx(2 / 3), 0.25, pytest.approx(0.5), 0.5)  # pyright: ignore
    assert table([row]).splitlines()[-1] == "| m | p | 0.5 | 0.667 (25% unknown) | 0.5 | 0.500 |"
