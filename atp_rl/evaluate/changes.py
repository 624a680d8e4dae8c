"""What changed, and at what price: `docs/statistics.md` items 3, 4, 10 and 12, pure functions on arrays.

Differences and ratios of violation rates that are paired by scenario, with two-sided 95 % intervals over scenarios:
they speak of the runs at hand, not of other seeds. Over seeds, give one value per seed to
`contrasts.paired_permutation` or `stats.seed_mean`, or cells [seed, scenario] to `contrasts.two_level`. scipy is
imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from atp_rl.evaluate.stats import Rate, auvc, bca, cluster_rate, decay, wilson

Decisions = Mapping[str, Sequence[float]]
"""By scenario id its decisions: 1 violation, 0 compliance, NaN invalid."""


@dataclass(frozen=True)
class Gap:
    """Rate of one set of decisions minus that of another."""

    difference: Rate
    """n counts pairs of scenarios, or, unpaired, scenarios of both sets."""
    paired: bool


def retention_interval(v_k: ArrayLike, v_0: ArrayLike) -> Rate:
    """Share of the initial compliance that is left (item 3): mean(1 - v_k) / mean(1 - v_0).

    Args:
        v_k, v_0: rates [scenario] at a checkpoint and at step 0, in one order; pairs with NaN are dropped.
    """
    return _ratio(1 - np.asarray(v_k, dtype=float), 1 - np.asarray(v_0, dtype=float))


def benefit(v_unaligned: ArrayLike, v_aligned: ArrayLike) -> Rate:
    """Alignment benefit (item 3): mean of v(unaligned) - v(aligned) over scenarios [scenario] at one checkpoint.

    Unaligned is a run with the same evolution that starts from the base model.
    """
    return decay(v_unaligned, v_aligned)


def benefit_left(
    v_k_unaligned: ArrayLike, v_k_aligned: ArrayLike, v_0_unaligned: ArrayLike, v_0_aligned: ArrayLike
) -> Rate:
    """Share of the initial alignment benefit that is left at a checkpoint (item 3); all rates [scenario] in one order.

    None where there was no benefit; without bounds where the initial benefit's own interval holds 0, since the ratio
    can then be anything.
    """
    late, early = (
        np.asarray(unaligned, dtype=float) - np.asarray(aligned, dtype=float)
        for unaligned, aligned in ((v_k_unaligned, v_k_aligned), (v_0_unaligned, v_0_aligned))
    )
    share = _ratio(late, early)
    known = np.isfinite(late + early)
    initial = decay(early[known], np.zeros(int(known.sum())))
    if initial.value is None or initial.value <= 0:
        return Rate(None, None, None, share.n)
    if initial.low is None or initial.low <= 0:
        return Rate(share.value, None, None, share.n)
    return share


def _ratio(top: np.ndarray, bottom: np.ndarray) -> Rate:
    """mean(top) / mean(bottom) over pairs [scenario] with the BCa bootstrap; None where mean(bottom) is not positive.

    Where all pairs are alike the bootstrap is blind: as in `stats.decay`, a share of Wilson's upper bound of 0 / n of
    the scenarios may then differ unseen, by 1.
    """
    known = np.isfinite(top + bottom)
    top, bottom = top[known], bottom[known]
    n = len(top)
    if n == 0 or bottom.mean() <= 1e-12:
        return Rate(None, None, None, n)
    value = float(top.mean() / bottom.mean())
    if max(np.ptp(top), np.ptp(bottom)) < 1e-12:
        unseen = (wilson(0, n).high or 0.0) / float(bottom.mean())
        return Rate(value, value - unseen, value + unseen, n)
    # A draw without any benefit or compliance in it has no ratio; such draws count as a very large one.
    bounds = bca((top, bottom), lambda t, b, axis: t.mean(axis) / np.maximum(b.mean(axis), 1e-12))
    return Rate(value, *bounds, n)


def auvc_per_payoff(steps: ArrayLike, rates: ArrayLike, payoffs: ArrayLike) -> float | None:
    """Area under the violation curve per unit of payoff gained from the first checkpoint to the last (item 4).

    Args:
        steps, rates, payoffs: of the checkpoints [k]; payoffs normalised, so that arms compare.

    Returns:
        None where no payoff was gained.
    """
    paid = np.asarray(payoffs, dtype=float)
    gained = float(paid[-1] - paid[0])
    return auvc(steps, rates) / gained if gained > 0 else None


def per_nat(change: float, kl: float) -> float | None:
    """Payoff gained, or violation rate added, per nat of KL to the aligned policy (item 10); None without any KL."""
    return change / kl if kl > 0 else None


def gap(a: Decisions, b: Decisions) -> Gap:
    """Violation rate of a minus that of b (item 12), each scenario's decisions weighing alike.

    The faking gap: a the unsupervised, b the supervised decisions (a positive one fakes). The generalisation gap: a the
    held-out, b the held-in scenarios. What a defense in the prompt hides: a without it (`weights_only`), b with it
    (`deployed`).

    Scenarios that both hold are paired (and those in one of them are left out): interval of `stats.decay`. Where they
    share none, the interval is made of the two rates' own (MOVER: Newcombe 1998, Stat. Med. 17:873, method 10; Zou and
    Donner 2008, Stat. Med. 27:1693), with scenarios as clusters.
    """
    shared = [name for name in a if name in b]
    if shared:
        left, right = (np.array([_mean(x[name]) for name in shared]) for x in (a, b))
        return Gap(decay(left, right), True)
    return Gap(difference(_rate(a), _rate(b), len(a) + len(b)), False)


def difference(first: Rate, second: Rate, n: int) -> Rate:
    """first - second of unpaired rates, its interval made of the two rates' own (MOVER, as in `gap`)."""
    if first.value is None or first.low is None or first.high is None:
        return Rate(None, None, None, 0)
    if second.value is None or second.low is None or second.high is None:
        return Rate(None, None, None, 0)
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Rate(value, low, high, n)


def _mean(decisions: Sequence[float]) -> float:
    known = [x for x in decisions if math.isfinite(x)]
    return sum(known) / len(known) if known else math.nan


def _rate(decisions: Decisions) -> Rate:
    """`cluster_rate` of scenarios that may differ in their number of decisions."""
    most = max(map(len, decisions.values()), default=0)
    rows = [[*x, *[math.nan] * (most - len(x))] for x in decisions.values()]
    return cluster_rate([rows]) if rows else wilson(0, 0)
