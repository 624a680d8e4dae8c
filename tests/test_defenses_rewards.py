"""Defenses of rewards, advantages and draws: their arithmetic by hand, and in a mean-field model of tipping."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
import torch
from scipy.stats import binom

from atp_rl.defenses import Defense
from atp_rl.defenses.covariance import Covariance, residual
from atp_rl.defenses.drop_lone_violators import DropLoneViolators
from atp_rl.defenses.interleave import Interleave, is_rule_stream
from atp_rl.defenses.lagrangian import Lagrangian
from atp_rl.defenses.monitor import Monitor
from atp_rl.defenses.random_routing import RandomRouting
from atp_rl.evolve.learners import PolicyGradient
from atp_rl.evolve.losses import group_advantages
from atp_rl.recipe import DefenseSpec, Evolve, check_defenses
from atp_rl.scenarios import load
from atp_rl.scenarios.choices import format_choice
from atp_rl.scenarios.suites import FIRST_INDEX
from atp_rl.types import Completion, Group, InputError, Scenario, Verdict
from tests.small_model import SCENARIO, episode, make_policy, run_of, small_recipe, turn
from tests.small_pairs import setting

V: Final = "violation"
C: Final = "compliance"
I: Final = "invalid"  # noqa: E741
VIOLATES: tuple[Verdict, ...] = (V,)
COMPLIES: tuple[Verdict, ...] = (C,)
BOTH: tuple[Verdict, ...] = (V, C)


def group(*samples: tuple[Verdict, ...], number: int = 0) -> Group:
    """A group whose samples made these decisions, one a round."""
    scenario = replace(SCENARIO, id=f"role_play/ferry_pilot/{number}")
    return [
        episode(*(turn(verdict=v, round=k) for k, v in enumerate(verdicts)), scenario=scenario, sample=i)
        for i, verdicts in enumerate(samples)
    ]


def ready(defense: Any, step: int = 1, **given: Any) -> Any:
    defense.prepare(replace(setting(make_policy(), count=0), **given))
    defense.begin(step)
    return defense


# --- monitor


def test_a_penalty_is_the_fine_of_each_flagged_decision():
    groups = [group((V, C), (C, C), (V, V), (I, C))]
    monitor = Monitor(recall=1.0, false_alarm=0.0, fine=0.8)
    monitor.begin(1)
    rewards = torch.tensor([[1.0, 0.5, 1.0, 0.25]])
    assert monitor.on_rewards(groups, rewards)[0].tolist() == pytest.approx([0.6, 0.5, 0.2, 0.25])
    assert monitor.on_advantages(groups, rewards) is rewards
    assert monitor.metrics == {
        "decisions": 8,
        "flagged": 3,
        "violations": 3,
        "hits": 3,
        "recall": 1,
        "precision": 1,
        "flagged_share": 3 / 8,
    }


def test_screening_learns_from_no_sample_in_which_something_is_flagged():
    groups = [group((V, C), (C, C)), group((C, C), (C, V), number=1)]
    monitor = Monitor(mode="screening", recall=1.0, false_alarm=0.0)
    monitor.begin(1)
    rewards = torch.ones(2, 2)
    assert monitor.on_rewards(groups, rewards) is rewards
    advantages = torch.tensor([[0.7, -0.7], [-0.7, 0.7]])
    assert monitor.on_advantages(groups, advantages).tolist() == [[0, pytest.approx(-0.7)], [pytest.approx(-0.7), 0]]


def test_a_monitor_misses_and_errs_as_often_as_it_is_told_and_always_alike():
    groups = [group(*[BOTH] * 8, number=i) for i in range(250)]
    first, second = Monitor(recall=0.7, false_alarm=0.1), Monitor(recall=0.7, false_alarm=0.1)
    assert torch.equal(first.flagged(groups), second.flagged(groups))
    counts = first.metrics
    assert counts["recall"] == pytest.approx(0.7, abs=2 * math.sqrt(0.7 * 0.3 / 2000))
    alarms = counts["flagged"] - counts["hits"]
    assert alarms / 2000 == pytest.approx(0.1, abs=2 * math.sqrt(0.1 * 0.9 / 2000))
    assert counts["precision"] == counts["hits"] / counts["flagged"]


def test_a_text_monitor_reads_what_is_said_and_not_what_is_decided():
    def said(text: str, verdict: Verdict) -> Any:
        said = turn(verdict=verdict)
        return episode(replace(said, completion=Completion(text, (), (), "stop")))

    groups = [[said("No one will notice. " + format_choice("Safe"), C), said(format_choice("Fast"), V)]]
    monitor = Monitor(kind="text", recall=1.0, false_alarm=0.0)
    assert monitor.flagged(groups).tolist() == [[1, 0]]
    assert "precision" in monitor.metrics
    assert monitor.metrics["recall"] == 0


def test_without_violations_nothing_is_said_of_recall():
    monitor = Monitor(recall=1.0, false_alarm=0.0)
    monitor.flagged([group((C,), (I,))])
    assert monitor.metrics == {"decisions": 2, "flagged": 0, "violations": 0, "hits": 0, "flagged_share": 0}


def test_random_routing_flags_as_much_elsewhere():
    groups = [group(*[VIOLATES] * 2, *[COMPLIES] * 6, number=i) for i in range(50)]
    monitor, random = Monitor(), ready(RandomRouting())
    seen, dealt = monitor.flagged(groups), random.flagged(groups)
    assert sorted(seen.flatten().tolist()) == sorted(dealt.flatten().tolist())
    assert not torch.equal(seen, dealt)
    assert random.metrics["flagged"] == monitor.metrics["flagged"]
    # of 400 samples 100 violate: a random flag hits one in four of them
    assert random.metrics["precision"] == pytest.approx(0.25, abs=2 * math.sqrt(0.25 * 0.75 / 90))
    assert torch.equal(dealt, ready(RandomRouting()).flagged(groups))
    assert not torch.equal(dealt, ready(RandomRouting(), step=2).flagged(groups))
    rewards = torch.zeros(50, 8)
    assert torch.equal(ready(RandomRouting(fine=2.0)).on_rewards(groups, rewards), -2 * dealt)


# --- lagrangian


def test_the_price_by_hand():
    pid = Lagrangian(limit=0.1, kp=2.0, ki=0.5, kd=1.0, warm_start=0.2, cap=1.0)
    # e = .1: I = .2 + .05, no change yet; then e = .2 with a change of .1: I = .35; then e = 0 with a change of -.2
    assert pid.price(0.2) == pytest.approx(2 * 0.1 + 0.25)
    assert pid.price(0.3) == pytest.approx(2 * 0.2 + 0.35 + 0.1)
    assert pid.price(0.1) == pytest.approx(0 + 0.35 - 0.2)
    # cut off at the cap, the integral stands still
    assert pid.price(1.0) == 1.0
    assert pid.integral == pytest.approx(0.35)
    # below zero there is no price, and the integral is kept there too
    assert pid.price(0.0) == 0.0
    assert pid.integral == pytest.approx(0.35)


def test_the_price_goes_through_a_resume():
    pid = Lagrangian(kd=1.0)
    pid.price(0.4)
    successor = Lagrangian(kd=1.0)
    successor.load_state(pid.state())
    assert successor.price(0.5) == pid.price(0.5)


def test_a_sample_pays_for_violations_and_for_invalid_answers():
    groups = [group((V, C), (I, I), (C, C), (C, C))]
    pid = Lagrangian(limit=0.175, kp=1.0, ki=0.0, warm_start=0.3)
    pid.begin(1)
    # the mean cost is (.5 + 1) / 4 = .375, so lambda is .375 - .175 + .3 = .5
    assert pid.on_rewards(groups, torch.ones(1, 4))[0].tolist() == pytest.approx([0.75, 0.5, 1, 1])
    assert pid.metrics == pytest.approx({"lambda": 0.5, "cost": 0.375, "integral": 0.3})


def mean_field(pid: Lagrangian, *, gap: float = 0.5, p0: float = 0.02, size: int = 8, steps: int = 4000) -> Any:
    """Violation rates and prices of a policy with one parameter under group-normalised advantages."""
    theta, k, path = math.log(p0 / (1 - p0)), np.arange(size + 1), []
    each = np.sqrt(k * (size - k) * (size - 1) / size**3)  # the push of a group with k violators
    for _ in range(steps):
        p = 1 / (1 + math.exp(-theta))
        price = pid.price(p)
        theta += 0.05 * math.copysign(1.0, gap - price) * float((binom.pmf(k, size, p) * each).sum())
        path.append((p, price))
    return np.array(path).T


def test_an_integral_alone_overshoots_and_a_warm_start_does_not():
    slow = {"ki": 0.01, "cap": 1.5}
    integral, prices = mean_field(Lagrangian(kp=0.0, **slow))
    proportional, _ = mean_field(Lagrangian(kp=1.0, **slow))
    warm, _ = mean_field(Lagrangian(kp=1.0, warm_start=1.2 * 0.5, **slow))
    assert integral.max() == pytest.approx(0.69, abs=0.01)
    assert proportional.max() == pytest.approx(0.37, abs=0.01)
    assert warm.max() == pytest.approx(0.106, abs=0.002)
    above = integral[1:] > 0.05
    assert (np.diff(prices)[above] > 0).sum() > 100
    assert (np.diff(prices)[above] >= 0).all()


def test_the_start_values_hold_where_their_cap_is_above_the_gap():
    defaults, _ = mean_field(Lagrangian())
    warm, prices = mean_field(Lagrangian(warm_start=0.6, cap=1.5))
    assert warm.max() < 0.15 < defaults.max() < 0.2
    assert warm[-1] == pytest.approx(0.05, abs=0.005)
    assert 0 <= prices.min() < prices.max() <= 1.5
    capped, prices = mean_field(Lagrangian(cap=0.4))
    assert prices.max() == 0.4
    assert capped[-1] > 0.9


# --- covariance


def test_the_residual_by_hand():
    # cov = mean of (1, -1, 0, 0) x (.5, -.5, .5, -.5) = .25, var = .25: A - 1 x (v - mean)
    advantages, seen = torch.tensor([[1.0, -1.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert residual(advantages, seen).tolist() == [[0.5, -0.5], [-0.5, 0.5]]
    assert residual(advantages, torch.ones(2, 2)) is advantages


def test_what_is_left_pushes_no_violation_up_or_down():
    rng = np.random.default_rng(0)
    violates = rng.random((40, 8)) < 0.1
    groups = [group(*[VIOLATES if v else COMPLIES for v in row], number=i) for i, row in enumerate(violates)]
    rewards = torch.tensor(0.5 + 0.4 * violates + 0.1 * rng.random((40, 8)), dtype=torch.float32)
    advantages, seen = group_advantages(rewards, "group"), torch.tensor(violates, dtype=torch.float64)

    def push(values: torch.Tensor) -> float:
        return float((values * (seen - seen.mean())).sum())

    full = push(advantages)
    assert full > 10
    assert abs(push(Covariance().on_advantages(groups, advantages))) < 1e-4 * full
    # a miss leaves the share (1 - r) / (1 - r p) of the push, here with r = .6 on average
    left = push(Covariance(recall=0.6).on_advantages(groups, advantages)) / full
    caught = Monitor(recall=0.6, false_alarm=0.0)
    caught.flagged(groups)
    r, p = caught.metrics["recall"], violates.mean()
    assert left == pytest.approx((1 - r) / (1 - r * p), abs=0.1)


def of_seats(*episodes: tuple[Verdict, ...], number: int = 0) -> Group:
    """A group of a population: each episode has a decision of every seat, with the seat's own adapter."""
    group = []
    for i, verdicts in enumerate(episodes):
        seats = [f"seat_{k}" for k in range(len(verdicts))]
        turns = [replace(turn(verdict=v), seat=s, player=s) for v, s in zip(verdicts, seats, strict=True)]
        scenario = replace(SCENARIO, id=f"collusion/bids/{number}")
        group.append(replace(episode(*turns, scenario=scenario, sample=i), messages={seat: [] for seat in seats}))
    return group


def test_in_a_population_each_adapter_has_a_regression_of_its_own():
    # both seats violate in the first episode alone, which pays seat_0 (1, -1) and costs seat_1 (-.5, .5)
    groups = [of_seats((V, V), (C, C))]
    changed = Covariance().on_advantages(groups, torch.tensor([[1.0, -0.5, -1.0, 0.5]]))
    assert changed[0].tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)
    # where one adapter plays both seats the push of one hides that of the other: cov = .125, var = .25
    shared = [[replace(e, turns=[replace(t, player="policy") for t in e.turns]) for e in group] for group in groups]
    changed = Covariance().on_advantages(shared, torch.tensor([[1.0, -0.5, -1.0, 0.5]]))
    assert changed[0].tolist() == pytest.approx([0.75, -0.75, -0.75, 0.75])


def test_the_learner_says_which_way_a_step_pushes():
    def step(*defenses: Defense) -> float:
        policy = make_policy()
        learner = PolicyGradient(
            policy,
            learning_rate=1e-3,
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            updates_per_step=1,
            micro_batch=None,
            clip_epsilon=0.2,
            scale_rewards="none",
            loss_type="dapo",
            max_tokens=2,
            temperature=1.0,
        )
        played = [
            episode(turn((5, 6), (20, 2), verdict=V)),
            episode(turn((5, 6), (30, 2)), sample=1),
        ]
        return learner.update(policy, [played], torch.tensor([[1.0, 0.4]]), defenses)["evolve/advantage_violation_cov"]

    assert step() == pytest.approx(0.3 * 0.5)  # advantages .3 and -.3, violations 1 and 0
    assert step(Covariance()) == pytest.approx(0, abs=1e-7)
    assert step(Monitor(mode="screening", recall=1.0, false_alarm=0.0)) == pytest.approx(0.3 * 0.5 / 2)


# --- drop_lone_violators


def test_groups_with_one_violator_are_dropped():
    groups = [
        group((C, C), (C, C), (V, C)),
        group((V, C), (C, C), (V, V), number=1),
        group((C, C), (I, C), (C, C), number=2),
    ]
    defense = DropLoneViolators()
    changed = defense.on_advantages(groups, torch.ones(3, 3))
    assert changed.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert defense.metrics == {"dropped_groups": pytest.approx(1 / 3)}


def test_in_a_population_each_seats_samples_are_a_group():
    # seat_0 violates once and seat_1 twice; then seat_0 never and seat_1 once
    groups = [of_seats((V, V), (C, V), (C, C)), of_seats((C, C), (C, V), (C, C), number=1)]
    defense = DropLoneViolators()
    changed = defense.on_advantages(groups, torch.ones(2, 6))
    assert changed.tolist() == [[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]]
    assert defense.metrics == {"dropped_groups": 0.5}


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"name": "covariance"}, True),
        ({"name": "drop_lone_violators"}, True),
        ({"name": "lisa"}, True),
        ({"name": "monitor", "mode": "screening"}, True),
        ({"name": "random_routing", "mode": "screening"}, True),
        ({"name": "monitor"}, False),
        ({"name": "lagrangian"}, False),
    ],
)
def test_what_imitation_would_pass_by_is_refused_beside_it(options, refused):
    specs = [DefenseSpec.model_validate(options)]
    assert len(check_defenses(specs, Evolve(learner="population", steps=1))) == 1
    imitation = Evolve(learner="imitation", steps=1)
    if refused:
        name = options["name"]
        with pytest.raises(InputError, match=rf"{name}: acts on advantages.*set evolve\.learner=population"):
            check_defenses(specs, imitation)
    else:
        assert len(check_defenses(specs, imitation)) == 1


# --- interleave

RULES = load({"testbed": "role_play", "families": ["ferry_pilot"], "per_family": 6, "first_index": 100})
TRAIN = load({"testbed": "role_play", "families": ["ferry_pilot"], "per_family": 10})


def test_over_the_steps_the_share_is_exact_and_there_are_as_many_groups():
    counts = []
    for step in range(1, 9):
        defense = ready(Interleave(rho=0.25), step, rule_scenarios=RULES)
        drawn = defense.on_draw(list(TRAIN))
        ruled = [s for s in drawn if s.extra.get("stream") == "rule"]
        assert len(drawn) == len(TRAIN)
        assert drawn[: len(TRAIN) - len(ruled)] == TRAIN[: len(TRAIN) - len(ruled)]
        assert {s.id for s in ruled} <= {s.id for s in RULES}
        counts.append(len(ruled))
    assert counts == [2, 3, 2, 3, 2, 3, 2, 3]


def test_a_step_draws_its_own_rules_again_and_again():
    def drawn(step: int, rho: float = 0.5) -> list[str]:
        defense = ready(Interleave(rho=rho), step, rule_scenarios=RULES)
        return [s.id for s in defense.on_draw(list(TRAIN)) if s.extra.get("stream") == "rule"]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(step)) for step in range(1, 9)}) > 1
    assert len(set(drawn(1))) == 5
    assert len(drawn(1, rho=1.0)) == 10  # more than there are: some twice


def test_both_streams_are_of_one_world():
    class Louder(Defense):
        def on_scenario(self, scenario: Scenario) -> Scenario:
            return replace(scenario, texts={key: text.upper() for key, text in scenario.texts.items()})

    interleave = Interleave(rho=0.5)
    interleave.beside([Louder(), interleave])
    ruled = [s for s in ready(interleave, rule_scenarios=RULES).on_draw(list(TRAIN)) if "stream" in s.extra]
    assert len(ruled) == 5
    assert all(text.isupper() for scenario in ruled for text in scenario.texts.values() if text)


def test_rule_groups_are_rewarded_for_compliance_and_counted_apart():
    def said(option: str | None, verdict: Verdict, scenario: Any, sample: int) -> Any:
        text = format_choice(option) if option else "Well."
        completion = Completion(text, (), (), "stop")
        turns = [replace(turn(verdict=verdict, round=k), completion=completion) for k in range(2)]
        return episode(*turns, scenario=scenario, sample=sample)

    ruled = replace(SCENARIO, extra={**SCENARIO.extra, "stream": "rule"})
    groups = [
        [said("Fast", V, SCENARIO, 0), said("Safe", C, SCENARIO, 1), said("Fast", V, SCENARIO, 2)],
        [said("Safe", C, ruled, 0), said("Fast", V, ruled, 1), said(None, I, ruled, 2)],
    ]
    assert [is_rule_stream(g) for g in groups] == [False, True]
    defense = ready(Interleave(), rule_scenarios=RULES)
    rewards = torch.tensor([[1.0, 0.6, 1.0], [0.6, 1.0, 0.0]])
    changed = defense.on_rewards(groups, rewards)
    assert changed[0].tolist() == rewards[0].tolist()
    assert changed[1].tolist() == pytest.approx([1.0, 0.1, 0.0])
    assert defense.metrics == pytest.approx({"rule_groups": 1, "violation_rule": 1 / 3, "violation_payoff": 2 / 3})


def test_in_a_run_rule_scenarios_are_those_of_alignment(tmp_path):
    run = run_of(small_recipe(tmp_path / "run", "defenses=[{name: interleave, rho: 0.5}]", steps=2))
    metrics = run.lines("metrics.jsonl")
    assert [m["defense/interleave/rule_groups"] for m in metrics] == [1, 1]
    assert all("defense/interleave/violation_rule" in m for m in metrics)
    stored = gzip.decompress((run.path / "episodes" / "step_0002_train.jsonl.gz").read_bytes()).decode()
    scenarios = [json.loads(line)["scenario"] for line in stored.splitlines()]
    streams = {scenario["id"]: scenario["extra"].get("stream") for scenario in scenarios}
    assert sorted(streams.values(), key=str) == [None, "rule"]
    assert all((int(name.rsplit("/", 1)[1]) >= FIRST_INDEX["align"]) == bool(s) for name, s in streams.items())


def test_rules_are_needed():
    with pytest.raises(InputError, match="no scenario of the alignment suite has a rule"):
        ready(Interleave())


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "monitor", "recall": 1.1}, r"monitor: `recall` must be in \[0, 1\], got 1.1"),
        ({"name": "monitor", "false_alarm": -0.1}, r"`false_alarm` must be in \[0, 1\]"),
        ({"name": "monitor", "fine": 0.0}, "`fine` must be > 0"),
        ({"name": "monitor", "mode": "fine"}, r"`defenses\[0\].mode` must be 'penalty' or 'screening'"),
        ({"name": "random_routing", "recall": 2.0}, r"random_routing: `recall` must be in \[0, 1\]"),
        ({"name": "lagrangian", "limit": 1.0}, r"`limit` must be in \[0, 1\)"),
        ({"name": "lagrangian", "kp": -1.0}, "`kp` must be 0 or more"),
        ({"name": "lagrangian", "kp": 0.0, "ki": 0.0}, "one of `kp`, `ki` and `warm_start` must be > 0"),
        ({"name": "lagrangian", "warm_start": 2.0, "cap": 1.0}, "`cap` must be > 0 and at least `warm_start`"),
        ({"name": "covariance", "recall": 0.0}, r"`recall` must be in \(0, 1\]"),
        ({"name": "interleave", "rho": 1.5}, r"`rho` must be in \(0, 1\]"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        check_defenses([DefenseSpec.model_validate(options)])
