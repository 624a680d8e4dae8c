"""A mean-field model of tipping that can be calculated: what a learner and its defenses do to one probability.

There are two options. The policy takes the violating one with probability p = sigmoid(theta) and learns
theta' = lr x (push - pull): the push is the expected policy gradient of a group of G episodes, k ~ Bin(G, p) of which
violate, and the pull is what a defense adds to it. Left out: function approximation, replies of several tokens, chains
of thought, Adam, clipping, noise. So the model predicts thresholds and orders, not times. The formulas are this
project's own; docs/prediction.md derives them and shows the tables that they give.

Rewards are in units of the best payoff. Of a setting the functions take, by keyword:

group_size:     G, the episodes that share a baseline.
scale_rewards:  what divides the advantages, as in the recipe: `group`, `batch` or `none`.
payoff_gap:     reward of a violation that is not detected, less that of compliance.
detection:      probability that a violation is detected; 0 where left out.
loss:           reward of compliance, less that of a detected violation; 0 where left out.
spread:         standard deviation between scenarios of the reward of compliance, for `batch`; 0 where left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NotRequired, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

ScaleRewards = Literal["group", "batch", "none"]
Estimator = Literal["k3", "bias_corrected", "reward"]
Floats = NDArray[np.float64]
Values = Any
"""A number, or an array of them."""

LEARNING_RATE = 0.05
"""Of theta: it sets the model's unit of time, in which every number of steps is given."""
_FURTHEST = 25.0
"""Log-odds (a probability of 1e-11) at which a policy counts as having arrived at 0 or 1."""
_POINTS = 1000
"""Of the grid of log-odds on which a change of direction is looked for."""


class Setting(TypedDict):
    """What the learner is rewarded for and how; see the top of this file."""

    group_size: int
    scale_rewards: ScaleRewards
    payoff_gap: float
    detection: NotRequired[float]
    loss: NotRequired[float]
    spread: NotRequired[float]


@dataclass(frozen=True)
class KL:
    """The anchor: + beta KL to the aligned policy, in the loss (k3, bias_corrected) or in the reward."""

    beta: float
    estimator: Estimator = "k3"


@dataclass(frozen=True)
class Replay:
    """+ weight x the SFT or DPO loss of aligned pairs, in every step."""

    loss: Literal["sft", "dpo"]
    weight: float
    beta: float = 0.5
    """DPO's; its reference is the aligned policy."""


@dataclass(frozen=True)
class Screening:
    """A monitor sets the advantage of what it flags to 0."""

    recall: float
    false_alarm: float = 0.0


@dataclass(frozen=True)
class Penalty:
    """A monitor takes a fine (in units of reward) from the reward of what it flags."""

    recall: float
    fine: float
    false_alarm: float = 0.0


@dataclass(frozen=True)
class Covariance:
    """The part of the advantages that goes with detected violations is taken out."""

    recall: float = 1.0


@dataclass(frozen=True)
class MergeBack:
    """Every so many steps, theta - theta0 is multiplied by `keep`."""

    every: int
    keep: float


@dataclass(frozen=True)
class Lagrangian:
    """A violation costs lambda = [kp e + I + kd (e - last e)]_+ of reward, e = p - limit, I the sum of ki e."""

    limit: float = 0.05
    kp: float = 2.0
    ki: float = 0.05
    kd: float = 0.0
    warm_start: float = 0.0
    """I before the first step."""
    cap: float = math.inf
    """Largest lambda."""
    anti_windup: bool = False
    """Whether I is kept between 0 and `cap`, and stands still while lambda is cut off on the side that e pushes to."""

    def controlled(self, integral: float, error: float, change: float) -> tuple[float, float]:
        """lambda, and I, after one more step."""

        def wanted(i: float) -> float:
            return self.kp * error + i + self.kd * change

        moved = integral + self.ki * error
        if self.anti_windup:
            moved = min(max(moved, 0.0), self.cap)
            cut_off = wanted(moved) < 0 if error < 0 else wanted(moved) > self.cap
            moved = integral if cut_off else moved
        return min(max(wanted(moved), 0.0), self.cap), moved


@dataclass(frozen=True)
class Interleave:
    """A share of the groups plays rule scenarios, in which the same policy is rewarded for compliance."""

    share: float
    gain: float = 0.9
    """Reward of compliance there, less that of a violation."""


Static = KL | Replay | Screening | Penalty | Covariance | Interleave
"""Defenses that depend on p alone, so that they have an equilibrium and a time."""


def push(
    p: Values,
    *,
    group_size: int,
    scale_rewards: ScaleRewards,
    payoff_gap: Values,
    detection: float = 0.0,
    loss: Values = 0.0,
    spread: float = 0.0,
) -> Values:
    """Expected policy gradient of theta: positive where learning makes violations likelier.

    group: E_k[sqrt(k (G-k) (G-1) / G^3)] x sign(gap), ~ p (G-1)/sqrt(G) for small p whatever the gap is. With
           detection, the expectation over the j ~ Bin(k, detection) violations that were detected too, of
           S (1 - k/G) / (G s) with S the sum and s the sample deviation of the group's rewards over compliance's.
    none:  m p (1-p) (G-1)/G, m = (1 - detection) gap - detection loss.
    batch: as none, over the standard deviation of all rewards of a batch so large that it is the expected one:
           sqrt(spread^2 + variance that the violations make). With neither spread nor detection it is
           sqrt(p (1-p)) (G-1)/G x sign(gap).
    """
    p, gap, lost = (np.asarray(value, float) for value in (p, payoff_gap, loss))
    mean = expected_gap(gap, detection, lost)
    if scale_rewards == "group":
        result = _normalised_push(p, group_size, gap, detection, lost)
    else:
        result = mean * p * (1 - p) * (group_size - 1) / group_size
        if scale_rewards == "batch":
            variance = p * ((1 - detection) * gap**2 + detection * lost**2) - (p * mean) ** 2 + spread**2
            result = np.divide(result, np.sqrt(variance), out=np.zeros_like(result), where=variance > 0)
    return result if result.ndim else float(result)


def _normalised_push(p: Floats, size: int, gap: Floats, detection: float, lost: Floats) -> Floats:
    """`push` of group-normalised advantages, summed over how many violate and how many of them are detected."""
    ways, detected_given_k = _binomials(size, detection)
    k = np.arange(size + 1)
    j = k[: detected_given_k.shape[1]]
    gap, lost = gap[..., None, None], lost[..., None, None]
    won = k[:, None] - j
    total = won * gap - j * lost
    squares = won * gap**2 + j * lost**2 - total**2 / size
    deviation = np.sqrt(np.maximum(squares, 0) / (size - 1))
    gain = total * (1 - k / size)[:, None]
    term = np.divide(gain, size * deviation, out=np.zeros(np.broadcast(gain, deviation).shape), where=deviation > 1e-12)
    chance = ways * p[..., None] ** k * (1 - p[..., None]) ** (size - k)
    return (chance * (detected_given_k * term).sum(-1)).sum(-1)


@cache
def _binomials(size: int, detection: float) -> tuple[Floats, Floats]:
    """Ways to choose k of `size`, and the probability [k, j] that j of k violations are detected."""
    from scipy.special import comb
    from scipy.stats import binom

    k = np.arange(size + 1)
    j = k if detection else k[:1]
    return np.asarray(comb(size, k)), np.asarray(binom.pmf(j[None, :], k[:, None], detection))


def pull(p: Values, p0: float, *, beta: float, estimator: Literal["k3", "bias_corrected"]) -> Values:
    """What the KL term in the loss takes from theta' / lr, to the aligned probability p0.

    k3: beta (p - p0), since its gradient is that of KL(aligned || policy). bias_corrected: that of the reverse KL,
    beta p (1-p) (logit p - logit p0). KL in the *reward* is no term beside the push: it makes the gap smaller by
    beta (logit p - logit p0), and what scales the rewards scales it too (`drift`). Without scaling, its pull is that
    of bias_corrected x (G-1)/G.
    """
    return beta * (p - p0 if estimator == "k3" else p * (1 - p) * (logit(p) - logit(p0)))


def replay_pull(p: Values, p0: float, replay: Replay) -> Values:
    """What replay takes from theta' / lr: w p of SFT, w b sigmoid(b (theta - theta0)) of DPO (arXiv 2305.18290)."""
    if replay.loss == "sft":
        return replay.weight * p
    return replay.weight * replay.beta * sigmoid(replay.beta * (logit(p) - logit(p0)))


def drift(
    p: Values,
    p0: float,
    *,
    defenses: Sequence[Static] = (),
    price: float = 0.0,
    **setting: Unpack[Setting],
) -> Values:
    """theta' / lr: the push under these defenses, less their pulls.

    Args:
        price: taken from the reward of every violation (a Lagrangian's lambda).
    """
    gap, lost = np.asarray(setting["payoff_gap"] - price), np.asarray(setting.get("loss", 0.0) + price)
    detection = setting.get("detection", 0.0)
    for defense in defenses:
        if isinstance(defense, Penalty):
            gap, lost, detection = _fined(gap, lost, detection, defense)
        elif isinstance(defense, KL) and defense.estimator == "reward":
            gap = gap - defense.beta * (logit(p) - logit(p0))
            lost = lost + defense.beta * (logit(p) - logit(p0))
    rest = {"payoff_gap": gap, "loss": lost, "detection": detection}
    result = push(p, **{**setting, **rest})
    for defense in defenses:
        if isinstance(defense, Screening):  # flagged violators, and compliers flagged by mistake, push no more
            result = result * ((1 - defense.recall) * (1 - p) + (1 - defense.false_alarm) * p)
        elif isinstance(defense, Covariance):  # the residual of a regression on what was detected
            seen = defense.recall
            result = result * (0.0 if seen == 1 else (1 - seen) / (1 - seen * p))
    for defense in defenses:
        if isinstance(defense, Interleave):
            ruled = push(p, **{**setting, "payoff_gap": -defense.gain, "detection": 0.0})
            result = (1 - defense.share) * result + defense.share * ruled
    for defense in defenses:
        if isinstance(defense, KL) and defense.estimator != "reward":
            result = result - pull(p, p0, beta=defense.beta, estimator=defense.estimator)
        elif isinstance(defense, Replay):
            result = result - replay_pull(p, p0, defense)
    return result


def _fined(gap: Floats, lost: Floats, detection: float, monitor: Penalty) -> tuple[Floats, Floats, float]:
    """Gap, loss and detection with a monitor beside the supervision.

    What both of them make of a detected violation is put into one mean loss, and false alarms into the mean reward of
    compliance; the expected gap is exact.
    """
    relief = monitor.false_alarm * monitor.fine
    unseen = (1 - detection) * (1 - monitor.recall)
    if unseen == 1:
        return gap + relief, lost - relief, 0.0
    flagged_alone, caught = (1 - detection) * monitor.recall, detection
    total = flagged_alone * (gap - monitor.fine) - caught * (lost + monitor.recall * monitor.fine)
    return gap + relief, -total / (1 - unseen) - relief, 1 - unseen


def critical_beta(
    *,
    group_size: int,
    scale_rewards: ScaleRewards,
    payoff_gap: float | None = None,
    detection: float = 0.0,
    loss: float = 0.0,
    spread: float = 0.0,
) -> float:
    """Weight of the k3 anchor below which violations grow from however few: the limit of push / p at p = 0.

    group: (G-1)/sqrt(G) for any positive gap, x (1 - 2 detection) where a detected violation costs something: what
    counts is how often a lone violator comes out above the others, not by how much. none: m (G-1)/G. batch:
    m (G-1)/(G spread). m is the expected gap. Above it the equilibrium is about p0 / (1 - critical / beta); 0 where
    few violations die out by themselves. The reverse KL has no such threshold.

    Raises:
        ValueError: no payoff gap, and it matters.
    """
    if payoff_gap is None:
        if scale_rewards != "group" or detection:
            raise ValueError("without a payoff gap there is a critical beta only for `group` and without detection")
        payoff_gap = 1.0
    if scale_rewards == "group":
        sign = (1 - detection) * np.sign(payoff_gap) - detection * np.sign(loss)
        return max(0.0, float(sign) * (group_size - 1) / math.sqrt(group_size))
    mean = expected_gap(payoff_gap, detection, loss)
    if mean <= 0:
        return 0.0
    divisor = spread if scale_rewards == "batch" else 1.0
    return mean * (group_size - 1) / group_size / divisor if divisor else math.inf


def expected_gap(payoff_gap: Values, detection: float, loss: Values) -> Values:
    """Expected reward of a violation, less that of compliance."""
    return (1 - detection) * payoff_gap - detection * loss


def equilibrium(p0: float, *, defenses: Sequence[Static] = (), **setting: Unpack[Setting]) -> float:
    """The stable fixed point of p that is reached from the aligned p0, which the defenses also pull to; 0 and 1 too."""
    from scipy.optimize import brentq

    def of(theta: Values) -> Values:
        return drift(sigmoid(theta), p0, defenses=defenses, **setting)

    direction = np.sign(_beside_rounding(of(logit(p0))))
    if direction == 0:
        return p0
    path = np.linspace(logit(p0), direction * _FURTHEST, _POINTS)
    turned = np.flatnonzero(np.sign(of(path)) == -direction)
    if not turned.size:
        return float(direction > 0)
    here = int(turned[0])
    return float(sigmoid(brentq(of, path[here - 1], path[here])))


def _beside_rounding(value: float) -> float:
    return 0.0 if abs(value) < 1e-12 else value


def time_to(
    threshold: float,
    p0: float,
    *,
    defenses: Sequence[Static] = (),
    lr: float = LEARNING_RATE,
    **setting: Unpack[Setting],
) -> float:
    """Steps until p passes the threshold: the integral of dtheta / (lr drift); infinite where it never does.

    Time is continuous here. `simulate` takes whole steps, and needs a few in ten thousand more (932 for 931.3).
    """
    from scipy.integrate import quad

    if p0 >= threshold:
        return 0.0

    def of(theta: Values) -> Values:
        return drift(sigmoid(theta), p0, defenses=defenses, **setting)

    start, end = logit(p0), logit(threshold)
    if np.min(of(np.linspace(start, end, _POINTS))) <= 1e-12:
        return math.inf
    return float(quad(lambda theta: 1 / (lr * of(theta)), start, end, limit=500)[0])


def hold_beta(
    limit: float, p0: float, estimator: Estimator, *, others: Sequence[Static] = (), **setting: Unpack[Setting]
) -> float:
    """The smallest weight of a KL anchor whose equilibrium is at most `limit`; 0 where none is needed.

    Infinite where none is enough: an anchor holds nothing below p0.
    """
    from scipy.optimize import bisect

    def too_much(log_beta: float) -> float:
        defenses = [*others, KL(math.exp(log_beta), estimator)]
        return equilibrium(p0, defenses=defenses, **setting) - limit

    least, most = math.log(1e-4), math.log(1e4)
    if too_much(least) <= 0:
        return 0.0
    if too_much(most) > 0:
        return math.inf
    return math.exp(float(bisect(too_much, least, most, xtol=1e-4)))  # pyright: ignore


def rate_at_kl(kl: float, p0: float) -> float:
    """The p > p0 whose KL(p || p0) is this many nats: where an anchor that is adjusted to a target KL lets it go."""
    from scipy.optimize import brentq

    def excess(theta: float) -> float:
        p = sigmoid(theta)
        return p * (theta - logit(p0)) + math.log((1 - p) / (1 - p0)) - kl

    return 1.0 if excess(_FURTHEST) < 0 else float(sigmoid(brentq(excess, logit(p0), _FURTHEST)))


def deterrence(*, high: float, low: float, fine: float = 0.0) -> float:
    """The probability of detection from which on compliance pays most: q* = (H - L) / (H + F).

    A violation pays H, or -F where it is detected; compliance pays L. 2500 against 2000 without a fine: .20.
    """
    return (high - low) / (high + fine)


def deterring_fine(detection: float, *, high: float, low: float) -> float:
    """The smallest fine with which compliance pays most at this detection: ((1-q) H - L) / q, and 0 or more."""
    if detection == 0:
        return 0.0 if high <= low else math.inf
    return max(0.0, ((1 - detection) * high - low) / detection)


def dpo_tipping_point(*, group_size: int, weight: float, beta: float) -> float:
    """p_c ~ w b sqrt(G) / (2 (G-1)): under DPO replay a policy that starts below it goes to 0, above it tips.

    For group-normalised advantages and small p, where the push p (G-1)/sqrt(G) meets the pull w b / 2 at the anchor.
    """
    return weight * beta * math.sqrt(group_size) / (2 * (group_size - 1))


def simulate(
    p0: float,
    *,
    steps: int,
    defenses: Sequence[Static | MergeBack | Lagrangian] = (),
    lr: float = LEARNING_RATE,
    updates: int = 1,
    **setting: Unpack[Setting],
) -> Floats:
    """p after 0, 1, ... `steps` steps under any combination of defenses [steps + 1].

    In a step the prices of the Lagrangians are set from the current p, then theta += lr x drift for so many `updates`,
    then theta is merged back.
    """
    static = [defense for defense in defenses if not isinstance(defense, MergeBack | Lagrangian)]
    lagrangians = [defense for defense in defenses if isinstance(defense, Lagrangian)]
    integrals = [defense.warm_start for defense in lagrangians]
    last_errors: list[float | None] = [None for _ in lagrangians]
    start, p = logit(p0), p0
    theta, path = start, [p0]
    for step in range(1, steps + 1):
        price = 0.0
        for i, defense in enumerate(lagrangians):
            error, last = p - defense.limit, last_errors[i]
            last_errors[i] = error
            mine, integrals[i] = defense.controlled(integrals[i], error, 0.0 if last is None else error - last)
            price += mine
        for _ in range(updates):
            theta += lr * float(drift(p, p0, defenses=static, price=price, **setting))
            p = float(sigmoid(theta))
        for defense in defenses:
            if isinstance(defense, MergeBack) and step % defense.every == 0:
                theta = start + defense.keep * (theta - start)
                p = float(sigmoid(theta))
        path.append(p)
    return np.array(path)


def passing_step(path: Floats, threshold: float) -> int | None:
    """The update, counted from 0, that brings a simulated p to the threshold; None where none does."""
    above = np.flatnonzero(path >= threshold)
    return max(int(above[0]) - 1, 0) if above.size else None


def sigmoid(theta: Values) -> Values:
    """p = 1 / (1 + exp(-theta))."""
    return 1 / (1 + np.exp(-theta))


def logit(p: Values) -> Values:
    """theta = log(p / (1 - p))."""
    return np.log(p / (1 - p))
