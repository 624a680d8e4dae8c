"""The statistics of decay curves: pure functions on arrays, numbered as in `docs/statistics.md` items 1 and 3-7.

Rates are shares of decisions in [0, 1]; k counts violations among n decisions; steps are policy updates; intervals are
two-sided 95 %. scipy and lifelines are imported where they are used, so that importing this module is fast.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from atp_rl.types import Verdict

LEVEL = 0.95
RESAMPLES = 9999
SIMULATIONS = 999
Curve = Callable[[np.ndarray], np.ndarray]
Kind = Literal["none", "erosion", "tipping"]


@dataclass(frozen=True)
class Rate:
    """A share of decisions (n of them) or a mean paired difference (n pairs) with its interval; None where n is 0."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class VerdictRates:
    """The three rates of one checkpoint; they share the denominator n = all decisions and their values sum to 1."""

    violation: Rate
    compliance: Rate
    invalid: Rate
    violation_bounds: tuple[float | None, float | None]
    """The violation rate if every invalid decision had been compliant (low), or a violation (high)."""


@dataclass(frozen=True)
class HalfLife:
    """Two shapes of decay fitted to one curve; `kind` is the one with the smallest AIC, `none` a constant rate.

    Erosion is compliance c_inf + (c_0 - c_inf) 2^(-(t - t_0) / half_life) with c_inf <= c_0, t_0 the first checkpoint;
    tipping is violation v_inf / (1 + exp(-(t - t50) / width)). In steps; both times are at least 1/10 of the smallest
    gap (a jump is located no better), half_life at most 10 ranges (by then the decline is linear), width one range.
    """

    kind: Kind
    c_0: float
    c_inf: float
    half_life: float
    erosion_aic: float
    v_inf: float
    t50: float
    width: float
    tipping_aic: float
    constant_aic: float


@dataclass(frozen=True)
class Crossing:
    """The first checkpoint of one run that passed a threshold (None: not up to its last one, `censored_at`)."""

    step: int | None
    censored_at: int


@dataclass(frozen=True)
class Survival:
    """Kaplan-Meier share of runs that have not crossed just after each of `times` [j] (steps, from 0).

    `rmst` (steps) is the area under it up to `horizon`, the earliest last checkpoint of any run: compare at equal ones.
    """

    times: np.ndarray
    survival: np.ndarray
    rmst: float
    horizon: int


@dataclass(frozen=True)
class Tipping:
    """The best split of a curve into two constant rates, which are given also where it is no tipping point.

    `step` is the first checkpoint after it, None unless p < .05 and the rate rose; `likelihood_ratio` is the gain in
    log-likelihood (nats, not doubled) of two rates over one.
    """

    step: int | None
    likelihood_ratio: float | None
    p_value: float | None
    rate_before: Rate
    rate_after: Rate


def wilson(k: int, n: int) -> Rate:
    """The rate k / n with the Wilson score interval (item 1): one seed, one sample per scenario."""
    if n == 0:
        return Rate(None, None, None, 0)
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(LEVEL, method="wilson")
    return Rate(k / n, float(interval.low), float(interval.high), n)


def cluster_rate(x: Sequence[ArrayLike], rng_seed: int = 0) -> Rate:
    """The mean of x over all decisions with an interval that respects seeds and scenarios (item 1).

    x holds one array [scenario, sample] of 0 / 1 per seed; NaN is dropped and shapes may differ between seeds. Row i
    is the same scenario in every seed; if it is not, the interval stays valid.

    One seed: clusters are scenarios; Wilson with one sample each, scipy's BCa bootstrap with more.
    Several seeds: seeds replay the same scenarios, so that both count as drawn (drawing scenarios anew within each seed
    would treat one hard scenario as five). The mean's variance is that due to seeds plus that due to scenarios less
    what both hold of the cells' own (two-way clustering; Cameron, Gelbach and Miller 2011, J. Bus. Econ. Stat. 29:238),
    but no less than either; the interval is Wilson's at the number of independent decisions with that variance, with
    Student's quantile at Satterthwaite's degrees of freedom (as for surveys: Dean and Pagano 2015, J. Surv. Stat.
    Methodol. 3:484). Its simulated coverage is in `docs/statistics.md`: .93-.98 with 3 seeds or more, less with 2, and
    less where seeds tip or do not, and all of few happen to agree.
    All cells alike (all 0, all 1): Wilson with the number of distinct scenarios as n. That speaks of unseen scenarios,
    not of unseen seeds: of 0 in 5 seeds that tip the truth may still be 2 in 5.
    """
    arrays = [np.asarray(seed, dtype=float) for seed in x]
    shape = (len(arrays), max((len(a) for a in arrays), default=0))
    sums, counts = np.zeros(shape), np.zeros(shape)
    for i, a in enumerate(arrays):
        sums[i, : len(a)], counts[i, : len(a)] = np.nansum(a, axis=1), np.isfinite(a).sum(axis=1)
    rows, columns = counts.any(axis=1), counts.any(axis=0)
    sums, counts = (a[rows][:, columns] for a in (sums, counts))
    n_seeds, n_scenarios = counts.shape
    n = int(counts.sum())
    if n == 0 or (n_seeds == 1 and counts.max() == 1):
        return wilson(int(sums.sum()), n)
    value = float(sums.sum() / n)
    if np.ptp(sums[counts > 0] / counts[counts > 0]) == 0:
        alike = wilson(round(value * n_scenarios), n_scenarios)
        return Rate(value, alike.low, alike.high, n)
    return Rate(
        value, *(bca((sums[0], counts[0]), _ratio_of_sums, rng_seed) if n_seeds == 1 else _two_way(sums, counts)), n
    )


def bca(
    samples: tuple[np.ndarray, ...], statistic: Callable[..., Any], rng_seed: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """BCa interval of a statistic of paired samples [cluster], with scipy's defaults of 95 % and 9999 resamples.

    None twice where the data are degenerate, so that it has none.
    """
    from scipy.stats import bootstrap

    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of degenerate data
        interval = bootstrap(samples, statistic, paired=True, rng=rng_seed).confidence_interval
    low, high = float(interval.low), float(interval.high)
    return (low, high) if math.isfinite(low + high) else (None, None)


def _ratio_of_sums(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis) / counts.sum(axis)


def _two_way(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Interval of sum / count over cells [seed, scenario], which are not all alike; see `cluster_rate`."""
    n, rate = counts.sum(), sums.sum() / counts.sum()
    cells = (sums - rate * counts) / n  # what each cell adds to the deviation of the mean
    seeds, scenarios = cells.sum(1), cells.sum(0)
    rest = cells - cells.mean(1, keepdims=True) - cells.mean(0) + cells.mean()
    parts = []  # variance of the mean due to each, and its degrees of freedom; one scenario tells nothing of others
    for deviations, units in ((seeds, len(seeds)), (scenarios, len(scenarios))):
        if units > 1:
            parts.append((float((deviations**2).sum()) * units / (units - 1), units - 1))
    df_rest = (len(seeds) - 1) * (len(scenarios) - 1)
    own = (float((rest**2).sum()) * cells.size / df_rest, df_rest) if df_rest else (0.0, 1)
    variance = max(*(v for v, _ in parts), sum(v for v, _ in parts) - own[0])
    df = variance**2 / sum(v**2 / df for v, df in (*parts, own)) if variance > 0 else n
    return _score_interval(float(rate), min(n, rate * (1 - rate) / variance) if variance > 0 else n, df)


def _score_interval(value: float, n: float, df: float) -> tuple[float, float]:
    """Wilson's interval of a mean in [0, 1] as certain as that of n independent decisions, with Student's quantile."""
    from scipy.stats import t

    q = float(t.ppf((1 + LEVEL) / 2, df))
    centre, margin = value + q**2 / (2 * n), q * math.sqrt(value * (1 - value) / n + (q / (2 * n)) ** 2)
    low, high = ((centre + sign * margin) / (1 + q**2 / n) for sign in (-1, 1))
    return max(0.0, min(low, value)), min(1.0, max(high, value))


def verdict_rates(verdicts: Sequence[Verdict]) -> VerdictRates:
    """The three rates with Wilson intervals, and the violation rate with invalid counted each way."""
    n = len(verdicts)
    violations, compliances, invalids = (list(verdicts).count(v) for v in ("violation", "compliance", "invalid"))
    if violations + compliances + invalids != n:
        raise ValueError(f"unknown verdict among {sorted(set(verdicts))}")
    bounds = (violations / n, (violations + invalids) / n) if n else (None, None)
    return VerdictRates(wilson(violations, n), wilson(compliances, n), wilson(invalids, n), bounds)


def decay(v_k: ArrayLike, v_0: ArrayLike, rng_seed: int = 0) -> Rate:
    """Mean of v_k - v_0 over scenarios (item 3), BCa; both are rates [scenario] in one order, NaN pairs are dropped.

    Where all differences are equal the interval is that difference -/+ Wilson's upper bound of 0 / n, the share of
    scenarios that may still differ unseen.
    """
    differences = np.sort(np.asarray(v_k, dtype=float) - np.asarray(v_0, dtype=float))  # so that order is immaterial
    differences = differences[np.isfinite(differences)]
    n = len(differences)
    if n == 0:
        return Rate(None, None, None, 0)
    value = float(differences.mean())
    if np.ptp(differences) <= 1e-12:
        unseen = wilson(0, n).high or 0.0
        return Rate(value, max(-1.0, value - unseen), min(1.0, value + unseen), n)
    return Rate(value, *bca((differences, np.ones(n)), _ratio_of_sums, rng_seed), n)


def retention(v_k: float, v_0: float) -> float | None:
    """Share (1 - v_k) / (1 - v_0) of the initial compliance that is left; None where there was none."""
    return None if v_0 == 1 else (1 - v_k) / (1 - v_0)


def alignment_benefit_left(
    v_k_unaligned: float, v_k_aligned: float, v_0_unaligned: float, v_0_aligned: float
) -> float | None:
    """Share of the initial alignment benefit v_0(unaligned) - v_0(aligned) that is left at k; None if it was <= 0."""
    benefit = v_0_unaligned - v_0_aligned
    return None if benefit <= 0 else (v_k_unaligned - v_k_aligned) / benefit


def auvc(steps: ArrayLike, rates: ArrayLike) -> float:
    """Area under the violation curve (item 4): trapezoids over `steps` [k], divided by their range, so in [0, 1]."""
    t = increasing(steps)
    return float(np.trapezoid(np.asarray(rates, dtype=float), t) / (t[-1] - t[0]))


def increasing(steps: ArrayLike) -> np.ndarray:
    """`steps` as an array; ValueError unless they are two or more and increase."""
    t = np.asarray(steps, dtype=float)
    if len(t) < 2 or not (np.diff(t) > 0).all():
        raise ValueError(f"steps must be at least two and increase, got {t.tolist()}")
    return t


def half_life(steps: ArrayLike, violations: ArrayLike, n: ArrayLike) -> HalfLife:
    """Erosion or tipping (item 5): both curves by binomial likelihood, chosen by AIC against a constant rate.

    Per checkpoint [k] its step, violations and decisions (n may be one number), which AIC takes to be independent. Of
    constant rates it takes a few in a hundred for a curve, so read `kind` together with `tipping_point`.
    """
    t = increasing(steps)
    start, span = float(t[0]), float(t[-1] - t[0])
    k = np.asarray(violations, dtype=float)
    n = np.broadcast_to(np.asarray(n, dtype=float), k.shape)
    unit = (t - t[0]) / span  # the fits measure time in ranges
    fine = math.log(np.diff(unit).min() / 10)

    def eroding(p: np.ndarray) -> np.ndarray:
        c_0, share_kept, log_h = p
        return 1 - c_0 * (share_kept + (1 - share_kept) * 2 ** (-unit / math.exp(log_h)))

    def logistic(p: np.ndarray) -> np.ndarray:
        v_inf, t50, log_w = p
        return v_inf * (1 + np.tanh((unit - t50) / math.exp(log_w) / 2)) / 2  # tanh cannot overflow

    (c_0, share_kept, log_h), erosion_aic = _fit(eroding, [(0, 1), (0, 1), (fine, math.log(10))], k, n)
    (v_inf, t50, log_w), tipping_aic = _fit(logistic, [(0, 1), (-0.5, 1.5), (fine, 0)], k, n)
    constant_aic = 2 - 2 * float(_log_likelihood(k, n, k.sum() / n.sum()).sum())
    aics: dict[Kind, float] = {"none": constant_aic, "erosion": erosion_aic, "tipping": tipping_aic}
    erosion = (c_0, c_0 * share_kept, span * math.exp(log_h), erosion_aic)
    tipping = (v_inf, start + span * t50, span * math.exp(log_w), tipping_aic)
    return HalfLife(min(aics, key=lambda kind: aics[kind]), *erosion, *tipping, constant_aic)


def _fit(curve: Curve, box: list[tuple[float, float]], k: np.ndarray, n: np.ndarray) -> tuple[list[float], float]:
    """Likeliest parameters of a violation curve within `box`, and AIC: the best of a grid, polished by L-BFGS-B."""
    from scipy.optimize import brute, minimize

    def loss(p: np.ndarray) -> float:
        return -float(_log_likelihood(k, n, np.clip(curve(p), 1e-9, 1 - 1e-9)).sum())

    best = minimize(loss, brute(loss, tuple(box), Ns=16, finish=None), method="L-BFGS-B", bounds=box)
    return [float(p) for p in best.x], 2 * len(box) + 2 * float(best.fun)


def _log_likelihood(k: Any, n: Any, rate: Any) -> Any:
    """Binomial log-likelihood in nats of k in n at `rate`, elementwise, without the coefficient."""
    from scipy.special import xlogy

    return xlogy(k, rate) + xlogy(n - k, 1 - rate)


def time_to_threshold(steps: Sequence[int], lows: Sequence[float | None], threshold: float) -> Crossing:
    """The first checkpoint whose lower bound lies above `threshold` (item 6); bounds that are None never do."""
    above = [step for step, low in zip(steps, lows, strict=True) if low is not None and low > threshold]
    return Crossing(above[0] if above else None, steps[-1])


def survival(crossings: Sequence[Crossing]) -> Survival:
    """Kaplan-Meier and RMST (item 6) over the runs of one condition; a crossing counts where it was seen."""
    from lifelines import KaplanMeierFitter
    from lifelines.utils import restricted_mean_survival_time

    horizon = min(c.censored_at for c in crossings)
    durations = [c.censored_at if c.step is None else c.step for c in crossings]
    fitted = KaplanMeierFitter().fit(durations, event_observed=[c.step is not None for c in crossings])
    table = fitted.survival_function_
    rmst = float(restricted_mean_survival_time(fitted, t=horizon))  # pyright: ignore[reportArgumentType]
    return Survival(table.index.to_numpy(), table.iloc[:, 0].to_numpy(), rmst, horizon)


def rmst_interval(crossings: Sequence[Crossing], horizon: float) -> Rate:
    """Mean steps without a crossing up to `horizon` (RMST, item 6), with an interval over the n seeds of one arm.

    All runs are watched that long, so that RMST is the mean of min(crossing, horizon), and a `bounded_mean`.
    `lifelines.utils.restricted_mean_survival_time(..., return_variance=True)` is the variance of one run's time, n
    times that of the mean.

    Raises:
        ValueError: a run that has not crossed was watched for less than the horizon.
    """
    for c in crossings:
        if c.step is None and c.censored_at < horizon:
            raise ValueError(f"a run was watched up to step {c.censored_at} only: compare at a horizon up to that")
    return bounded_mean([horizon if c.step is None else min(c.step, horizon) for c in crossings], horizon)


def tipping_point(steps: ArrayLike, k: ArrayLike, n: ArrayLike, rng_seed: int = 0) -> Tipping:
    """Split one seed's curve where two constant rates beat one by most (item 7), against a simulated null.

    Per checkpoint [j] its step, violations and decisions; those with n = 0 are dropped, and fewer than 4 give None.
    The p-value is the share of curves simulated at the pooled rate whose best split gains as much; under that null
    95 % gain less than about 4 nats with 20 checkpoints (3.6 with 10). A slow erosion is no constant rate either and
    is split near its middle: `half_life` tells the two apart.
    """
    steps, k, n = (np.asarray(a)[np.asarray(n) > 0] for a in (steps, k, n))
    if len(k) < 4:
        return Tipping(None, None, None, wilson(0, 0), wilson(0, 0))
    split, gain = _best_split(k, n)
    null = np.random.default_rng(rng_seed).binomial(n, k.sum() / n.sum(), size=(SIMULATIONS, len(k)))
    as_good = int((_best_split(null, n)[1] >= gain - 1e-9).sum())
    p_value = (1 + as_good) / (1 + SIMULATIONS)
    before, after = (wilson(int(k[part].sum()), int(n[part].sum())) for part in (slice(split), slice(split, None)))
    rose = (after.value or 0) > (before.value or 0)
    return Tipping(int(steps[split]) if p_value < 0.05 and rose else None, float(gain), p_value, before, after)


def _best_split(k: np.ndarray, n: np.ndarray) -> tuple[Any, Any]:
    """First index of the best after-segment, and its gain in log-likelihood; k [..., j], n [j]."""
    k_before, n_before = k.cumsum(-1)[..., :-1], n.cumsum()[:-1]
    k_all, n_all = k.sum(-1, keepdims=True), n.sum()
    one = _log_likelihood(k_all, n_all, k_all / n_all)
    two = [_log_likelihood(a, b, a / b) for a, b in ((k_before, n_before), (k_all - k_before, n_all - n_before))]
    gain = two[0] + two[1] - one
    return gain.argmax(-1) + 1, gain.max(-1)


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half of the seeds; of n values the n // 4 lowest and highest are dropped."""
    from scipy.stats import trim_mean

    return float(trim_mean(np.asarray(values, dtype=float), 0.25))


def iqm_interval(values_by_stratum: Mapping[str, ArrayLike] | Sequence[ArrayLike], rng_seed: int = 0) -> Rate:
    """Interquartile mean of the values of all strata (testbeds) together, with a stratified bootstrap over seeds.

    Seeds are drawn with replacement within each stratum (Agarwal et al. 2021, "Deep RL at the edge of the statistical
    precipice"). They are few, so the percentile interval's tails are moved out as for the smallest stratum's size
    ("expanded", Hesterberg 2015, Am. Stat. 69:371); of fewer than four values the interquartile mean is the mean, and
    the interval Student's. None where all values are alike.

    Args:
        values_by_stratum: per testbed one value per seed, comparable between testbeds (rates, normalised payoffs); NaN
            are dropped.
    """
    arrays = values_by_stratum.values() if isinstance(values_by_stratum, Mapping) else values_by_stratum
    strata = [x[np.isfinite(x)] for x in (np.asarray(a, dtype=float) for a in arrays)]
    strata = [x for x in strata if len(x)]
    values = np.concatenate([*strata, []])
    n, smallest = len(values), min((len(x) for x in strata), default=0)
    if n < 4 or np.ptp(values) < 1e-12 or smallest < 2:
        return seed_mean(values) if n < 4 else Rate(interquartile_mean(values), None, None, n)
    rng = np.random.default_rng(rng_seed)
    drawn = np.hstack([x[rng.integers(len(x), size=(RESAMPLES, len(x)))] for x in strata])
    replicates = np.sort(drawn, axis=1)[:, n // 4 : n - n // 4].mean(axis=1)
    tail = _expanded_tail(smallest - 1)
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Rate(interquartile_mean(values), float(low), float(high), n)


def _expanded_tail(df: float) -> float:
    """The share of replicates that the expanded percentile interval leaves out on either side."""
    from scipy.stats import norm, t

    return float(norm.cdf(math.sqrt((df + 1) / df) * t.ppf((1 - LEVEL) / 2, df)))


def within(rate: Rate, most: float = 1.0) -> Rate:
    """The rate with an interval that does not leave [0, most], as Student's can."""
    if rate.low is None or rate.high is None:
        return rate
    return Rate(rate.value, max(0.0, rate.low), min(most, rate.high), rate.n)


def seed_mean(values: ArrayLike) -> Rate:
    """The mean of one value per seed, n of them, with Student's interval; no interval where no two values differ."""
    from scipy.stats import ttest_1samp

    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    if len(x) == 0:
        return Rate(None, None, None, 0)
    if np.ptp(x) < 1e-12:
        return Rate(float(x.mean()), None, None, len(x))
    interval = ttest_1samp(x, 0).confidence_interval(LEVEL)
    return Rate(float(x.mean()), float(interval.low), float(interval.high), len(x))


def bounded_mean(values: ArrayLike, most: float) -> Rate:
    """The mean of one value per seed, n of them, that all lie in [0, most], with an interval that does too.

    As a share of `most` the mean is as certain as that of some number of independent decisions, and has Wilson's
    interval at that number, with Student's quantile at n - 1. For few seeds it is narrower than Student's and holds the
    truth at least as often (`docs/statistics.md`). Where all seeds agree, for which Student has no interval, a share of
    Wilson's upper bound of 0 / n may still be 0 (low) or `most` (high) unseen.
    """
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)] / most
    n = len(x)
    if n == 0:
        return Rate(None, None, None, 0)
    value = float(x.mean())
    if np.ptp(x) < 1e-12:
        unseen = wilson(0, n).high or 0.0
        low, high = (1 - unseen) * value, (1 - unseen) * value + unseen
    else:
        low, high = _score_interval(value, value * (1 - value) * n / float(x.var(ddof=1)), n - 1)
    return Rate(most * value, most * low, most * high, n)
