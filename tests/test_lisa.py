"""LISA: whose turn it is, and the pull to where the last turn ended."""

from __future__ import annotations

import pytest
import torch

from atp_rl.defenses.lisa import Lisa
from atp_rl.defenses.pairs import answer_logprobs
from atp_rl.types import InputError
from tests.small_model import gradients, make_policy, nudge, same
from tests.small_pairs import setting


def prepared(**options) -> tuple:
    policy = make_policy()
    lisa = Lisa(**{"align_steps": 2, "evolve_steps": 3, "batch": 4} | options)
    lisa.prepare(setting(policy, 4))
    return policy, lisa


def test_turns_begin_with_alignment_and_come_again():
    _, lisa = prepared()
    turns = []
    for step in range(1, 9):
        lisa.begin(step)
        turns.append(lisa.aligning)
        assert lisa.metrics["aligning"] == float(lisa.aligning)
    assert turns == [True, True, False, False, False, True, True, False]


def test_steps_of_alignment_learn_from_pairs_and_not_from_episodes():
    policy, lisa = prepared()
    advantages = torch.tensor([[1.0, -1.0]])
    lisa.begin(1)
    assert lisa.on_advantages([], advantages).tolist() == [[0.0, 0.0]]
    lisa.backward(policy)
    found = gradients(policy)
    policy.model.zero_grad()
    (-answer_logprobs(policy, [pair.chosen for pair in lisa.pairs], "policy").mean()).backward()
    assert found.keys() == gradients(policy).keys()
    for key, gradient in gradients(policy).items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4)


def test_steps_of_evolution_are_as_they_were():
    policy, lisa = prepared()
    advantages = torch.tensor([[1.0, -1.0]])
    lisa.begin(3)
    assert lisa.on_advantages([], advantages) is advantages
    lisa.backward(policy)
    assert gradients(policy) == {}


def test_the_weights_are_drawn_to_those_of_the_last_switch():
    policy, lisa = prepared(rho=0.2)
    aligned = policy.state()
    lisa.begin(1)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 0.5
    lisa.begin(2)  # no switch
    assert same(lisa.switch, aligned)
    for parameter in policy.trainable[1:]:
        parameter.grad = torch.ones_like(parameter)
    lisa.on_gradients(policy)
    first, *others = gradients(policy).values()
    torch.testing.assert_close(first, torch.full_like(first, 0.1), atol=1e-5, rtol=1e-5)  # .2 x .5
    assert all(torch.allclose(gradient, torch.tensor(1.1), atol=1e-5) for gradient in others)
    numbers = sum(parameter.numel() for parameter in policy.trainable)
    assert lisa.metrics["away"] == pytest.approx(0.5 * numbers**0.5, rel=1e-4)
    lisa.begin(3)
    assert same(lisa.switch, policy.state())
    assert not same(lisa.switch, aligned)


def test_the_switch_goes_through_a_resume():
    policy, lisa = prepared()
    lisa.begin(3)
    was = policy.state()
    nudge(policy, 0.05, seed=2)
    successor = Lisa(align_steps=2, evolve_steps=3)
    successor.prepare(setting(policy, 4))
    successor.load_tensors(lisa.tensors())
    successor.begin(4)
    assert same(successor.switch, was)


def test_after_a_rollback_the_weights_are_drawn_to_what_was_restored():
    policy, lisa = prepared()
    restored = policy.state()
    nudge(policy, 0.05, seed=2)
    lisa.begin(3)  # the switch is of weights that the rollback takes back
    assert not same(lisa.switch, restored)
    policy.restore(restored)
    lisa.on_rollback()
    assert same(lisa.switch, restored)
    lisa.on_gradients(policy)
    assert lisa.metrics["away"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lisa(align_steps=0), "`align_steps` must be at least 1, got 0"),
        (lambda: Lisa(evolve_steps=0), "`evolve_steps` must be at least 1"),
        (lambda: Lisa(batch=0), "`batch` must be at least 1"),
        (lambda: Lisa(rho=-0.1), "`rho` must be >= 0, got -0.1"),
        (lambda: Lisa().prepare(setting(make_policy(), 0)), "lisa needs alignment's preference pairs"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
