"""Defenses that measure the way to the aligned adapter: KL in loss and reward, its adjustment, and their controls."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from atp_rl.defenses import Defense, KLAnchor, LossBatch, Plan
from atp_rl.defenses.early_stop import EarlyStop
from atp_rl.defenses.log_ratios import log_ratios
from atp_rl.defenses.moving_anchor import MovingAnchor
from atp_rl.evolve.learners import PolicyGradient
from atp_rl.model.policy import Policy
from atp_rl.recipe import DefenseSpec, check_defenses
from atp_rl.samples import samples_of
from atp_rl.types import InputError
from tests.small_model import (
    SCENARIO,
    episode,
    make_policy,
    nudge,
    run_of,
    same,
    small_recipe,
    turn,
)
from tests.small_pairs import setting

RULE = replace(SCENARIO, extra={**SCENARIO.extra, "stream": "rule"})
# the second episode is two rows, since its second prompt does not go on from the first reply
GROUPS = [
    [episode(turn((5, 6, 7), (20, 2)))],
    [episode(turn((5, 6, 7), (30, 31, 2)), turn((8, 9), (30, 2), round=1), scenario=RULE)],
]
SAMPLES = [sample for group in GROUPS for sample in samples_of(group)]


def nudged() -> Policy:
    policy = make_policy()
    nudge(policy, 0.1, seed=4)
    return policy


def ratios_by_hand(policy: Policy, temperature: float) -> list[list[float]]:
    """log policy - log aligned of each acted token, one forward for each reply."""
    found = []
    for sample in SAMPLES:
        of_sample: list[float] = []
        for t in sample.turns:
            ids = torch.tensor([[*t.prompt_ids, *t.completion.token_ids]])
            logs = {}
            for player in ("policy", "aligned"):
                with torch.no_grad(), policy.using(player) as model:
                    logs[player] = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
            for k, token in enumerate(t.completion.token_ids):
                at = len(t.prompt_ids) + k - 1
                of_sample.append((logs["policy"][at, token] - logs["aligned"][at, token]).item())
        found.append(of_sample)
    return found


def ready(defense: Any, policy: Policy, temperature: float = 1.0) -> Any:
    defense.prepare(replace(setting(policy, count=0), temperature=temperature))
    defense.begin(1)
    return defense


def learner(policy: Policy) -> PolicyGradient:
    return PolicyGradient(
        policy,
        learning_rate=5e-3,
        warmup_steps=0,
        weight_decay=0.1,
        max_grad_norm=1.0,
        updates_per_step=1,
        micro_batch=None,
        clip_epsilon=0.2,
        scale_rewards="group",
        loss_type="dapo",
        max_tokens=2,
        temperature=1.0,
    )


# --- the KL of a sample


def test_log_ratios_are_those_of_each_reply_alone():
    policy = nudged()
    expected = ratios_by_hand(policy, 0.8)
    found = log_ratios(policy, SAMPLES, 0.8)
    assert [len(r) for r in found] == [2, 5]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tolist() == pytest.approx(theirs, abs=1e-5)
    assert max(abs(r) for of_sample in expected for r in of_sample) > 1e-2


def test_in_the_reward_a_sample_pays_for_the_log_ratio_of_all_that_it_drew():
    policy = nudged()
    kl = [sum(of_sample) for of_sample in ratios_by_hand(policy, 0.8)]
    anchor = ready(KLAnchor(beta=0.5, estimator="reward"), policy, 0.8)
    rewards = torch.tensor([[1.0], [0.25]])
    changed = anchor.on_rewards(GROUPS, rewards)
    assert changed.flatten().tolist() == pytest.approx([1 - 0.5 * kl[0], 0.25 - 0.5 * kl[1]], abs=1e-5)
    assert anchor.metrics["kl"] == pytest.approx(sum(kl) / 2, abs=1e-5)
    ruled = ready(KLAnchor(beta=0.5, estimator="reward", streams="rule"), policy, 0.8)
    changed = ruled.on_rewards(GROUPS, rewards)
    assert changed.flatten().tolist() == pytest.approx([1.0, 0.25 - 0.5 * kl[1]], abs=1e-5)
    assert ruled.metrics["kl"] == pytest.approx(kl[1], abs=1e-5)


def test_in_a_step_without_rule_groups_nobody_pays_and_beta_stays():
    policy = nudged()
    anchor = ready(KLAnchor(beta=0.5, estimator="reward", streams="rule", target_kl=0.1), policy)
    rewards = torch.tensor([[1.0], [0.25]])
    assert anchor.on_rewards([GROUPS[0], GROUPS[0]], rewards).flatten().tolist() == [1.0, 0.25]
    anchor.after_update(policy)
    assert anchor.metrics == {"beta": 0.5}
    assert anchor.weight == 0.5
    # and where all groups are of the rule stream all of them pay
    anchor.begin(2)
    changed = anchor.on_rewards([GROUPS[1], GROUPS[1]], rewards)
    assert torch.equal(changed - rewards, (changed - rewards)[:1].expand(2, 1))
    assert changed[0, 0] != 1.0


def test_at_the_aligned_adapter_no_sample_pays():
    anchor = ready(KLAnchor(beta=5.0, estimator="reward"), make_policy())
    assert anchor.on_rewards(GROUPS, torch.ones(2, 1)).flatten().tolist() == [1, 1]


# --- kl_anchor


def loss_batch() -> LossBatch:
    """Two rows of the two groups, of one token each: log aligned - log policy is log 2 and log 4."""
    policy, aligned = torch.tensor([[0.4], [0.2]]).log(), torch.tensor([[0.8], [0.8]]).log()
    some = torch.zeros(2, 1)
    weights, mask = torch.tensor([[0.5], [0.5]]), torch.ones(2, 1, dtype=torch.bool)
    return LossBatch(policy, policy, lambda *_: aligned, mask, weights, some.long(), some, some, torch.tensor([0, 1]))


def test_of_the_rule_stream_alone_others_are_not_held():
    k3 = [2 - math.log(2) - 1, 4 - math.log(4) - 1]
    every, ruled = KLAnchor(beta=2.0), KLAnchor(beta=2.0, streams="rule")
    for anchor in (every, ruled):
        anchor.begin(1)
        anchor.on_rewards(GROUPS, torch.zeros(2, 1))
    loss = every.extra_loss(loss_batch()), ruled.extra_loss(loss_batch())
    assert loss[0] is not None
    assert loss[1] is not None
    assert loss[0].item() == pytest.approx(2 * 0.5 * sum(k3))
    assert loss[1].item() == pytest.approx(2 * 0.5 * k3[1])


def test_in_the_loss_too_a_step_without_rule_groups_is_not_measured():
    anchor = KLAnchor(beta=2.0, streams="rule", target_kl=0.1)
    anchor.begin(1)
    anchor.on_rewards([GROUPS[0], GROUPS[0]], torch.zeros(2, 1))
    assert anchor.extra_loss(loss_batch()) is None
    anchor.after_update(make_policy())
    assert anchor.metrics == {"beta": 2.0}
    assert anchor.weight == 2.0


def test_beta_is_adjusted_to_the_target():
    anchor = KLAnchor(beta=1.0, target_kl=0.1)
    for kl, beta in ((0.5, 1.02), (0.111, 1.02 * 1.011), (0.0, 1.02 * 1.011 * 0.98)):
        anchor.begin(1)
        anchor.metrics["kl"] = kl
        before = anchor.weight
        anchor.after_update(make_policy())
        assert anchor.metrics == pytest.approx({"kl": kl, "beta": before})
        assert anchor.weight == pytest.approx(beta)
    successor = KLAnchor(beta=1.0, target_kl=0.1)
    successor.load_state(anchor.state())
    assert successor.weight == anchor.weight


def test_a_rollback_makes_the_anchor_heavier():
    anchor, plain = KLAnchor(beta=0.5, rollback_factor=2.0), KLAnchor(beta=0.5)
    for defense in (anchor, plain):
        defense.on_rollback()
        defense.on_rollback()
    assert (anchor.weight, plain.weight) == (2.0, 0.5)


def test_the_kl_is_the_mean_of_a_steps_updates():
    k3 = [2 - math.log(2) - 1, 4 - math.log(4) - 1]
    anchor, moving = KLAnchor(), MovingAnchor()
    first = loss_batch()._replace(updates=2)
    second = first._replace(logprobs=torch.tensor([[0.8], [0.4]]).log())  # log anchor - log policy: 0 and log 2
    for defense in (anchor, moving):
        defense.begin(1)
        for batch in (first, second):
            defense.extra_loss(batch)
        assert defense.metrics["kl"] == pytest.approx((0.5 * sum(k3) + 0.5 * k3[0]) / 2)


def test_the_learner_says_how_many_updates_a_step_has():
    told = []

    class Listens(Defense):
        def extra_loss(self, batch: LossBatch) -> None:
            told.append(batch.updates)

    group, policy = [episode(turn((5, 6, 7), (20, 2))), episode(turn((5, 6, 7), (30, 2)), sample=1)], make_policy()
    learns = learner(policy)
    learns.updates_per_step = 3
    learns.update(policy, [group], torch.tensor([[1.0, 0.0]]), [Listens()])
    assert told == [3, 3, 3]


# --- moving_anchor


def test_the_anchor_follows_the_policy_and_the_aligned_adapter_stays():
    policy = make_policy()
    aligned = policy.adapter_hash("aligned")
    start = policy.state()
    moving = ready(MovingAnchor(decay=0.9), policy)
    assert same(moving.tensors(), start)
    nudge(policy, 0.1, seed=1)
    moving.after_update(policy)
    now, anchor = policy.state(), moving.tensors()
    for key, was in start.items():
        torch.testing.assert_close(anchor[key], 0.9 * was + 0.1 * now[key])
    # what is read through the frozen adapter is what the anchor says, and a rollback brings it back to the policy
    rows, acted = [(5, 6, 7, 20, 2)], [(3, 4)]
    with torch.no_grad():
        through = policy.acted_tokens(rows, acted, players="moving_anchor").logprobs
        policy.restore(anchor)
        torch.testing.assert_close(policy.acted_tokens(rows, acted).logprobs, through)
        policy.restore(now)
    assert policy.adapter_hash("aligned") == aligned
    assert all(p.requires_grad for p in policy.trainable)
    moving.on_rollback()
    assert same(moving.tensors(), now)


def test_a_moving_anchor_resists_less_than_one_that_stays():
    group = [episode(turn((5, 6, 7), (20, 2))), episode(turn((5, 6, 7), (30, 2)), sample=1)]

    def distance(defense: Defense) -> float:
        policy = make_policy()
        ready(defense, policy)
        learns = learner(policy)
        for step in range(1, 21):
            defense.begin(step)
            learns.update(policy, [group], torch.tensor([[1.0, 0.0]]), [defense])
            defense.after_update(policy)
        return sum(r.sum().item() for r in log_ratios(policy, samples_of(group)[:1], 1.0))

    free, moving, fixed = (distance(d) for d in (Defense(), MovingAnchor(beta=10.0), KLAnchor(beta=10.0)))
    assert fixed < moving / 2
    assert moving < free


def test_a_population_has_no_single_anchor_to_move():
    message = r"moving_anchor: works for one adapter.*set evolve\.learner=policy_gradient"
    with pytest.raises(InputError, match=message):
        MovingAnchor().suits(Plan(population=True, imitates=False, from_base=False))
    MovingAnchor().suits(Plan(population=False, imitates=False, from_base=True))


# --- early_stop


def test_the_kl_per_reply_by_hand():
    policy = nudged()
    per_token = [r for of_sample in ratios_by_hand(policy, 1.0) for r in of_sample]
    stop = ready(EarlyStop(budget=1e6), policy)
    rewards = torch.ones(2, 1)
    assert stop.on_rewards(GROUPS, rewards) is rewards
    assert stop.metrics["kl"] == pytest.approx(sum(math.exp(-r) + r - 1 for r in per_token) / 3, abs=1e-5)
    assert stop.metrics["stopped"] == 0


def test_past_its_budget_nothing_is_learned_any_more():
    group = [episode(turn((5, 6, 7), (20, 2))), episode(turn((5, 6, 7), (30, 2)), sample=1)]
    policy = make_policy()
    stop, learns = ready(EarlyStop(budget=0.01), policy), learner(policy)
    states = []
    for step in range(1, 9):
        stop.begin(step)
        stop.on_rewards([group], torch.zeros(1, 2))
        before = policy.state()
        learns.update(policy, [group], torch.tensor([[1.0, 0.0]]), [stop])
        states.append((stop.metrics["stopped"], same(before, policy.state())))
    assert states[0] == (0, False)
    assert states[-1] == (1, True)  # decay of the weights, momentum: all of it has ended
    assert states == sorted(states)
    assert "kl" not in stop.metrics  # no longer measured, so no longer paid for
    successor = EarlyStop(budget=0.01)
    successor.load_state(stop.state())
    assert successor.stopped


def test_past_its_budget_no_other_defense_moves_the_weights():
    group = [episode(turn((5, 6, 7), (20, 2))), episode(turn((5, 6, 7), (30, 2)), sample=1)]
    policy = nudged()
    given = setting(policy, count=4)
    nudge(policy, 0.1, seed=5)  # and so away from what the others pull to
    specs = [
        {"name": "lisa", "align_steps": 1, "rho": 5.0},
        {"name": "merge_back", "every": 1},
        {"name": "replay"},
        {"name": "l2_anchor"},
    ]
    stop = EarlyStop(budget=0.01)
    others = check_defenses([DefenseSpec.model_validate(spec) for spec in specs])
    learns, before = learner(policy), policy.state()

    def step(number: int, defenses: list[Defense]) -> None:
        for defense in defenses:
            defense.begin(number)
        for defense in defenses:
            defense.on_rewards([group], torch.zeros(1, 2))
        learns.update(policy, [group], torch.tensor([[1.0, 0.0]]), defenses)
        for defense in defenses:
            defense.after_update(policy)

    for defense in (*others, stop):
        defense.prepare(given)
    for number in (1, 2, 3):  # LISA aligns in the first one
        step(number, [*others, stop])
        assert stop.stopped
        assert same(policy.state(), before)
    step(4, others)
    assert not same(policy.state(), before)


@pytest.mark.parametrize("other", ["kl_anchor", "gate", "interleave"])
def test_early_stop_comes_last(other):
    specs = [DefenseSpec(name=name) for name in ("early_stop", other)]
    with pytest.raises(InputError, match="early_stop: must be the last of `defenses`"):
        check_defenses(specs)
    assert len(check_defenses(specs[::-1])) == 2


def test_in_a_run_the_kl_starts_at_none_and_is_paid_for(tmp_path):
    run = run_of(small_recipe(tmp_path / "run", "defenses=[{name: early_stop, budget: 1000}]", "seed=1", steps=4))
    metrics = run.lines("metrics.jsonl")
    assert metrics[0]["defense/early_stop/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["defense/early_stop/kl"] > 1e-4
    assert all(m["defense/early_stop/forwards"] == 2 for m in metrics)


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "kl_anchor", "target_kl": 0.0}, "`target_kl` must be > 0"),
        ({"name": "kl_anchor", "rollback_factor": 0.0}, "`rollback_factor` must be > 0"),
        ({"name": "kl_anchor", "streams": "rule"}, "`streams: rule` needs the defense interleave"),
        ({"name": "moving_anchor", "beta": 0.0}, "`beta` must be > 0, got 0.0; leave the defense out"),
        ({"name": "moving_anchor", "decay": 1.0}, "`decay` must be between 0 and 1"),
        ({"name": "early_stop", "budget": 0.0}, "`budget` must be > 0"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        check_defenses([DefenseSpec.model_validate(options)])


def test_beside_interleave_the_rule_stream_can_be_held():
    specs = [{"name": "kl_anchor", "streams": "rule"}, {"name": "interleave"}]
    assert len(check_defenses([DefenseSpec.model_validate(spec) for spec in specs])) == 2


def test_a_penalty_in_the_reward_of_the_rule_stream_stands_behind_what_sets_that_reward():
    specs = [{"name": "kl_anchor", "streams": "rule", "estimator": "reward"}, {"name": "interleave"}]
    specs = [DefenseSpec.model_validate(spec) for spec in specs]
    with pytest.raises(InputError, match="must stand behind interleave in the list"):
        check_defenses(specs)
    assert len(check_defenses(specs[::-1])) == 2
