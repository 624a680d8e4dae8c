"""The mean-field model: its formulas against enumeration, and every table of docs/prediction.md."""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from atp_rl.evaluate.tipping import (
    KL,
    Covariance,
    Lagrangian,
    MergeBack,
    Penalty,
    Replay,
    Screening,
    Setting,
    critical_beta,
    deterrence,
    deterring_fine,
    dpo_tipping_point,
    drift,
    equilibrium,
    expected_gap,
    hold_beta,
    logit,
    passing_step,
    pull,
    push,
    rate_at_kl,
    sigmoid,
    simulate,
    time_to,
)
from atp_rl.evolve.losses import group_advantages

NORMALISED: Setting = {"group_size": 8, "scale_rewards": "group", "payoff_gap": 0.5}
LEARNERS: list[Setting] = [
    {"group_size": 4, "scale_rewards": "group", "payoff_gap": 0.3},
    {"group_size": 8, "scale_rewards": "group", "payoff_gap": 0.3},
    {"group_size": 8, "scale_rewards": "none", "payoff_gap": 0.2},
    {"group_size": 8, "scale_rewards": "none", "payoff_gap": 0.9},
]


def enumerated_push(p: float, setting: Setting, *, flag: float = 0.0, false_alarm: float = 0.0) -> float:
    """The expected policy gradient of theta over every group that can be drawn, by the learner's own advantages.

    Args:
        flag: probability that a violator's advantage is set to 0.
        false_alarm: the same for compliers.
    """
    size, q = setting["group_size"], setting.get("detection", 0.0)
    outcomes = [("violation", p * (1 - q)), ("detected", p * q), ("compliance", 1 - p)]
    reward = {"violation": setting["payoff_gap"], "detected": -setting.get("loss", 0.0), "compliance": 0.0}
    total = 0.0
    for group in product(outcomes, repeat=size):
        chance = math.prod(probability for _, probability in group)
        rewards = torch.tensor([[reward[name] for name, _ in group]], dtype=torch.float64)
        advantages = group_advantages(rewards, setting["scale_rewards"])[0].numpy()
        violates = np.array([name != "compliance" for name, _ in group])
        kept = np.where(violates, 1 - flag, 1 - false_alarm)
        total += chance * float((advantages * kept * (violates - p)).mean())
    return total


@pytest.mark.parametrize("p", [0.02, 0.3, 0.8])
@pytest.mark.parametrize("detection", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_the_push_is_that_of_the_learners_advantages(p, detection, scale):
    setting: Setting = {
        "group_size": 4, "scale_rewards": scale, "payoff_gap": 0.35, "detection": detection, "loss": 0.65,
    }  # fmt: skip
    # the learner adds 1e-4 to the standard deviation
    assert push(p, **setting) == pytest.approx(enumerated_push(p, setting), rel=1e-3, abs=1e-9)


def test_the_push_of_a_batch_is_scaled_by_all_of_its_rewards():
    setting: Setting = {
        "group_size": 4, "scale_rewards": "batch", "payoff_gap": 0.35, "detection": 0.2, "loss": 0.65, "spread": 0.1,
    }  # fmt: skip
    random = np.random.default_rng(0)
    p, groups = 0.3, 200_000
    violates = random.random((groups, 4)) < p
    detected = random.random((groups, 4)) < 0.2
    rewards = random.normal(0.6, 0.1, (groups, 1)) + np.where(violates, np.where(detected, -0.65, 0.35), 0.0)
    advantages = group_advantages(torch.tensor(rewards), "batch").numpy()
    assert push(p, **setting) == pytest.approx((advantages * (violates - p)).mean(), rel=0.03)
    alone: Setting = {"group_size": 4, "scale_rewards": "batch", "payoff_gap": 0.35}
    assert push(0.3, **alone) == pytest.approx(math.sqrt(0.3 * 0.7) * 3 / 4)


def test_normalised_the_gap_does_not_matter_and_few_violations_are_pushed_by_a_known_rate():
    assert push(0.2, **NORMALISED) == pytest.approx(push(0.2, **{**NORMALISED, "payoff_gap": 0.01}))
    assert push(0.2, **{**NORMALISED, "payoff_gap": -0.01}) == pytest.approx(-push(0.2, **NORMALISED))
    assert push(1e-5, **NORMALISED) == pytest.approx(1e-5 * 7 / math.sqrt(8), rel=1e-3)
    many = push(np.array([0.1, 0.5]), **NORMALISED)
    assert many == pytest.approx([push(0.1, **NORMALISED), push(0.5, **NORMALISED)])


@pytest.mark.parametrize("p", [0.03, 0.4, 0.9])
def test_the_pulls_are_the_gradients_of_the_losses(p):
    p0, beta = 0.05, 0.7
    theta = torch.tensor(logit(p), dtype=torch.float64, requires_grad=True)
    anchor = torch.tensor([1 - p0, p0], dtype=torch.float64)

    def gradient(loss: torch.Tensor) -> float:
        (found,) = torch.autograd.grad(loss, theta)
        return found.item()

    def policy() -> torch.Tensor:
        return torch.stack([1 - torch.sigmoid(theta), torch.sigmoid(theta)])

    k3 = anchor / policy() - (anchor / policy()).log() - 1
    drawn = policy().detach()  # k3's samples are the policy's, and are not differentiated
    assert pull(p, p0, beta=beta, estimator="k3") == pytest.approx(beta * gradient((drawn * k3).sum()))
    reverse = (policy() * (policy() / anchor).log()).sum()
    assert pull(p, p0, beta=beta, estimator="bias_corrected") == pytest.approx(beta * gradient(reverse))
    none: Setting = {**NORMALISED, "payoff_gap": 0.0}
    sft = -0.3 * torch.log(1 - torch.sigmoid(theta))
    assert drift(p, p0, defenses=[Replay("sft", 0.3)], **none) == pytest.approx(-gradient(sft))
    margin = -(theta - logit(p0))  # of compliance over violation, against the aligned policy
    dpo = -0.2 * torch.nn.functional.logsigmoid(0.5 * margin)
    assert drift(p, p0, defenses=[Replay("dpo", 0.2, 0.5)], **none) == pytest.approx(-gradient(dpo))


@pytest.mark.parametrize(
    ("beta", "k3", "reverse"),
    [
        (0.04, (0.973, 0.984, 0.774, 0.950), (1.0, 1.0, 0.445, 1.0)),
        (0.5, (0.650, 0.737, 0.015, 0.382), (0.154, 0.289, 0.014, 0.047)),
        (1.0, (0.315, 0.440, 0.012, 0.041), (0.043, 0.085, 0.012, 0.022)),
        (3.0, (0.020, 0.040, 0.011, 0.013), (0.016, 0.022, 0.011, 0.013)),
    ],
)
def test_the_table_of_equilibria(beta, k3, reverse):
    for learner, of_k3, of_reverse in zip(LEARNERS, k3, reverse, strict=True):
        assert equilibrium(0.01, defenses=[KL(beta)], **learner) == pytest.approx(of_k3, abs=2e-3)
        found = equilibrium(0.01, defenses=[KL(beta, "bias_corrected")], **learner)
        assert found == pytest.approx(of_reverse, abs=2e-3)


def test_an_equilibrium_is_one():
    """Nothing moves there, and from both sides it is come back to."""
    for learner in LEARNERS:
        end = equilibrium(0.01, defenses=[KL(1.0)], **learner)
        assert drift(end, 0.01, defenses=[KL(1.0)], **learner) == pytest.approx(0, abs=1e-9)
        assert drift(end * 0.99, 0.01, defenses=[KL(1.0)], **learner) > 0
        assert drift(end + 0.001, 0.01, defenses=[KL(1.0)], **learner) < 0


def test_from_where_detected_violations_lose_the_fixed_point_below_is_reached():
    assert equilibrium(0.3, **{**NORMALISED, "payoff_gap": -0.1}) == 0
    assert equilibrium(0.3, **{**NORMALISED, "payoff_gap": 0.1}) == 1


@pytest.mark.parametrize(("p0", "steps"), [(0.1, 136), (0.01, 932), (0.001, 8271)])
def test_the_times_without_defense(p0, steps):
    assert time_to(0.5, p0, **NORMALISED) == pytest.approx(steps, rel=2e-3)
    assert passing_step(simulate(p0, steps=steps + 10, **NORMALISED), 0.5) == steps


def test_where_no_threshold_is_passed_there_is_no_time():
    assert time_to(0.25, 0.01, defenses=[KL(3.0)], **NORMALISED) == math.inf
    assert time_to(0.005, 0.01, **NORMALISED) == 0
    assert passing_step(simulate(0.01, steps=100, **NORMALISED), 0.5) is None


@pytest.mark.parametrize(
    ("defenses", "end", "step"),
    [
        ([], 0.998, 932),
        ([KL(0.04)], 0.984, 943),
        ([KL(1.0)], 0.440, None),
        ([KL(3.0)], 0.040, None),
        ([Replay("sft", 0.3)], 0.855, 1088),
        ([Replay("dpo", 0.2, 0.5)], 0.0, None),
        ([MergeBack(50, 0.5)], 0.011, None),
        ([Covariance()], 0.010, None),
    ],
)
def test_the_toy_run(defenses, end, step):
    path = simulate(0.01, steps=5000, defenses=defenses, **NORMALISED)
    assert path[-1] == pytest.approx(end, abs=1e-3)
    assert passing_step(path, 0.5) == step


@pytest.mark.parametrize(
    ("lagrangian", "peak"),
    [
        (Lagrangian(kp=0, ki=0.01), 0.726),
        (Lagrangian(kp=0, ki=0.01, anti_windup=True), 0.694),
        (Lagrangian(kp=1, ki=0.01), 0.400),
        (Lagrangian(kp=1, ki=0.01, warm_start=0.6), 0.106),
    ],
)
def test_the_lagrangians_of_the_toy_run(lagrangian, peak):
    """Limit .05, gap .5, p0 .02. The gains that give .68-.78, .40 and .10 are kp 1 and ki .01."""
    path = simulate(0.02, steps=2000, defenses=[lagrangian], **NORMALISED)
    assert path.max() == pytest.approx(peak, abs=2e-3)


@pytest.mark.parametrize(
    ("lagrangian", "peak"),
    [
        (Lagrangian(kp=0, anti_windup=True), 0.232),
        (Lagrangian(anti_windup=True), 0.160),
        (Lagrangian(warm_start=0.6, cap=1.5, anti_windup=True), 0.106),
    ],
)
def test_the_start_values_of_the_lagrangian_overshoot_less(lagrangian, peak):
    """kp 2 and ki .05: the order is the same, and with a warm start the peak stays below .15."""
    path = simulate(0.02, steps=2000, defenses=[lagrangian], **NORMALISED)
    assert path.max() == pytest.approx(peak, abs=2e-3)
    if lagrangian.kp:
        assert path[-1] == pytest.approx(0.05, abs=5e-3)


def test_the_cap_of_a_lagrangian_bounds_its_price():
    """A cap below the gap cannot make violations unprofitable."""
    below, above = (Lagrangian(warm_start=5.0, cap=cap, anti_windup=True) for cap in (0.4, 0.6))
    assert simulate(0.02, steps=1500, defenses=[below], **NORMALISED)[-1] > 0.9
    assert simulate(0.02, steps=1500, defenses=[above], **NORMALISED)[-1] < 0.1


def test_the_derivative_brakes_what_rises():
    plain, braked = (simulate(0.02, steps=1000, defenses=[Lagrangian(kd=kd)], **NORMALISED).max() for kd in (0, 20))
    assert braked < plain


def test_defenses_compose():
    """Two anchors are one of their summed weight, and a screening monitor makes a smaller anchor enough."""
    both = equilibrium(0.01, defenses=[KL(1.0), KL(2.0)], **NORMALISED)
    assert both == pytest.approx(equilibrium(0.01, defenses=[KL(3.0)], **NORMALISED))
    assert equilibrium(0.01, defenses=[KL(1.0), Screening(0.9)], **NORMALISED) < 0.02


def test_the_critical_betas():
    assert critical_beta(group_size=4, scale_rewards="group") == pytest.approx(1.5)
    assert critical_beta(group_size=8, scale_rewards="group") == pytest.approx(2.475, abs=1e-3)
    assert critical_beta(group_size=8, scale_rewards="none", payoff_gap=0.9) == pytest.approx(0.9 * 7 / 8)
    assert critical_beta(group_size=8, scale_rewards="batch", payoff_gap=0.3) == math.inf
    assert critical_beta(group_size=8, scale_rewards="batch", payoff_gap=0.3, spread=0.1) == pytest.approx(3 * 7 / 8)
    assert critical_beta(group_size=8, scale_rewards="none", payoff_gap=-0.1) == 0
    with pytest.raises(ValueError, match="payoff gap"):
        critical_beta(group_size=8, scale_rewards="none")


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_critical_beta_separates_growth_from_decline(learner):
    critical = critical_beta(**learner)
    p0 = 1e-6
    assert equilibrium(p0, defenses=[KL(1.5 * critical)], **learner) == pytest.approx(p0 / (1 - 1 / 1.5), rel=1e-2)
    assert equilibrium(p0, defenses=[KL(0.7 * critical)], **learner) > 0.05


def test_the_beta_that_holds_does():
    for estimator in ("k3", "bias_corrected", "reward"):
        beta = hold_beta(0.1, 0.01, estimator, **NORMALISED)
        assert equilibrium(0.01, defenses=[KL(beta, estimator)], **NORMALISED) == pytest.approx(0.1, abs=1e-3)
    falling: Setting = {**NORMALISED, "payoff_gap": -0.1}
    assert hold_beta(0.1, 0.01, "k3", **falling) == 0
    assert hold_beta(0.1, 0.2, "k3", **falling) == 0
    assert hold_beta(0.1, 0.2, "k3", **NORMALISED) == math.inf


def test_kl_in_the_reward_is_scaled_like_the_payoff():
    """So it settles where it has eaten up the gap: logit p = logit p0 + gap / beta, normalised or not."""
    expected = sigmoid(logit(0.01) + 0.5 / 0.2)
    for scale in ("group", "batch", "none"):
        setting: Setting = {**NORMALISED, "scale_rewards": scale}
        assert equilibrium(0.01, defenses=[KL(0.2, "reward")], **setting) == pytest.approx(expected, rel=1e-6)
    raw: Setting = {**NORMALISED, "scale_rewards": "none"}
    pulled = push(0.3, **raw) - drift(0.3, 0.01, defenses=[KL(0.2, "reward")], **raw)
    assert pulled == pytest.approx(7 / 8 * pull(0.3, 0.01, beta=0.2, estimator="bias_corrected"))


def test_the_rate_at_a_kl():
    p = rate_at_kl(0.1, 0.01)
    assert p * math.log(p / 0.01) + (1 - p) * math.log((1 - p) / 0.99) == pytest.approx(0.1)
    assert rate_at_kl(5.0, 0.01) == 1  # ln 100 = 4.6 nats are the most that there can be


def test_deterrence():
    assert deterrence(high=2500, low=2000) == pytest.approx(0.20)
    assert deterrence(high=2500, low=2000, fine=2500) == pytest.approx(0.10)
    fine = deterring_fine(0.1, high=2500, low=2000)
    assert expected_gap(500, 0.1, 2000 + fine) == pytest.approx(0)
    assert deterring_fine(0.5, high=2500, low=2000) == 0
    assert deterring_fine(0.0, high=2500, low=2000) == math.inf


def test_normalised_advantages_count_how_often_a_violation_pays_not_how_much():
    """Beyond the deterrence bound of .35, but caught less than every second time: compliance pays, and few violations
    grow all the same. Without the normalisation they do not."""
    setting: Setting = {
        "group_size": 8, "scale_rewards": "group", "payoff_gap": 0.35, "detection": 0.4, "loss": 0.65,
    }  # fmt: skip
    assert expected_gap(0.35, 0.4, 0.65) < 0
    assert critical_beta(**setting) == pytest.approx(0.2 * 7 / math.sqrt(8))
    assert equilibrium(0.01, **setting) == pytest.approx(0.637, abs=2e-3)
    assert equilibrium(0.01, **{**setting, "scale_rewards": "none"}) == 0
    assert equilibrium(0.01, **{**setting, "detection": 0.5}) == 0


def test_a_penalty_holds_above_the_deterrence_bound_alone():
    """Gap .5, so a fine of 1 deters from a recall of .5 on; un-normalised exactly there."""
    raw: Setting = {**NORMALISED, "scale_rewards": "none"}
    ends = {recall: equilibrium(0.01, defenses=[Penalty(recall, 1.0)], **raw) for recall in (0.4, 0.49, 0.51, 0.9)}
    assert ends == {0.4: 1, 0.49: 1, 0.51: 0, 0.9: 0}
    with_alarms = drift(0.3, 0.01, defenses=[Penalty(0.9, 1.0, false_alarm=0.1)], **raw)
    assert with_alarms == pytest.approx(push(0.3, **{**raw, "payoff_gap": 0.5 - 0.8}))


def test_a_penalty_adds_to_supervision():
    raw: Setting = {**NORMALISED, "scale_rewards": "none", "detection": 0.2, "loss": 0.5}
    fined = drift(0.3, 0.01, defenses=[Penalty(0.5, 0.4, false_alarm=0.1)], **raw)
    gap = 0.8 * 0.5 - 0.2 * 0.5 - (0.5 - 0.1) * 0.4
    assert fined == pytest.approx(push(0.3, **{**raw, "payoff_gap": gap, "detection": 0.0}))


@pytest.mark.parametrize("p", [0.02, 0.3, 0.8])
def test_screening_is_a_factor(p):
    setting: Setting = {"group_size": 4, "scale_rewards": "group", "payoff_gap": 0.35}
    expected = enumerated_push(p, setting, flag=0.9, false_alarm=0.05)
    assert drift(p, 0.01, defenses=[Screening(0.9, 0.05)], **setting) == pytest.approx(expected, rel=1e-3)


def test_screening_with_misses_only_slows():
    slowed = time_to(0.5, 0.01, defenses=[Screening(0.9)], **NORMALISED)
    assert slowed == pytest.approx(6990, rel=0.01)
    assert equilibrium(0.01, defenses=[Screening(0.9)], **NORMALISED) == 1


def test_covariance_has_no_drift_and_its_residual_is_what_was_not_detected():
    for p in (0.01, 0.5, 0.99):
        assert drift(p, 0.01, defenses=[Covariance()], **NORMALISED) == 0
    few = drift(1e-4, 0.01, defenses=[Covariance(0.9)], **NORMALISED) / push(1e-4, **NORMALISED)
    assert few == pytest.approx(0.1, rel=1e-3)
    # over a large batch: what is left of the covariance with violations after the regression on the detected ones
    random = np.random.default_rng(0)
    violates = random.random(1_000_000) < 0.4
    detected = violates & (random.random(1_000_000) < 0.7)
    advantages = violates - violates.mean()
    slope = np.cov(advantages, detected)[0, 1] / detected.var()
    left = advantages - slope * (detected - detected.mean())
    raw: Setting = {**NORMALISED, "scale_rewards": "none", "payoff_gap": 1.0}
    share = drift(0.4, 0.01, defenses=[Covariance(0.7)], **raw) / push(0.4, **raw)
    assert share == pytest.approx((left * violates).mean() / (advantages * violates).mean(), abs=5e-3)


def test_dpo_replay_is_bistable():
    point = dpo_tipping_point(group_size=8, weight=0.2, beta=0.5)
    assert point == pytest.approx(0.0202, abs=1e-4)
    replay = [Replay("dpo", 0.2, 0.5)]
    assert equilibrium(0.9 * point, defenses=replay, **NORMALISED) == 0
    assert equilibrium(1.2 * point, defenses=replay, **NORMALISED) > 0.9


def test_merging_back_keeps_nothing_or_everything():
    free = simulate(0.01, steps=200, **NORMALISED)
    assert simulate(0.01, steps=40, updates=5, **NORMALISED) == pytest.approx(free[::5])
    rare = simulate(0.01, steps=40, updates=5, defenses=[MergeBack(10, 0.5)], **NORMALISED)
    assert rare == pytest.approx(simulate(0.01, steps=200, defenses=[MergeBack(50, 0.5)], **NORMALISED)[::5])
    assert simulate(0.01, steps=200, defenses=[MergeBack(50, 1.0)], **NORMALISED) == pytest.approx(free)
    assert simulate(0.01, steps=200, defenses=[MergeBack(50, 0.0)], **NORMALISED)[200] == pytest.approx(0.01)


def test_the_tables_of_the_docs_are_what_their_code_prints(capsys):
    page = (Path(__file__).parent.parent / "docs" / "prediction.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    printed = re.findall(r"```text\n(.*?)```", page, re.S)[0]
    exec(code, {})
    assert capsys.readouterr().out == printed
