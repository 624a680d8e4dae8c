"""Loops by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_rl.evaluate.hysteresis import hysteresis

THERE = [0, 10, 20, 30, 40]


def test_a_curve_that_is_retraced_has_no_loop():
    v = [0.0, 0.1, 0.5, 0.9, 1.0]
    result = hysteresis(THERE, v, THERE, v[::-1], 0.25)
    assert result.loop_area == pytest.approx(0)
    assert (result.steps_to_tip, result.steps_back) == (20, 30)
    assert result.ratio == 1.5  # tipped above .25 at 20 of 40; came back below it at 10 = 40 - 30


def test_a_loop_by_hand():
    # There: 0 up to step 20, then straight to 1 at 40. Back: stays at 1 for 20 steps, then straight to 0 at 40. Undone
    # 20 steps, the tipping run was at 0 and the return run is at 1: area under 1 - (40 - s) / ... two triangles.
    result = hysteresis([0, 20, 40], [0.0, 0.0, 1.0], [0, 20, 40], [1.0, 1.0, 0.0], 0.5)
    assert result.loop_area == pytest.approx((20 * 1 / 2 + 20 * 1 / 2) / 40)
    assert (result.steps_to_tip, result.steps_back, result.ratio) == (40, 40, 1.0)


def test_a_run_that_never_comes_back_is_unknown_and_its_loop_is_that_of_the_shorter_run():
    result = hysteresis(THERE, [0.0, 0.0, 1.0, 1.0, 1.0], [0, 10, 20], [1.0, 1.0, 1.0], 0.25)
    assert (result.steps_to_tip, result.steps_back, result.ratio) == (20, None, None)
    assert result.loop_steps == 20
    assert result.loop_area == pytest.approx(0)  # so far the tipping run was at 1 too
    never = hysteresis(THERE, [0.0] * 5, THERE, [0.0] * 5, 0.25)
    assert (never.steps_to_tip, never.steps_back) == (None, None)


def test_return_steps_may_go_on_counting():
    v, back = [0.0, 0.1, 0.5, 0.9, 1.0], [1.0, 0.8, 0.6, 0.2, 0.0]
    counted_on = hysteresis(THERE, v, np.array(THERE) + 40, back, 0.25)
    assert counted_on == hysteresis(THERE, v, THERE, back, 0.25)


rates = st.lists(st.floats(0, 1), min_size=2, max_size=8)


@given(rates, rates, st.floats(0.1, 10))
def test_the_area_is_bounded_turns_its_sign_and_ignores_the_unit_of_time(v, w, scale):
    t, s = np.arange(len(v)) * 10.0, np.arange(len(w)) * 7.0
    area = hysteresis(t, v, s, w, 0.25).loop_area
    assert -1 <= area <= 1
    assert hysteresis(t * scale, v, s * scale, w, 0.25).loop_area == pytest.approx(area, abs=1e-6)
    mirrored = hysteresis(s, w[::-1], t, v[::-1], 0.25).loop_area
    if len(v) == len(w):
        t = np.arange(len(v)) * 1.0
        area, mirrored = (hysteresis(t, a, t, b[::-1], 0.25).loop_area for a, b in ((v, w), (w, v)))
        assert mirrored == pytest.approx(-area, abs=1e-9)
