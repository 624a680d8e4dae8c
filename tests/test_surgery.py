"""Surgery: two-dimensional gradients by hand, and no step against alignment in the model."""

from __future__ import annotations

import math

import pytest
import torch

from atp_rl.defenses.pairs import answer_logprobs
from atp_rl.defenses.surgery import Surgery, cut
from atp_rl.types import InputError
from tests.small_model import gradients, make_policy
from tests.small_pairs import setting


@pytest.mark.parametrize(
    ("gradient", "alignment", "left", "cosine"),
    [
        ((1.0, -1.0), (0.0, 1.0), (1.0, 0.0), -1 / math.sqrt(2)),
        ((1.0, -1.0), (0.0, 5.0), (1.0, 0.0), -1 / math.sqrt(2)),  # its size does not matter
        ((1.0, 1.0), (0.0, 1.0), (1.0, 1.0), 1 / math.sqrt(2)),
        ((3.0, 0.0), (0.0, 1.0), (3.0, 0.0), 0.0),
        ((-2.0, -4.0), (1.0, 2.0), (0.0, 0.0), -1.0),
        ((2.0, -1.0), (-1.0, 1.0), (0.5, 0.5), -3 / math.sqrt(10)),
        ((1.0, 2.0), (0.0, 0.0), (1.0, 2.0), 0.0),  # no alignment gradient
    ],
)
def test_by_hand(gradient, alignment, left, cosine):
    # as two tensors, which are one vector together
    parts = [torch.tensor([x]) for x in gradient]
    found, angle = cut(parts, [torch.tensor([x]) for x in alignment])
    assert [float(part) for part in found] == pytest.approx(left)
    assert angle == pytest.approx(cosine)
    inner = sum(float(f) * a for f, a in zip(found, alignment, strict=True))
    assert inner >= 0
    if cosine >= 0:
        assert all(new is old for new, old in zip(found, parts, strict=True))


def prepared(refresh: int = 1) -> tuple:
    policy = make_policy()
    surgery = Surgery(prompts=4, refresh=refresh)
    surgery.prepare(setting(policy, 4))  # all pairs are taken
    surgery.begin(1)
    loss = -answer_logprobs(policy, [pair.chosen for pair in surgery.pairs], "policy").mean()
    loss.backward()
    alignment = gradients(policy)
    policy.model.zero_grad()
    return policy, surgery, alignment


def test_a_step_straight_against_alignment_is_not_taken():
    policy, surgery, alignment = prepared()
    for parameter, gradient in zip(policy.trainable, alignment.values(), strict=True):
        parameter.grad = -2 * gradient
    surgery.on_gradients(policy)
    assert surgery.metrics["cosine"] == pytest.approx(-1, abs=1e-4)
    assert surgery.metrics["removed"] == pytest.approx(1, abs=1e-4)
    size = sum(float(g.square().sum()) for g in alignment.values()) ** 0.5
    assert sum(float(g.square().sum()) for g in gradients(policy).values()) ** 0.5 < 1e-3 * size


def test_a_step_along_with_alignment_stays_to_the_last_bit():
    policy, surgery, alignment = prepared()
    for parameter, gradient in zip(policy.trainable, alignment.values(), strict=True):
        parameter.grad = 0.5 * gradient
    surgery.on_gradients(policy)
    assert surgery.metrics["cosine"] == pytest.approx(1, abs=1e-4)
    assert surgery.metrics["removed"] == 0
    found = gradients(policy)
    assert all(torch.equal(found[key], 0.5 * gradient) for key, gradient in alignment.items())


@pytest.mark.parametrize("seed", range(6))
def test_afterwards_no_step_goes_against_alignment(seed):
    policy, surgery, alignment = prepared()
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = gradients(policy)
    surgery.on_gradients(policy)
    after = gradients(policy)

    def inner(g: dict[str, torch.Tensor]) -> float:
        return sum(float((g[key].double() * a.double()).sum()) for key, a in alignment.items())

    size = sum(float(a.square().sum()) for a in alignment.values()) ** 0.5
    if inner(before) < 0:
        assert abs(inner(after)) < 1e-4 * size
        assert surgery.metrics["removed"] > 0
    else:
        assert inner(after) == inner(before)
        assert surgery.metrics["removed"] == 0


def test_an_alignment_gradient_lasts_for_its_steps_and_over_a_resume():
    policy, surgery, alignment = prepared(refresh=2)
    paid = []
    for step in (1, 2, 3):
        surgery.begin(step)
        for parameter in policy.trainable:
            parameter.grad = torch.ones_like(parameter)
        with surgery.paying(policy):
            surgery.on_gradients(policy)
        paid.append(surgery.cost.forwards)
    assert paid == [1, 0, 1]
    for key, gradient in surgery.tensors().items():
        torch.testing.assert_close(gradient, alignment[key], atol=1e-6, rtol=1e-4)
    successor = Surgery(prompts=4, refresh=2)
    successor.prepare(setting(policy, 4))
    successor.load_tensors(surgery.tensors())
    successor.begin(2)
    successor.on_gradients(policy)
    assert successor.metrics["cosine"] == pytest.approx(surgery.metrics["cosine"], abs=0.2)
    assert Surgery().tensors() == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Surgery(prompts=0), "`prompts` must be at least 1, got 0"),
        (lambda: Surgery(refresh=0), "`refresh` must be at least 1, got 0"),
        (lambda: Surgery().prepare(setting(make_policy(), 0)), "surgery needs alignment's preference pairs"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
