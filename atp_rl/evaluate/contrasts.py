"""Comparing two arms of a study: pure functions on arrays, `docs/statistics.md`, "Comparing arms".

Arms share scenarios and seeds, so that every comparison is paired: value i of one arm and value i of the other are the
same seed (or the same scenario). Differences are first arm minus second; intervals are two-sided 95 %, p-values are
two-sided. scipy and statsmodels are imported where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from atp_rl.evaluate.stats import LEVEL, RESAMPLES, Rate


@dataclass(frozen=True)
class Contrast:
    """A paired difference of two arms, n pairs; None where unknown."""

    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    smallest_p: float | None
    """The smallest p-value that the test could have given for this many pairs (0 where it has no such floor): where it
    is above .05, the test cannot be significant, whatever the arms do."""
    n: int


@dataclass(frozen=True)
class PairsNeeded:
    """How many pairs McNemar's test needs; see `pairs_needed`."""

    asymptotic: int
    exact: int


def paired_permutation(a: ArrayLike, b: ArrayLike, rng_seed: int = 0) -> Contrast:
    """Difference of two arms over seeds: sign-flip permutation test and t interval.

    Under the null hypothesis that a seed's two runs could as well have been each other's, each difference is as likely
    with the other sign. All flips are tried with up to 13 pairs, `stats.RESAMPLES` random ones with more. With n
    pairs no p-value is below 2 / 2 ** n: .0625 with 5 seeds, .031 with 6, .0078 with 8; pairs that do not differ
    (`smallest_p` counts them out) say nothing. The interval is Student's, on the differences, which a flip test cannot
    give at 95 % for 5 pairs; so it may exclude 0 where the p-value is .0625. It is None where all differences are
    alike: seeds that agree tell nothing of how much seeds vary.

    Args:
        a, b: one value per seed, in the same order; pairs with NaN are dropped.
    """
    from scipy.stats import permutation_test, ttest_1samp

    d = _differences(a, b)
    n = len(d)
    if n == 0:
        return Contrast(None, None, None, None, None, 0)
    if n == 1:  # scipy refuses a single pair, of which both flips are as far from zero
        return Contrast(float(d[0]), None, None, 1.0, 1.0, 1)
    exact = 2**n <= RESAMPLES  # then scipy tries all flips
    test = permutation_test(
        (d,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=RESAMPLES, rng=rng_seed
    )  # fmt: skip
    smallest = smallest_flip_p(int(np.count_nonzero(d)) if exact else n)
    low = high = None
    if np.ptp(d) > 1e-12:
        interval = ttest_1samp(d, 0).confidence_interval(LEVEL)
        low, high = float(interval.low), float(interval.high)
    return Contrast(float(d.mean()), low, high, float(test.pvalue), smallest, n)


def smallest_flip_p(pairs: int) -> float:
    """The smallest p-value that `paired_permutation` can give for so many pairs, if all of them differ."""
    return min(1.0, 2.0 ** (1 - pairs) if 2**pairs <= RESAMPLES else 2 / (RESAMPLES + 1))


def seeds_needed(tests: int) -> int | None:
    """The fewest seeds with which one of so many permutation tests can be significant after Holm's correction.

    That is n >= log2(2 tests / .05), as far as all flips are tried; None where no number of seeds is enough.
    """
    most = math.ceil(math.log2(RESAMPLES))  # from here on the smallest p-value stays what it is
    return next((n for n in range(1, most + 1) if tests * smallest_flip_p(n) <= 1 - LEVEL), None)


def mcnemar(a: ArrayLike, b: ArrayLike) -> Contrast:
    """Difference of two runs' rates over scenarios: exact McNemar test, Bonett-Price interval.

    Only scenarios on which the runs disagree count in the test, a binomial one of their halves; the interval is the
    adjusted Wald one (Bonett and Price 2012, J. Educ. Behav. Stat. 37:479). It speaks of other scenarios for these two
    runs, not of other seeds.

    Args:
        a, b: 0 or 1 per scenario, in the same order; pairs with NaN (invalid decisions) are dropped.

    Raises:
        ValueError: other values than 0 and 1.
    """
    from scipy.stats import norm
    from statsmodels.stats.contingency_tables import mcnemar as exact_test

    d = _differences(a, b)
    values = np.concatenate([np.ravel(np.asarray(x, dtype=float)) for x in (a, b)])
    if not np.isin(values[np.isfinite(values)], (0, 1)).all():
        raise ValueError("McNemar's test takes one decision per scenario, 0 or 1")
    n, only_a, only_b = len(d), int((d > 0).sum()), int((d < 0).sum())
    if n == 0:
        return Contrast(None, None, None, None, None, 0)
    test: Any = exact_test([[0, only_a], [only_b, 0]], exact=True)
    p_value = float(test.pvalue) if only_a + only_b else 1.0
    p_a, p_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    margin = norm.ppf((1 + LEVEL) / 2) * math.sqrt((p_a + p_b - (p_a - p_b) ** 2) / (n + 2))
    low, high = max(-1.0, float(p_a - p_b - margin)), min(1.0, float(p_a - p_b + margin))
    return Contrast((only_a - only_b) / n, low, high, p_value, min(1.0, 2.0 ** (1 - only_a - only_b)), n)


def pairs_needed(only_a: float, only_b: float, power: float = 0.8) -> PairsNeeded:
    """Scenarios needed so that McNemar's test at .05 finds a difference with this probability.

    `asymptotic` is Connor's formula (1987, Biometrics 43:207), which gives the 155 and 390 of `docs/statistics.md`;
    `exact` the first number from which on the exact test that `mcnemar` makes has the power (looked at up to twice the
    asymptotic one): it needs about a tenth more.

    Args:
        only_a, only_b: shares of scenarios on which one run alone, or the other alone, violates.
    """
    from scipy.stats import binom, norm

    both, gap = only_a + only_b, abs(only_a - only_b)
    if not 0 < gap <= both <= 1 or min(only_a, only_b) < 0:
        raise ValueError(f"shares must be from 0 to 1 and differ, got {only_a} and {only_b}")
    z_level, z_power = norm.ppf((1 + LEVEL) / 2), norm.ppf(power)
    asymptotic = float((z_level * math.sqrt(both) + z_power * math.sqrt(both - gap**2)) ** 2 / gap**2)
    most = 2 * math.ceil(asymptotic) + 20
    m = np.arange(most + 1)  # discordant scenarios
    # Most of the rarer kind with which the exact two-sided test of m halves is still significant; -1 for none.
    critical = binom.ppf((1 - LEVEL) / 2, m, 0.5)
    critical -= binom.cdf(critical, m, 0.5) > (1 - LEVEL) / 2
    share = max(only_a, only_b) / both
    significant = binom.cdf(critical, m, share) + binom.sf(m - critical - 1, m, share)
    powers = np.array([binom.pmf(m[: n + 1], n, both) @ significant[: n + 1] for n in range(most + 1)])
    return PairsNeeded(round(asymptotic), int(np.flatnonzero(powers < power)[-1]) + 1)


def two_level(a: ArrayLike, b: ArrayLike) -> Contrast:
    """Difference of two arms over cells [seed, scenario], for other seeds and other scenarios at once.

    Clark's min F' (1973, J. Verbal Learn. Verbal Behav. 12:335): the mean difference over its standard error, whose
    square is the variance of the seeds' means plus that of the scenarios' means, as Student's t with Satterthwaite's
    degrees of freedom. It has no floor of 2 / 2 ** n, so that 5 seeds can be significant; the price is the assumption
    that mean differences are about normal over seeds, which runs that tip or do not are not. Flipping each cell's sign
    instead would take one run's scenarios for independent runs, and be significant far too often.

    Args:
        a, b: violation rates [seed, scenario], NaN where not measured (that cell is dropped from both).
    """
    from scipy.stats import t

    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if d.ndim != 2:
        raise ValueError(f"two_level takes [seed, scenario], got the shape {d.shape}")
    known = np.isfinite(d)
    d, known = (x[known.any(1)][:, known.any(0)] for x in (d, known))
    n = int(known.sum())
    if n == 0:
        return Contrast(None, None, None, None, None, 0)
    difference = float(d[known].mean())
    means = [np.nanmean(d, axis=axis) for axis in (1, 0) if d.shape[1 - axis] > 1]
    variances = [m.var(ddof=1) / len(m) for m in means]
    error = math.sqrt(sum(variances))
    if error < 1e-12:
        return Contrast(difference, None, None, None, 0.0, n)
    df = error**4 / sum(v**2 / (len(m) - 1) for v, m in zip(variances, means, strict=True))
    margin = float(t.ppf((1 + LEVEL) / 2, df)) * error
    p_value = 2 * float(t.sf(abs(difference) / error, df))
    return Contrast(difference, difference - margin, difference + margin, p_value, 0.0, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: each at most .05 keeps the chance of any false one at 5 %."""
    from statsmodels.stats.multitest import multipletests

    corrected: Any = multipletests(p_values, method="holm")[1] if len(p_values) else []
    return [float(p) for p in corrected]


def probability_of_improvement(a: ArrayLike, b: ArrayLike) -> Rate:
    """The chance that a run of arm a has a larger value than one of arm b; equal values count half.

    U / (len(a) len(b)) of Mann and Whitney, which does not pair; the interval is Newcombe's method 5 (2006, Stat. Med.
    25:559), which also covers where all values of one arm are above the other's. n is the number of pairs compared.
    """
    from scipy.optimize import brentq
    from scipy.stats import mannwhitneyu, norm

    x, y = (values[np.isfinite(values)] for values in (np.asarray(v, dtype=float) for v in (a, b)))
    pairs = len(x) * len(y)
    if pairs == 0:
        return Rate(None, None, None, 0)
    value = float(mannwhitneyu(x, y).statistic) / pairs
    z, n = float(norm.ppf((1 + LEVEL) / 2)), (len(x) + len(y)) / 2 - 1

    def excess(p: float) -> float:
        """How much further than the margin the value is from p."""
        variance = p * (1 - p) * (1 + n * (1 - p) / (2 - p) + n * p / (1 + p)) / pairs
        return (value - p) ** 2 - z**2 * variance

    inside = min(max(value, 1e-9), 1 - 1e-9)  # at 0 and 1 the margin vanishes: that is not the end looked for
    low = 0.0 if value == 0 else float(brentq(excess, 0, inside))  # pyright: ignore[reportArgumentType]
    high = 1.0 if value == 1 else float(brentq(excess, inside, 1))  # pyright: ignore[reportArgumentType]
    return Rate(value, low, high, pairs)


def _differences(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"the arms' values must pair up, got the shapes {x.shape} and {y.shape}")
    return (x - y)[np.isfinite(x - y)]
