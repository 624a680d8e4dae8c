"""The loss functions against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from atp_rl.evolve.losses import clipped_surrogate, group_advantages, token_weights

# --- advantages


def test_advantages_of_a_group_by_its_own_spread():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.9, 0.7, 0.8, 0.8]])
    # means 1/2 and 4/5; sample variances (4 x 1/4) / 3 = 1/3 and (2 x 1/100) / 3 = 1/150
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 0.1 / (math.sqrt(1 / 150) + 1e-4)
    expected = torch.tensor([[a, -a, a, -a], [b, -b, 0.0, 0.0]])
    torch.testing.assert_close(group_advantages(rewards, "group"), expected)


def test_advantages_by_the_spread_of_the_batch():
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    # the deviation is from the group's mean, the spread is that of all four: mean 1/2, variance (1/4 + 1/4) / 3
    a = 0.5 / (math.sqrt(1 / 6) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, "batch"), torch.tensor([[a, -a], [0.0, 0.0]]))


def test_advantages_without_scaling_keep_the_size_of_the_gap():
    rewards = torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    torch.testing.assert_close(group_advantages(rewards, "none"), torch.tensor([[0.5, -0.5], [0.05, -0.05]]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_advantages_of_exactly_zero(scale):
    # in single precision the mean of seven times 0.1 is not 0.1, and the division would blow the rest up
    rewards = torch.full((3, 7), 0.1)
    advantages = group_advantages(rewards, scale)
    assert advantages.dtype == torch.float32
    assert advantages.abs().max().item() < 1e-9


@pytest.mark.parametrize("scale", ["group", "none"])
def test_the_advantages_of_a_group_do_not_depend_on_the_other_groups(scale):
    rewards = torch.tensor([[1.0, 0.2, 0.4], [0.0, 0.3, 0.9]])
    assert torch.equal(group_advantages(rewards, scale)[:1], group_advantages(rewards[:1], scale))


# --- weights

# rows of 3, 1 and 2 drawn tokens
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)


def test_dapo_weighs_every_token_alike():
    expected = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 0]]) / 6
    torch.testing.assert_close(token_weights(MASK, "dapo", max_tokens=99), expected)


def test_grpo_weighs_every_row_alike():
    expected = torch.tensor([[1 / 9, 1 / 9, 1 / 9], [1 / 3, 0, 0], [1 / 6, 1 / 6, 0]])
    torch.testing.assert_close(token_weights(MASK, "grpo", max_tokens=99), expected)


def test_dr_grpo_weighs_by_the_longest_possible_row():
    expected = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 0]]) / (3 * 8)
    torch.testing.assert_close(token_weights(MASK, "dr_grpo", max_tokens=8), expected)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_a_row_without_tokens_weighs_nothing(loss_type):
    weights = token_weights(torch.tensor([[False, False], [True, True]]), loss_type, max_tokens=4)
    assert weights.isfinite().all()
    assert weights[0].tolist() == [0.0, 0.0]


# --- surrogate


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # slope: of the loss in log pi, -ratio x advantage where the unclipped term is the smaller one, else none
        (1.0, 2.0, -2.0, -2.0),  # on policy
        (1.1, 2.0, -2.2, -2.2),  # inside the clip
        (1.5, 2.0, -2.4, 0.0),  # more likely already: capped at 1.2
        (0.5, 2.0, -1.0, -1.0),  # less likely although good: not capped
        (1.5, -2.0, 3.0, 3.0),  # more likely although bad: not capped
        (0.5, -2.0, 1.6, 0.0),  # less likely already: capped at 0.8
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_the_surrogate_is_clipped_on_the_side_that_has_gone_far_enough(ratio, advantage, loss, slope):
    old = torch.tensor([[math.log(0.3)]])
    logprobs = (old + math.log(ratio)).requires_grad_()
    result = clipped_surrogate(logprobs, old, torch.tensor([[advantage]]), clip_epsilon=0.2)
    result.sum().backward()
    assert result.item() == pytest.approx(loss, abs=1e-6)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-6)


def test_an_advantage_counts_for_every_token_of_its_row():
    logprobs = torch.log(torch.tensor([[0.5, 0.25], [0.5, 0.25]]))
    loss = clipped_surrogate(logprobs, logprobs, torch.tensor([[1.0], [-3.0]]), clip_epsilon=0.2)
    assert loss.tolist() == [[-1.0, -1.0], [3.0, 3.0]]
