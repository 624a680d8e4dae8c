"""L2 anchor and EWC: the pull by hand, and the Fisher information against a plain loop."""

from __future__ import annotations

import pytest
import torch

from atp_rl.defenses.l2_anchor import EWC, L2Anchor
from atp_rl.defenses.pairs import answer_logprobs, read_pairs
from atp_rl.types import InputError
from tests.small_model import gradients, make_policy, nudge, same
from tests.small_pairs import setting


def test_each_update_takes_back_its_share_of_the_distance():
    policy = make_policy()
    anchor = L2Anchor(pull=0.1)
    anchor.prepare(setting(policy))
    aligned = policy.state()
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 0.5
    anchor.begin(1)
    anchor.after_update(policy)
    for key, weight in policy.state().items():
        torch.testing.assert_close(weight, aligned[key] + 0.45)
    numbers = sum(weight.numel() for weight in aligned.values())
    assert anchor.metrics["taken_back"] == pytest.approx(0.05 * numbers**0.5, rel=1e-4)
    for _ in range(2):
        anchor.after_update(policy)
    for key, weight in policy.state().items():
        torch.testing.assert_close(weight, aligned[key] + 0.5 * 0.9**3)


@pytest.mark.parametrize("kind", [L2Anchor, EWC])
def test_the_aligned_weights_stay_to_the_last_bit(kind):
    policy = make_policy()
    anchor = kind()
    anchor.prepare(setting(policy))
    aligned = policy.state()
    anchor.begin(1)
    anchor.after_update(policy)
    assert same(policy.state(), aligned)
    assert anchor.metrics["taken_back"] == 0


def test_a_full_pull_is_the_aligned_adapter():
    policy = make_policy()
    anchor = L2Anchor(pull=1.0)
    anchor.prepare(setting(policy))
    aligned = policy.state()
    nudge(policy, 0.05, seed=3)
    anchor.after_update(policy)
    for key, weight in policy.state().items():
        torch.testing.assert_close(weight, aligned[key])


def test_the_fisher_information_is_that_of_the_aligned_adapter_answer_by_answer():
    policy = make_policy()
    ewc = EWC(pairs=3)
    ewc.prepare(setting(policy, 3))
    squares = {name: torch.zeros_like(weight) for name, weight in policy.state().items()}
    for pair in read_pairs(setting(policy, 3), "x"):
        policy.model.zero_grad()
        answer_logprobs(policy, [pair.chosen], "policy").sum().backward()
        for name, gradient in gradients(policy).items():
            squares[name] += gradient**2
    policy.model.zero_grad()
    mean = sum(s.sum() for s in squares.values()) / sum(s.numel() for s in squares.values())
    nudge(policy, 0.05, seed=3)  # it is taken where the policy started, not where it is now
    now = policy.state()
    policy.trainable[0].grad = torch.ones_like(policy.trainable[0])
    fisher = ewc.importance(policy)
    assert same(policy.state(), now)
    assert (policy.trainable[0].grad == 1).all()
    assert fisher.keys() == squares.keys()
    for name, square in squares.items():
        torch.testing.assert_close(fisher[name], square / mean, rtol=1e-3, atol=1e-5)
    assert sum(float(f.sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values()) == pytest.approx(1)


def test_a_weight_is_pulled_by_what_the_answers_depend_on_it_and_never_past_the_aligned_one():
    policy = make_policy()
    ewc = EWC(pull=0.1)
    ewc.prepare(setting(policy))
    aligned = policy.state()
    key = next(iter(aligned))
    ewc.fisher = {name: torch.ones_like(weight) for name, weight in aligned.items()}
    ewc.fisher[key] = torch.zeros_like(aligned[key])
    ewc.fisher[key][0, :3] = torch.tensor([0.0, 2.0, 50.0])
    with torch.no_grad():
        policy.by_key()[key].add_(1)
    ewc.after_update(policy)
    away = (policy.state()[key] - aligned[key])[0, :3]
    assert away.tolist() == pytest.approx([1.0, 0.8, 0.0], abs=1e-6)


def test_the_fisher_information_is_paid_once_and_goes_through_a_resume():
    policy = make_policy()
    ewc, successor = EWC(pairs=4), EWC(pairs=4)
    for defense in (ewc, successor):
        defense.prepare(setting(policy))
    with ewc.paying(policy):
        ewc.after_update(policy)
        ewc.after_update(policy)
    assert ewc.cost.forwards == 4
    successor.load_tensors(ewc.tensors())
    with successor.paying(policy):
        successor.after_update(policy)
    assert successor.cost.forwards == 0
    assert same(successor.fisher, ewc.fisher)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2Anchor(pull=0.0), r"l2_anchor: `pull` must be in \(0, 1\], got 0.0"),
        (lambda: EWC(pull=1.5), r"ewc: `pull` must be in \(0, 1\]"),
        (lambda: EWC(pairs=0), "ewc: `pairs` must be at least 1, got 0"),
        (lambda: EWC().prepare(setting(make_policy(), 0)), "ewc needs alignment's preference pairs"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
