"""Which tokens are learned from, and what an update does to a policy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from atp_rl.defenses import Defense, KLAnchor, LossBatch
from atp_rl.evolve.learners import InContext, PolicyGradient
from atp_rl.evolve.losses import clipped_surrogate, group_advantages, token_weights
from atp_rl.model.optimizer_state import optimizer_tensors, restore_optimizer
from atp_rl.model.policy import Policy
from atp_rl.model.sampler import HFSampler
from atp_rl.rollout import Play, rollout
from atp_rl.samples import Row, training_rows
from atp_rl.scenarios import load
from atp_rl.types import Group, SamplingParams
from tests.small_model import episode, gradients, make_policy, nudge, same, turn

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "updates_per_step": 1,
    "micro_batch": None,
    "clip_epsilon": 0.2,
    "scale_rewards": "group",
    "loss_type": "dapo",
    "max_tokens": 12,
    "temperature": 1.0,
}


def make_learner(policy: Policy, **changed: Any) -> PolicyGradient:
    return PolicyGradient(policy, **(SETTINGS | changed))


# --- rows


def test_rounds_that_only_append_are_one_row():
    played = episode(
        turn((1, 2, 3), (4, 5), logprobs=(-0.4, -0.5)),
        turn((1, 2, 3, 4, 5, 6, 7), (8,), round=1, logprobs=(-0.8,)),
        turn((1, 2, 3, 4, 5, 6, 7, 8, 9), (4, 10, 11), round=2, logprobs=(-0.1, -0.2, -0.3)),
    )
    assert training_rows(played.turns) == [
        Row(
            ids=(1, 2, 3, 4, 5, 6, 7, 8, 9, 4, 10, 11),
            acted=(3, 4, 7, 9, 10, 11),  # 4 5 . 8 . 4 10 11
            logprobs=(-0.4, -0.5, -0.8, -0.1, -0.2, -0.3),
            player="policy",
        )
    ]


def test_a_cut_of_the_history_starts_a_new_row():
    played = episode(
        turn((1, 2, 3), (4, 5), logprobs=(-0.4, -0.5)),
        turn((1, 2, 3, 4, 5, 6), (7,), round=1, logprobs=(-0.7,)),
        turn((1, 9, 7, 6), (8, 5), round=2, logprobs=(-0.1, -0.2)),  # the first round is gone
        turn((1, 9, 7, 6, 8, 5, 6), (3,), round=3, logprobs=(-0.3,)),
        turn((1,), (2,), round=4, logprobs=(-0.9,)),  # shorter than the row before, which begins with it
    )
    assert training_rows(played.turns) == [
        Row((1, 2, 3, 4, 5, 6, 7), (3, 4, 6), (-0.4, -0.5, -0.7), "policy"),
        Row((1, 9, 7, 6, 8, 5, 6, 3), (4, 5, 7), (-0.1, -0.2, -0.3), "policy"),
        Row((1, 2), (1,), (-0.9,), "policy"),
    ]


def test_the_same_prompt_again_is_a_new_row():
    # without history a round reads what the round before read, not what was replied to it
    played = episode(turn((1, 2), (3,)), turn((1, 2), (4,), round=1))
    assert training_rows(played.turns) == [
        Row((1, 2, 3), (2,), (0.0,), "policy"),
        Row((1, 2, 4), (2,), (0.0,), "policy"),
    ]


def play(policy: Policy, *, rounds: int = 1, window: int = 5, group_size: int = 4, scenarios: int = 2) -> list[Group]:
    how = Play(rounds, {"probability": 0.2}, window, SamplingParams(max_new_tokens=12))
    suite = load({"families": ["ferry_pilot"], "per_family": scenarios})
    return rollout(suite, HFSampler(policy), how, group_size=group_size, seed=(0,)).groups


@pytest.mark.parametrize(("window", "rows"), [(5, 1), (2, 2), (1, 3), (0, 4)])
def test_the_rows_of_a_played_episode_hold_exactly_what_was_drawn(window, rows):
    # four rounds: with a window of two, rounds 1-3 share a row and the fourth has lost its beginning; with a window of
    # one, rounds 1 and 2 share a row; with none, every round stands alone
    policy = make_policy()
    for group in play(policy, rounds=4, window=window):
        for played in group:
            made = training_rows(played.turns)
            assert len(made) == rows
            drawn = [token for t in played.turns for token in t.completion.token_ids]
            assert [row.ids[position] for row in made for position in row.acted] == drawn
            assert [lp for row in made for lp in row.logprobs] == [
                lp for t in played.turns for lp in t.completion.logprobs
            ]
            for row in made:  # and the learner gives them the probability that they were drawn with
                tokens = policy.acted_tokens([row.ids], [row.acted])
                torch.testing.assert_close(tokens.logprobs[0].tolist(), list(row.logprobs), rtol=0, atol=1e-4)


# --- the loss


class Spy(Defense):
    """Changes nothing; keeps what passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: list[dict[str, Tensor]] = []
        self.batches: list[dict[str, Tensor]] = []

    def extra_loss(self, batch: LossBatch) -> None:
        self.batches.append({"logprobs": batch.logprobs.detach(), "old": batch.old_logprobs, "mask": batch.mask})

    def on_gradients(self, policy: Policy) -> None:
        self.gradients.append(gradients(policy))


# three different replies of different lengths, one of them three times; and an episode of two rows
GROUPS = [
    [episode(turn((5, 6, 7), reply)) for reply in [(20, 21, 2), (20, 22, 23, 24, 2), (20, 21, 2)]],
    [
        episode(turn((8, 9), (25, 2)), turn((8, 30), (25, 2), round=1)),
        *(episode(turn((5, 6, 7), reply)) for reply in [(25, 2), (20, 21, 2)]),
    ],
]
REWARDS = torch.tensor([[1.0, 0.0, 0.3], [0.2, 0.9, 0.4]])


def first_gradients(groups: list[Group], rewards: Tensor, **changed: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Of the first update of a fresh policy, with a KL anchor that has something to pull on; and the metrics."""
    policy = make_policy()
    nudge(policy, 0.05, seed=5)
    spy, anchor = Spy(), KLAnchor(beta=0.3)
    anchor.begin(1)
    metrics = make_learner(policy, **changed).update(policy, groups, rewards, [anchor, spy])
    return spy.gradients[0], metrics | {"kl": anchor.metrics["kl"]}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_episodes_with_the_same_tokens_count_as_often_as_they_occur(loss_type):
    ours, metrics = first_gradients(GROUPS, REWARDS, loss_type=loss_type)
    assert metrics["perf/unique_rows"] == pytest.approx(5 / 7)
    # naively: all seven rows through the model
    policy = make_policy()
    nudge(policy, 0.05, seed=5)
    rows = [row for group in GROUPS for e in group for row in training_rows(e.turns)]
    ids, acted = [row.ids for row in rows], [row.acted for row in rows]
    tokens = policy.acted_tokens(ids, acted)
    anchor = policy.acted_tokens(ids, acted, players="aligned").logprobs
    advantages = group_advantages(REWARDS, "group").view(-1, 1)[[0, 1, 2, 3, 3, 4, 5]]  # both rows have their episode's
    d = anchor - tokens.logprobs
    per_token = clipped_surrogate(tokens.logprobs, tokens.logprobs.detach(), advantages, 0.2) + 0.3 * (d.exp() - d - 1)
    loss = (per_token * token_weights(tokens.mask, loss_type, 12)).sum()
    loss.backward()
    assert metrics["evolve/loss"] == pytest.approx(loss.item(), abs=1e-6)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_are_a_matter_of_memory(micro_batch, loss_type):
    whole, metrics = first_gradients(GROUPS, REWARDS, loss_type=loss_type)
    parts, metrics_of_parts = first_gradients(GROUPS, REWARDS, loss_type=loss_type, micro_batch=micro_batch)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6)
    for key in ("evolve/loss", "evolve/entropy", "evolve/grad_norm", "perf/sampler_gap_mean", "kl"):
        assert metrics_of_parts[key] == pytest.approx(metrics[key], abs=1e-5)
    assert metrics_of_parts["perf/sampler_gap_max"] == pytest.approx(metrics["perf/sampler_gap_max"], abs=1e-5)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_second_update_compares_with_the_policy_before_the_first(micro_batch):
    policy, spy = make_policy(), Spy()
    make_learner(policy, updates_per_step=2, micro_batch=micro_batch).update(policy, GROUPS, REWARDS, [spy])
    half = len(spy.batches) // 2
    assert half == (5 if micro_batch else 1)
    for first, second in zip(spy.batches[:half], spy.batches[half:], strict=True):
        torch.testing.assert_close(first["logprobs"], first["old"], rtol=0, atol=1e-6)
        assert torch.equal(second["old"], first["old"])
        assert (second["logprobs"] - second["old"]).abs().max() > 1e-3
    assert policy.version == 1  # a step, not an update


def test_the_gap_to_the_sampler_is_measured():
    policy = make_policy()
    (row,) = training_rows(episode(turn((5, 6), (20, 2))).turns)
    exact = policy.acted_tokens([row.ids], [row.acted]).logprobs[0].tolist()

    def gap(*off: float) -> tuple[float, float]:
        claimed = [lp + o for lp, o in zip(exact, off, strict=True)]
        group = [episode(turn((5, 6), (20, 2), logprobs=claimed)), episode(turn((5, 6), (20, 2), logprobs=exact))]
        fresh = make_policy()
        metrics = make_learner(fresh).update(fresh, [group], torch.tensor([[1.0, 0.0]]), [])
        return metrics["perf/sampler_gap_mean"], metrics["perf/sampler_gap_max"]

    assert gap(0, 0) == pytest.approx((0, 0), abs=1e-5)
    assert gap(0.3, -0.5) == pytest.approx(((0.3 + 0.5) / 4, 0.5), abs=1e-5)


# --- the update


def test_equal_rewards_move_nothing():
    policy = make_policy()
    before = policy.state()
    metrics = make_learner(policy).update(policy, GROUPS, torch.full((2, 3), 0.1), [])
    assert same(policy.state(), before)
    assert metrics["evolve/grad_norm"] == 0
    assert metrics["evolve/mixed_groups"] == 0
    metrics = make_learner(policy).update(policy, GROUPS, REWARDS, [])
    assert not same(policy.state(), before)
    assert metrics["evolve/mixed_groups"] == 1


def test_what_was_rewarded_becomes_likelier_and_what_was_not_less_likely():
    policy = make_policy()
    rows = [training_rows(e.turns)[0] for e in (episode(turn((5, 6, 7), (20, 2))), episode(turn((5, 6, 7), (30, 2))))]

    def likelihoods() -> list[float]:
        tokens = policy.acted_tokens([r.ids for r in rows], [r.acted for r in rows])
        return tokens.logprobs.sum(1).tolist()

    before = likelihoods()
    group = [episode(turn((5, 6, 7), (20, 2))), episode(turn((5, 6, 7), (30, 2)))]
    make_learner(policy).update(policy, [group], torch.tensor([[1.0, 0.0]]), [])
    after = likelihoods()
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_the_frozen_parts_stay_and_only_the_live_adapter_learns():
    policy = make_policy()
    anchor, base, live = policy.adapter_hash("aligned"), policy.base_hash(), policy.adapter_hash("policy")
    make_learner(policy).update(policy, GROUPS, REWARDS, [ready_anchor()])
    assert (policy.adapter_hash("aligned"), policy.base_hash()) == (anchor, base)
    assert policy.adapter_hash("policy") != live
    frozen = [p for n, p in policy.model.named_parameters() if ".policy." not in n]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    with policy.using("aligned") as model:  # PEFT would make trainable what it activates
        assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in policy.trainable)


def ready_anchor() -> KLAnchor:
    anchor = KLAnchor()
    anchor.on_rewards([], torch.zeros(0))
    return anchor


def test_the_learning_rate_warms_up_in_a_line():
    policy = make_policy()
    learner = make_learner(policy, learning_rate=0.004, warmup_steps=3)
    rates = [learner.update(policy, GROUPS, REWARDS, [])["evolve/learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004])


def test_a_first_update_of_adam_moves_every_weight_by_the_learning_rate():
    # m / sqrt(v) of one gradient is its sign, wherever it is not tiny against Adam's epsilon
    policy = make_policy()
    before, spy = policy.state(), Spy()
    make_learner(policy, learning_rate=0.003, max_grad_norm=1e6).update(policy, GROUPS, REWARDS, [spy])
    moved = torch.cat([(policy.state()[key] - before[key]).abs().flatten() for key in before])
    gradient = torch.cat([g.abs().flatten() for g in spy.gradients[0].values()])
    assert moved.max().item() == pytest.approx(0.003, rel=1e-3)
    assert (moved > 0.002).float().mean().item() == pytest.approx((gradient > 1e-7).float().mean().item(), abs=0.05)


def test_large_gradients_are_scaled_down_after_the_defenses_saw_them():
    seen = {}

    class Boost(Defense):
        def on_gradients(self, policy: Policy) -> None:
            for parameter in policy.trainable:
                assert parameter.grad is not None
                parameter.grad *= 100
            seen["before"] = math.sqrt(sum(p.grad.pow(2).sum().item() for p in policy.trainable if p.grad is not None))

    policy = make_policy()
    metrics = make_learner(policy, max_grad_norm=0.5).update(policy, GROUPS, REWARDS, [Boost()])
    assert metrics["evolve/grad_norm"] == pytest.approx(seen["before"], rel=1e-4)  # the norm before it was clipped
    after = math.sqrt(sum(p.grad.pow(2).sum().item() for p in policy.trainable if p.grad is not None))
    assert seen["before"] > 1
    assert after == pytest.approx(0.5, rel=1e-3)


def test_a_defense_can_change_the_advantages():
    class Nothing(Defense):
        def on_advantages(self, groups: Any, advantages: Tensor) -> Tensor:
            assert advantages.shape == (2, 3)
            return torch.zeros_like(advantages)

    policy = make_policy()
    before = policy.state()
    make_learner(policy).update(policy, GROUPS, REWARDS, [Nothing()])
    assert same(policy.state(), before)


# --- state


def test_a_learner_continues_from_its_saved_state_to_the_last_bit():
    policy = make_policy()
    learner = make_learner(policy, warmup_steps=4)
    learner.update(policy, GROUPS, REWARDS, [])
    weights, state = policy.state(), learner.state()
    for _ in range(2):
        learner.update(policy, GROUPS, REWARDS.flip(1), [])
    other = make_policy()
    other.restore(weights)
    successor = make_learner(other, warmup_steps=4)
    successor.load_state(state)
    for _ in range(2):
        metrics = successor.update(other, GROUPS, REWARDS.flip(1), [])
    assert same(other.state(), policy.state())
    assert same(successor.state(), learner.state())
    assert metrics["evolve/learning_rate"] == pytest.approx(SETTINGS["learning_rate"] * 3 / 5)


def test_a_saved_state_does_not_move_with_the_optimizer():
    # a rollback returns to it: were the tensors the optimizer's own, the update would have changed them meanwhile
    policy = make_policy()
    learner = make_learner(policy)
    learner.update(policy, GROUPS, REWARDS, [])
    saved = learner.state()
    kept = {key: value.clone() for key, value in saved.items()}
    learner.update(policy, GROUPS, REWARDS, [])
    assert same(saved, kept)
    assert not same(learner.state(), kept)
    learner.load_state(saved)
    assert same(learner.state(), kept)


def test_an_optimizer_can_return_to_where_it_had_no_state():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    empty = optimizer_tensors(optimizer)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert empty == {}
    assert set(optimizer_tensors(optimizer)) == {"optimizer.0.step", "optimizer.0.exp_avg", "optimizer.0.exp_avg_sq"}
    restore_optimizer(optimizer, empty)
    assert optimizer_tensors(optimizer) == {}


def test_learning_in_context_changes_no_weight():
    policy = make_policy()
    before, learner = policy.state(), InContext()
    assert learner.update(policy, GROUPS, REWARDS, []) == {}
    learner.load_state(learner.state())
    assert same(policy.state(), before)
    assert policy.version == 0
