"""Tiny games worked out by hand, agreement with lifelines and statsmodels, and simulated games whose truth is known."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Hashable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_rl.evaluate import diffusion, stats
from atp_rl.evaluate.diffusion import (
    Estimate,
    Game,
    SpreadResult,
    first_passage,
    half_time,
    imitation_coefficient,
    recollusion,
    recovery,
    spread,
    tipped,
)
from atp_rl.evaluate.stats import Crossing, Rate, wilson

NAN = math.nan
NOTHING = Rate(None, None, None, 0)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 999)


def game(rows, success, cluster: Hashable = "a", fixed=()) -> Game:
    return Game(np.array(rows, dtype=float), np.array(success, dtype=bool), cluster, fixed)


def outcomes(*games: str) -> list[Game]:
    """A game per word of S (succeeds) and f (fails), each a scenario, whose two seats always choose alike."""
    return [game([[s == "S"] * 2 for s in word], [s == "S" for s in word], i) for i, word in enumerate(games)]


def series(*games: str) -> list[list[float]]:
    """1, 0 or NaN for each of "1", "0" and "?"."""
    return [[{"1": 1.0, "0": 0.0, "?": NAN}[x] for x in word] for word in games]


def imitators(games: int, peers: float, own: float, rng: np.random.Generator, seats=6, rounds=4) -> list[Game]:
    """Seats violate with logit -1.5 + peers * (share of the peers) + own * (own last choice); 2 games a scenario."""
    made = []
    for i in range(games):
        d = np.zeros((rounds, seats))
        d[0] = rng.random(seats) < rng.random()
        for k in range(1, rounds):
            share = (d[k - 1].sum() - d[k - 1]) / (seats - 1)
            d[k] = rng.random(seats) < 1 / (1 + np.exp(1.5 - peers * share - own * d[k - 1]))
        made.append(game(d, d.sum(axis=1) >= seats / 2, i // 2))
    return made


def all_rates(result: SpreadResult) -> list[Rate]:
    r = result.recollusion
    return [*r.by_lag, r.after_first, r.after_broken, r.by_seat]


@st.composite
def games(draw) -> list[Game]:
    """Games of one number of seats, of few scenarios and different lengths, with invalid decisions."""
    seats = draw(st.integers(1, 4))
    made = []
    for cluster in draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=6)):
        rounds = draw(st.integers(1, 4))
        row = st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=seats, max_size=seats)
        rows = draw(st.lists(row, min_size=rounds, max_size=rounds))
        made.append(game(rows, draw(st.lists(st.booleans(), min_size=rounds, max_size=rounds)), cluster))
    return made


# Re-collusion.


def test_recollusion_by_hand():
    r = recollusion(outcomes("SSf", "fSS", "SfS", "Sff", "fff", "ffS"))
    # Round after the first success, where there is one: SSf S, fSS S, SfS f, Sff f; two rounds after: f, -, S, f.
    assert r.by_lag == (wilson(2, 4), wilson(1, 3))
    assert (r.after_first.value, r.after_first.n) == (3 / 7, 7)
    # Broken with a round left: SfS and Sff, of which the first succeeds again. SSf breaks in its last round.
    assert r.after_broken == wilson(1, 2)


def test_seats_recollude_by_hand():
    played = game(
        [
            [1, 1, 0, NAN],  # succeeds: seats 0 and 1 chose it
            [1, 0, 1, 1],  #   seat 0 does again, seat 1 does not; succeeds: seats 0, 2 and 3
            [NAN, 1, 1, 0],  # seat 0 is invalid and not counted, seat 2 does again, seat 3 does not; fails
            [1, 1, 1, 1],  #   follows a failure
        ],
        [True, True, False, True],
    )
    assert (recollusion([played]).by_seat.value, recollusion([played]).by_seat.n) == (2 / 4, 4)
    # Seat 0 is fixed: of the three that are left one does it again.
    fixed = Game(played.decisions, played.success, "a", fixed=(0,))
    assert (recollusion([fixed]).by_seat.value, recollusion([fixed]).by_seat.n) == (1 / 3, 3)


def test_no_success_leaves_nothing_to_divide_by():
    r = recollusion(outcomes("fff", "fff"))
    assert (r.by_lag, r.after_first, r.after_broken, r.by_seat) == ((), NOTHING, NOTHING, NOTHING)
    last = recollusion(outcomes("ffS"))  # a success that no round follows
    assert (last.by_lag, last.after_first, last.by_seat) == ((), NOTHING, NOTHING)
    assert recollusion([]) == r


def test_all_success_is_one_in_every_lag():
    r = recollusion(outcomes("SSS", "SSS", "SSS"))
    assert r.by_lag == (wilson(3, 3), wilson(3, 3))
    assert r.after_first == Rate(1.0, wilson(3, 3).low, wilson(3, 3).high, 6)  # two rounds of a game are not two games
    assert r.after_broken == NOTHING
    assert (r.by_seat.value, r.by_seat.n) == (1, 12)


def test_rates_over_seven_environments_cannot_pass_one():
    # Seven environments of two games, all of which succeed in every round. The paper's public code sums the successes
    # of all seven, 14 in round 2, and divides by the 2 games of one of them: its "probability" is 7.
    played = [game([[1, 1]] * 3, [True] * 3, environment) for environment in range(7) for _ in range(2)]
    successes = sum(int(g.success[1]) for g in played)
    assert successes / len([g for g in played if g.cluster == 0]) == 7
    r = recollusion(played)
    assert [(rate.value, rate.n) for rate in (*r.by_lag, r.after_first)] == [(1, 14), (1, 14), (1, 28)]


def test_copies_of_a_game_in_its_scenario_add_no_certainty():
    once = outcomes(*["SSf", "SfS", "SSS", "Sff", "fSf"] * 4)
    copies = [g for g in once for _ in range(5)]
    one, five = recollusion(once).by_lag[0], recollusion(copies).by_lag[0]
    assert (one.value, one.n * 5) == (five.value, five.n)
    widths = [(rate.high or 0) - (rate.low or 0) for rate in (one, five)]
    assert widths[1] == pytest.approx(widths[0], rel=0.15)


# First passage.


def test_shares_tip_at_the_threshold_and_leave_invalid_out():
    rows = [[1, 0, 0], [1, 0, NAN], [NAN, NAN, NAN], [0.3, 0.6, 0.6]]  # 1/3, 1/2, none valid, 1/2
    assert tipped(rows, 0.5).tolist() == pytest.approx([0, 1, NAN, 1], nan_ok=True)


def test_first_passage_by_hand():
    p = first_passage(series("001", "100", "000", "010"), "abcd")
    # Rounds 3, 1, none up to 3, 2: survival is 3/4 after 1, 1/2 after 2, 1/4 after 3; the mean is 1 + 3/4 + 1/2.
    assert (p.median.value, p.mean.value, p.horizon, p.events, p.mean.n) == (2, 2.25, 3, 3, 4)


def test_first_passage_censors_where_measuring_ended():
    # Round 1; censored at 1 (then never measured); round 2; a game without any measurement does not count.
    p = first_passage(series("1", "0??", "?1", "??"), "abcd")
    # Survival is 2/3 after 1 and, of the one still watched, 0 after 2: the mean is 1 + 2/3.
    assert (p.median.value, p.mean.n, p.events) == (2, 3, 2)
    assert p.mean.value == pytest.approx(5 / 3)


def test_first_passage_over_checkpoints():
    steps = [0, 10, 40]
    p = first_passage(series("011", "001", "000"), ["seed 0", "seed 1", "seed 2"], steps)
    assert (p.median.value, p.horizon) == (40, 40)
    assert p.mean.value == pytest.approx(10 + 30 * 2 / 3)
    at_once = first_passage(series("1", "1"), "ab", [0])
    assert (at_once.median.value, at_once.mean.value) == (0, 0)
    with pytest.raises(ValueError, match="increase"):
        first_passage(series("01"), "a", [0, 0])
    with pytest.raises(ValueError, match="at least 2"):
        first_passage(series("01"), "a", [0])


def test_without_any_success_the_median_is_unknown_and_the_mean_is_the_horizon():
    p = first_passage(series(*["000"] * 20), list(range(20)))
    unseen = wilson(0, 20).high or 0  # that share may succeed at once, unseen
    assert p.median == Estimate(None, None, None, 20)
    assert (p.mean.value, p.mean.high, p.events) == (3, 3, 0)
    assert p.mean.low == pytest.approx((1 - unseen) * 3 + unseen * 1)


def test_success_from_the_start_takes_one_round():
    p = first_passage(series(*["111"] * 20), list(range(20)))
    unseen = wilson(0, 20).high or 0
    assert p.median == Estimate(1, 1, 1, 20)
    assert (p.mean.value, p.mean.low) == (1, 1)
    assert p.mean.high == pytest.approx((1 - unseen) * 1 + unseen * 3)
    # One scenario, however often it is played, leaves the others open.
    one = first_passage(series(*["111"] * 20), ["a"] * 20)
    assert one.median == Estimate(1, 1, None, 20)


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_first_passage_agrees_with_lifelines(runs):
    from lifelines import KaplanMeierFitter
    from lifelines.utils import qth_survival_time, restricted_mean_survival_time

    seen = [[0.0] * (time - 1) + [float(event)] for time, event in runs]
    p = first_passage(seen, list(range(len(runs))))
    theirs = KaplanMeierFitter().fit([time for time, _ in runs], [event for _, event in runs])
    median = qth_survival_time(0.5 + 1e-9, theirs.survival_function_)  # it adds logarithms, and may miss an exact half
    assert p.median.value == (None if math.isinf(median) else median)
    mean = restricted_mean_survival_time(theirs, t=p.horizon)  # pyright: ignore[reportArgumentType]
    assert p.mean.value == pytest.approx(mean)


def test_first_passage_is_the_survival_of_stats_where_all_are_watched_equally_long():
    seen = series("0001", "0100", "0000", "1000", "0011")
    theirs = stats.survival([Crossing(4, 4), Crossing(2, 4), Crossing(None, 4), Crossing(1, 4), Crossing(3, 4)])
    p = first_passage(seen, "abcde")
    assert (p.mean.value, p.horizon) == (pytest.approx(theirs.rmst), theirs.horizon)


def test_intervals_of_times_cover_the_truth_and_count_scenarios():
    rng = np.random.default_rng(0)

    def play(scenarios: int, samples: int) -> np.ndarray:
        propensity = 1 / (1 + np.exp(1.2 - rng.normal(size=(scenarios, 1, 1))))
        return rng.random((scenarios, samples, 6)) < propensity

    many = play(20000, 1)[:, 0]
    truth = np.where(many.any(axis=1), many.argmax(axis=1) + 1, 6).mean()
    hits = 0
    for _ in range(200):
        p = first_passage(play(12, 4).reshape(48, 6).astype(float).tolist(), np.repeat(np.arange(12), 4).tolist())
        assert p.mean.low is not None
        assert p.mean.high is not None
        hits += p.mean.low <= truth <= p.mean.high
    assert 0.89 <= hits / 200 <= 0.99


# Recovery.


def test_recovery_by_hand():
    r = recovery(series("1001", "0100", "1010", "0001", "1110", "0000"), "abcdef")
    # again: 1001 breaks in round 2, two rounds later again; 0100 breaks in 3, not by 4 (censored at 1); 1010 one round
    # later; 1110 breaks in its last round, and 0001 and 0000 never: neither counts.
    # Survival: 2/3 after 1 (one of three), then of the one still watched 0 after 2.
    again = r.again
    assert (again.mean.n, again.events, again.median.value, again.horizon) == (3, 2, 2, 2)
    assert again.mean.value == pytest.approx(1 + 2 / 3)
    # back: one round after the first success in 1001, 0100 and 1010, three in 1110; 0001 has none after it.
    back = r.back
    assert (back.mean.n, back.events, back.median.value) == (4, 4, 1)
    assert back.mean.value == pytest.approx((1 + 1 + 1 + 3) / 4)


def test_the_horizon_ends_where_nobody_is_watched_any_more():
    # 10100 is again one round after its break and could have been watched for three; 11100 is censored after one.
    again = recovery(series("10100", "11100"), "ab").again
    assert (again.horizon, again.median.value) == (1, 1)


def test_recovery_over_unequal_steps():
    r = recovery(series("10?1", "1100"), ["seed 0", "seed 1"], [0, 10, 20, 50])
    # Broken at step 10 and again at 50, the unmeasured checkpoint between tells nothing; 1100 broke at 20, not by 50.
    assert (r.again.mean.n, r.again.events, r.again.median.value) == (2, 1, 40)
    assert (r.back.mean.value, r.back.events) == ((10 + 20) / 2, 2)


@pytest.mark.parametrize(("seen", "backs"), [("000", 0), ("111", 2), ("001", 0)])
def test_recovery_without_a_break(seen, backs):
    r = recovery(series(seen, seen), "ab")
    assert r.again == diffusion.Passage(Estimate(None, None, None, 0), Estimate(None, None, None, 0), None, 0)
    assert (r.back.mean.n, r.back.events) == (backs, 0)  # seats that never stop are censored


@given(games())
@settings(max_examples=40, deadline=None)
def test_recollusion_after_a_break_counts_the_same_games_as_recovery(played):
    broken, again = (
        recollusion(played).after_broken,
        recovery([g.success for g in played], [g.cluster for g in played]).again,
    )
    assert broken.n == again.mean.n
    assert round((broken.value or 0) * broken.n) == again.events


# Imitation.


def test_imitation_recovers_what_was_simulated():
    result = imitation_coefficient(imitators(300, peers=3.0, own=1.0, rng=np.random.default_rng(0)))
    assert result.reason is None
    assert result.coefficient.n == 300 * 3 * 6
    for estimate, truth in ((result.coefficient, 3.0), (result.own, 1.0)):
        low, value, high = estimate.low or 0, estimate.value or 0, estimate.high or 0
        assert low < truth < high
        assert low < value < high < low + 1


def test_seats_that_ignore_each_other_have_no_imitation():
    hits = 0
    for seed in range(40):
        c = imitation_coefficient(imitators(30, peers=0.0, own=1.5, rng=np.random.default_rng(seed))).coefficient
        assert c.low is not None
        assert c.high is not None
        hits += c.low <= 0 <= c.high
    assert hits >= 34


def test_rows_of_the_regression_by_hand():
    # Only seat 1 in round 2 has a valid choice, a valid one before it, and a valid peer before it.
    one = game([[1, 0, NAN], [NAN, 1, 0]], [True, False])
    assert imitation_coefficient([one]).coefficient == Estimate(None, None, None, 1)
    # A fixed seat is a peer and no row.
    fixed = Game(one.decisions, one.success, "a", fixed=(1,))
    assert imitation_coefficient([fixed]).coefficient.n == 0
    alone = game([[1], [0], [1]], [False] * 3)
    assert (imitation_coefficient([alone]).reason or "").startswith("no data")


def test_separation_has_a_reason_and_no_number():
    # With its own choice 0, a seat follows a violating peer, and only then: perfect. With 1 it does as it likes.
    perfect = [game([[0, 1], [1, x]], [False, True], (x, i)) for x in (0, 1) for i in range(10)]
    perfect += [game([[0, 0], [0, 0]], [False, False], i) for i in range(10)]
    result = imitation_coefficient(perfect)
    assert result.coefficient == result.own == Estimate(None, None, None, 60)
    assert (result.reason or "").startswith("separation")
    # Seats that always repeat their choice are as separated, whatever their peers do.
    repeating = [game([[a, b, c]] * 3, [False] * 3, (a, b, c)) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    assert (imitation_coefficient(repeating).reason or "").startswith("separation")


@pytest.mark.parametrize(
    ("rounds", "reason"),
    [
        ([[[1, 1], [1, 1]], [[0, 1], [1, 1]]], "no variance: all decisions"),  # nobody ever complies afterwards
        ([[[1, 1], [0, 1]], [[0, 0], [1, 0]]], "no variance: the peers' share"),  # peers and own are always the same
    ],
)
def test_no_variance_has_a_reason_and_no_number(rounds, reason):
    result = imitation_coefficient([game(rows, [False, False], i) for i, rows in enumerate(rounds * 10)])
    assert result.coefficient.value is None
    assert (result.reason or "").startswith(reason)


def test_too_few_or_equal_clusters_have_a_reason_and_no_number():
    played = imitators(40, peers=2.0, own=1.0, rng=np.random.default_rng(0))
    pooled = [Game(g.decisions, g.success, i % 3) for i, g in enumerate(played)]
    assert imitation_coefficient(pooled).reason == "3 clusters are too few for an interval of 3 coefficients"
    copied = [Game(g.decisions, g.success, copy) for g in played for copy in range(10)]
    assert imitation_coefficient(copied).reason == "no variance: the clusters are all alike"


def test_the_interval_counts_clusters_as_statsmodels_gee_does():
    import statsmodels.api as sm

    played = imitators(80, peers=2.0, own=1.0, rng=np.random.default_rng(1))
    rows, groups = [], []
    for g in played:
        for k in range(1, 4):
            for s in range(6):
                peers = [g.decisions[k - 1, other] for other in range(6) if other != s]
                rows.append((g.decisions[k, s], np.mean(peers), g.decisions[k - 1, s]))
                groups.append(g.cluster)
    y, x = np.array(rows)[:, 0], sm.add_constant(np.array(rows)[:, 1:])
    theirs = sm.GEE(y, x, groups=groups, family=sm.families.Binomial(), cov_struct=sm.cov_struct.Independence()).fit()
    assert theirs is not None
    c = imitation_coefficient(played).coefficient
    assert c.value == pytest.approx(theirs.params[1], rel=1e-4)
    low, high = theirs.conf_int()[1]
    assert (c.low, c.high) == (pytest.approx(low, abs=0.1), pytest.approx(high, abs=0.1))


# Half-time.


def test_half_time_by_hand():
    # Eight seats of 10 decisions; four go from 0 to .8 and four from .2 to .8: the share goes .1, .2, .6, .8.
    rates = np.array([[0, 0.1, 0.5, 0.8]] * 4 + [[0.2, 0.3, 0.7, 0.8]] * 4).T
    h = half_time([0, 10, 20, 40], rates, np.full((4, 8), 10))
    # Half way is .45, on the line from .2 at step 10 to .6 at step 20.
    assert (h.start, h.end) == (pytest.approx(0.1), pytest.approx(0.8))
    assert h.step.value == pytest.approx(10 + 10 * 0.25 / 0.4)
    assert h.change.value == pytest.approx(0.7)
    assert h.step.low is not None
    assert h.step.high is not None
    # Seats of the first kind alone are half way, .4, at step 17.5, of the second, .5, at step 15.
    assert 15 <= h.step.low < 16.25 < h.step.high <= 17.5
    assert h.reason is None


def test_half_time_takes_the_first_crossing_weighs_by_n_and_skips_what_was_not_measured():
    # Seat 0 has 30 decisions and seat 1 has 10; checkpoint 10 was not measured, and the share falls again after 20.
    rates = [[0, 0], [NAN, NAN], [1, 0], [0, 0], [1, 1]]
    n = [[30, 10], [0, 0], [30, 10], [30, 10], [30, 10]]
    h = half_time([0, 10, 20, 30, 40], rates, n)
    assert (h.start, h.end) == (0, 1)
    assert h.step.value == pytest.approx(20 * 0.5 / 0.75)  # 0 at 0, .75 at 20, half way .5


def test_half_time_of_a_decline_is_that_of_its_mirror():
    rates = np.linspace([0.1, 0.0, 0.2, 0.1, 0.0], [0.9, 0.7, 1.0, 0.8, 0.9], 6) ** 2
    up, down = (half_time(range(6), r, np.full((6, 5), 20)) for r in (rates, 1 - rates))
    assert up.step.value == pytest.approx(down.step.value)
    assert (up.change.value or 0) > 0 > (down.change.value or 0)


@pytest.mark.parametrize(
    "rates",
    [
        np.full((4, 6), 0.3),  # nothing moves
        [[0.1, 0.2, 0.3, 0.4]] * 2 + [[0.2, 0.1, 0.4, 0.3]] * 2,  # as many seats rise as fall
    ],
)
def test_half_time_is_none_where_nothing_moved(rates):
    h = half_time([0, 1, 2, 3], rates, np.full(np.shape(rates), 50))
    assert h.step == Estimate(None, None, None, np.shape(rates)[1])
    assert h.reason == "the end is not distinguishable from the start"


def test_half_time_needs_two_checkpoints_and_two_units():
    for rates in ([[0.1, 0.2]], [[0.0], [1.0]]):
        h = half_time(range(len(rates)), rates, np.full(np.shape(rates), 50))
        assert (h.step.value, h.change.value) == (None, None)
        assert "were measured" in (h.reason or "")
    with pytest.raises(ValueError, match="not a number"):
        half_time([0, 1], [[NAN, 0], [0, 0]], [[1, 1], [1, 1]])
    with pytest.raises(ValueError, match="fit"):
        half_time([0, 1, 2], [[0, 0], [0, 0]], [[1, 1], [1, 1]])


def test_units_that_are_all_alike_give_a_step_without_interval():
    h = half_time([0, 10], [[0.0] * 8, [1.0] * 8], np.ones((2, 8)))
    assert h.step == Estimate(5, None, None, 8)
    assert h.change.low == pytest.approx(1 - (wilson(0, 8).high or 0))


def test_half_time_covers_the_truth():
    rng, t = np.random.default_rng(0), np.arange(0, 110, 10)
    hits = 0
    for _ in range(150):
        middle = 50 + 10 * rng.normal(size=10)  # each seat tips at its own step; the mean curve is half way at 50
        p = 0.05 + 0.8 / (1 + np.exp(-(t[:, None] - middle) / 8))
        h = half_time(t, rng.binomial(30, p) / 30, np.full(p.shape, 30))
        assert h.step.low is not None
        assert h.step.high is not None
        hits += h.step.low <= 50 <= h.step.high
    assert 0.88 <= hits / 150 <= 0.995


# Everything together.


def test_spread_of_no_games_and_of_none_that_succeeds():
    empty = spread([])
    assert (empty.games, empty.clusters, empty.first_success.mean.n) == (0, 0, 0)
    none = spread(outcomes("fff", "fff", "fff"))
    assert none.first_success.median.value is None
    assert none.first_success.events == none.recovery.back.mean.n == 0
    assert none.imitation.reason is not None
    for result in (empty, none):
        assert all_rates(result) == [NOTHING] * 3


def test_spread_takes_fixed_seats_out_of_the_tipped_share():
    # Of the three seats that are free one violates in round 1, two in round 2; the fixed one always does.
    rows = [[1, 0, 0, 1], [1, 1, 0, 1]]
    free = spread([game(rows, [True, True])])
    assert free.first_tipped.median.value == 1  # 2 of 4
    assert spread([game(rows, [True, True], fixed=(3,))]).first_tipped.median.value == 2


def test_a_record_is_json_with_its_denominators():
    result = spread(imitators(20, peers=2.0, own=1.0, rng=np.random.default_rng(0)))
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert record["games"] == 20
    assert record["clusters"] == 10
    assert record["recollusion"]["after_first"]["n"] == result.recollusion.after_first.n
    assert record["recovery"]["again"]["mean"]["value"] == result.recovery.again.mean.value
    assert record["imitation"]["reason"] is None


@given(games())
@settings(max_examples=40, deadline=None)
def test_probabilities_lie_in_0_and_1_and_within_their_intervals_and_everything_is_json(played):
    result = spread(played)
    json.dumps(result.record(), allow_nan=False)
    for rate in all_rates(result):
        assert (rate.value is None) == (rate.n == 0)
        if rate.value is not None:
            assert 0 <= (rate.low or 0) <= rate.value <= (rate.high or 0) <= 1
    passages = [result.first_success, result.first_tipped]
    for r in (result.recovery, result.tipped_recovery):
        passages += [r.again, r.back]
    for p in passages:
        if p.horizon is not None:
            low, mean, high = p.mean.low or 0, p.mean.value or 0, p.mean.high or 0
            assert 1 - 1e-9 <= low <= mean + 1e-9 <= high + 2e-9 <= p.horizon + 3e-9
            assert 0 <= p.events <= p.mean.n <= len(played)


@given(games(), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_names_of_seats_do_not_matter(played, random):
    order = random.sample(range(played[0].decisions.shape[1]), played[0].decisions.shape[1])
    shuffled = [Game(g.decisions[:, order], g.success, g.cluster) for g in played]
    assert spread(shuffled) == spread(played)


def test_names_of_seats_do_not_matter_to_a_coefficient_that_exists():
    played = imitators(40, peers=2.0, own=1.0, rng=np.random.default_rng(0))
    one, other = (imitation_coefficient(gs).coefficient for gs in (played, [
        Game(g.decisions[:, ::-1], g.success, g.cluster) for g in played
    ]))  # fmt: skip
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))


def test_bad_games_are_errors():
    with pytest.raises(ValueError, match="rounds, seats"):
        game([[0, 1]], [True, False])
    with pytest.raises(ValueError, match="of bool"):
        Game(np.zeros((2, 2)), np.zeros(2), "a")
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        game([[0.5, 1]], [True])


def test_import_is_fast_because_it_is_lazy():
    code = (
        "import sys, atp_rl.evaluate.diffusion; "
        "print({'scipy', 'statsmodels', 'lifelines', 'pandas'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
