"""Signs of tipping before the violation rate shows it: `docs/statistics.md` item 8, pure functions on arrays.

Two of them look at a training batch: the covariance of advantage and violation is the very push that the update gives,
and groups that hold both violations and compliance are the only ones that can push. Two look at the curve: near a
tipping point a system forgets disturbances slowly, so that what fluctuates about the trend grows and lasts ("critical
slowing down", Scheffer et al. 2009, Nature 461:53; Dakos et al. 2012, PLoS ONE 7:e41010). scipy is imported where it is
used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from atp_rl.evaluate.stats import Rate, wilson


@dataclass(frozen=True, eq=False)
class Slowing:
    """Rolling signs of a curve, one for each window [w]; NaN where a window does not vary about its trend."""

    steps: np.ndarray
    """Of each window's last checkpoint."""
    autocorrelation: np.ndarray
    """Lag-1, of logit v about the window's line. Short windows bias it down (by about 1 / window and more)."""
    variance: np.ndarray
    """Of logit v about the window's line."""
    noise: np.ndarray
    """What of the variance the finite number of decisions alone makes."""
    autocorrelation_trend: float | None
    """Kendall's tau of the sign with time, from -1 to 1. Windows overlap, so it has no p-value of its own."""
    variance_trend: float | None


@dataclass(frozen=True)
class LeadTime:
    """How early a sign raised an alarm; None where it did not, or where nothing tipped."""

    alarm: int | None
    """The first step at which the sign was above its limit (before the tipping step, where there is one)."""
    lead: int | None
    """Steps from the alarm to the tipping step."""
    false_alarm: bool
    """An alarm although nothing tipped."""


def advantage_violation_covariance(advantages: ArrayLike, violations: ArrayLike) -> float | None:
    """Mean of advantage x (violation - its group's mean) over a batch: the first-order push to violate.

    With group-normalised advantages that payoff alone decides, a group with k violators of G adds
    sqrt(k (G - k) (G - 1) / G^3), the push of `docs/prediction.md`. Positive pushes up, 0 is no push.

    Args:
        advantages: [N, G], as the update uses them.
        violations: [N, G], 0 or 1, or an episode's share of violations; NaN (invalid) is dropped.

    Returns:
        None without any pair.
    """
    a, v = np.asarray(advantages, dtype=float), np.asarray(violations, dtype=float)
    if a.ndim != 2 or a.shape != v.shape:
        raise ValueError(f"advantages and violations must both be [N, G], got {a.shape} and {v.shape}")
    known = np.isfinite(a) & np.isfinite(v)
    if not known.any():
        return None
    mean = np.where(known, v, 0).sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
    return float(np.where(known, a * (v - mean), 0).sum() / known.sum())


def mixed_groups(violations: ArrayLike) -> Rate:
    """Share of groups whose members do not all do the same; violations [N, G] as above, groups of NaN are dropped."""
    v = np.asarray(violations, dtype=float)
    v = v[np.isfinite(v).any(axis=1)]
    mixed = np.nanmax(v, axis=1) > np.nanmin(v, axis=1) if len(v) else np.zeros(0)
    return wilson(int(mixed.sum()), len(v))


def logit_rate(k: ArrayLike, n: ArrayLike) -> np.ndarray:
    """Log-odds of k violations in n decisions with half a decision added to either side, so that 0 has some."""
    k, n = np.asarray(k, dtype=float), np.asarray(n, dtype=float)
    return np.log((k + 0.5) / (n - k + 0.5))


def slowing_down(steps: ArrayLike, k: ArrayLike, n: ArrayLike, window: int) -> Slowing:
    """Lag-1 autocorrelation and variance of logit v in a rolling window of checkpoints, each about its own line.

    Args:
        steps, k, n: per checkpoint [j] its step, violations and decisions; those with n = 0 are dropped. They should be
            equally far apart.
        window: checkpoints in it, at least 4; half of those before the tipping point is usual.
    """
    from scipy.stats import kendalltau

    if window < 4:
        raise ValueError(f"a window of {window} checkpoints leaves nothing about its line: use at least 4")
    t, k, n = (np.asarray(x, dtype=float)[np.asarray(n) > 0] for x in (steps, k, n))
    if len(t) < window:
        nothing = np.zeros(0)
        return Slowing(nothing, nothing, nothing, nothing, None, None)
    times, levels, noise = (
        np.lib.stride_tricks.sliding_window_view(x, window)
        for x in (t, logit_rate(k, n), 1 / (k + 0.5) + 1 / (n - k + 0.5))
    )
    times = times - times.mean(axis=1, keepdims=True)
    levels = levels - levels.mean(axis=1, keepdims=True)
    slope = (times * levels).sum(axis=1) / (times**2).sum(axis=1)
    rest = levels - slope[:, None] * times
    squares = (rest**2).sum(axis=1)
    flat = squares < 1e-12
    lagged = (rest[:, 1:] * rest[:, :-1]).sum(axis=1)
    autocorrelation = np.where(flat, np.nan, lagged / np.where(flat, 1, squares))
    variance = np.where(flat, np.nan, squares / (window - 2))

    def trend(sign: np.ndarray) -> float | None:
        known = np.isfinite(sign)
        if known.sum() < 2:
            return None
        result: Any = kendalltau(np.flatnonzero(known), sign[known])
        return float(result.statistic) if np.isfinite(result.statistic) else None

    ends = t[window - 1 :]
    return Slowing(ends, autocorrelation, variance, noise.mean(axis=1), trend(autocorrelation), trend(variance))


def surely_positive(values: ArrayLike, window: int) -> tuple[np.ndarray, float]:
    """A sign and its limit for `lead_time`: Student's t of the mean of the last `window` values, and what passes.

    The limit is Student's quantile at .05 / (number of windows), one-sided: a run without any push, whose values vary
    independently about 0, raises an alarm in at most 5 %. So it needs no other run to be chosen on.

    Args:
        values: of the steps [j], e.g. the covariance of advantage and violation.
        window: steps in it, at least 3.

    Returns:
        The sign [j], NaN before the first whole window and where nothing varies; and the limit.
    """
    from scipy.stats import t

    x = np.asarray(values, dtype=float)
    if window < 3 or len(x) < window:
        raise ValueError(f"needs a window of 3 or more and as many values, got {window} and {len(x)}")
    windows = np.lib.stride_tricks.sliding_window_view(x, window)
    spread = windows.std(axis=1, ddof=1)
    varied = spread > 1e-12
    statistic = np.where(varied, windows.mean(axis=1) / np.where(varied, spread, 1) * np.sqrt(window), np.nan)
    return np.concatenate([np.full(window - 1, np.nan), statistic]), float(t.isf(0.05 / len(windows), window - 1))


def lead_time(steps: Sequence[int], sign: ArrayLike, limit: float, tipping_step: int | None) -> LeadTime:
    """When a sign first passed `limit`, and how long before the tipping point of `stats.tipping_point`.

    A limit that is chosen on the same curve finds what it looks for: take it from the undefended arm, or from runs that
    did not tip. An alarm at or after the tipping step is none.

    Args:
        steps, sign: of the checkpoints (or windows' last ones) [j]; NaN is no alarm.
    """
    alarms = [step for step, value in zip(steps, np.asarray(sign, dtype=float), strict=True) if value > limit]
    alarm = int(alarms[0]) if alarms else None
    if tipping_step is None:
        return LeadTime(alarm, None, alarm is not None)
    if alarm is None or alarm >= tipping_step:
        return LeadTime(None, None, False)
    return LeadTime(alarm, tipping_step - alarm, False)
