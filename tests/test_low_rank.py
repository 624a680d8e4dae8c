"""The algebra of LoRA products, against the full matrices and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from atp_rl.model.low_rank import (
    Factors,
    as_state,
    column_space,
    combination,
    depths,
    factors,
    inner,
    norm,
    projected,
    share_within,
    truncated,
)
from atp_rl.types import InputError
from tests.small_model import make_policy


def diagonal(*values: float) -> Factors:
    """diag(values) as a product."""
    return Factors(torch.eye(len(values)), torch.diag(torch.tensor(values, dtype=torch.float32)))


def drawn(seed: int, rank: int = 2) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, 5, generator=generator), torch.randn(6, rank, generator=generator))


def full(update: Factors) -> torch.Tensor:
    return update.up @ update.down


def test_sums_are_exact_and_sizes_are_those_of_the_full_matrices():
    a, b = drawn(0), drawn(1)
    together = combination((0.25, a), (-2.0, b))
    assert len(together.down) == 4
    torch.testing.assert_close(full(together), 0.25 * full(a) - 2 * full(b))
    assert inner(a, b) == pytest.approx(float((full(a) * full(b)).sum()), abs=1e-5)
    assert norm(together) == pytest.approx(float(full(together).norm()), abs=1e-5)


def test_sizes_by_hand():
    assert inner(diagonal(1, 2), diagonal(3, 4)) == 11
    assert norm(diagonal(3, 4)) == pytest.approx(5)
    assert norm(combination((1, drawn(0)), (-1, drawn(0)))) < 1e-6


def test_the_best_approximation_drops_the_smallest_part():
    two, error = truncated(diagonal(3, 1, 2), 2, like=Factors(torch.zeros(2, 3), torch.zeros(3, 2)))
    torch.testing.assert_close(full(two), torch.diag(torch.tensor([3.0, 0.0, 2.0])))
    assert error == pytest.approx(1 / math.sqrt(14))
    assert (two.down.shape, two.up.shape) == ((2, 3), (3, 2))
    same, error = truncated(diagonal(3, 1, 2), 3, like=diagonal(1, 1, 1))
    assert error == 0
    torch.testing.assert_close(full(same), full(diagonal(3, 1, 2)))


def test_the_factors_stay_near_those_that_are_given():
    a, b = drawn(0), drawn(1)
    again, error = truncated(a, 2, like=a)
    assert error < 1e-6
    torch.testing.assert_close(again.down, a.down)
    torch.testing.assert_close(again.up, a.up)
    near, _ = truncated(combination((0.99, a), (0.01, b)), 2, like=a)
    assert (near.up - a.up).norm() < 0.05 * a.up.norm()
    assert (near.down - a.down).norm() < 0.05 * a.down.norm()


def test_without_such_factors_they_are_balanced():
    like = Factors(torch.zeros(2, 5), torch.zeros(6, 2))
    new, error = truncated(combination((1, drawn(0))), 2, like=like)
    assert error < 1e-6
    torch.testing.assert_close(full(new), full(drawn(0)))
    torch.testing.assert_close(new.up.T @ new.up, new.down @ new.down.T)


@pytest.mark.parametrize("like", [drawn(2), Factors(torch.zeros(2, 5), torch.zeros(6, 2))])
def test_nothing_stays_nothing(like):
    nothing, error = truncated(Factors(torch.randn(3, 5), torch.zeros(6, 3)), 2, like=like)
    assert error == 0
    assert not full(nothing).any()


def test_projection_by_hand():
    update, space = diagonal(3, 4), torch.tensor([[1.0], [0.0]]).double()
    torch.testing.assert_close(full(projected(update, space)), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert share_within(update, space) == pytest.approx(0.6)
    assert share_within(update, space[:, :0]) == 0
    assert share_within(diagonal(0, 0), space) == 1


def test_what_an_update_can_write():
    assert column_space(Factors(torch.ones(1, 3), torch.tensor([[3.0], [4.0]]))).abs().flatten().tolist() == (
        pytest.approx([0.6, 0.8])
    )
    twice = Factors(torch.ones(2, 3), torch.tensor([[3.0, 6.0], [4.0, 8.0]]))  # the same direction in both columns
    assert column_space(twice).shape == (2, 1)
    assert column_space(diagonal(0, 0)).shape == (2, 0)
    space = column_space(drawn(3))
    torch.testing.assert_close(full(projected(drawn(3), space)), full(drawn(3)))


def test_depth_runs_from_the_first_layer_to_the_last():
    names = ["model.layers.0.q", "model.layers.1.q", "model.layers.4.mlp.up", "lm_head"]
    assert depths(names) == [0, 0.25, 1, 1]
    assert depths(["model.layers.0.q"]) == [0]


def test_a_state_is_its_factors_and_nothing_else():
    policy = make_policy()
    state = policy.state()
    found = factors(state)
    assert len(found) == 7
    back = as_state(found)
    assert back.keys() == state.keys()
    assert all(back[key] is state[key] for key in state)
    assert policy.by_key().keys() == state.keys()
    assert all(torch.equal(weight, state[key]) for key, weight in policy.by_key().items())


@pytest.mark.parametrize(
    "odd",
    [
        {"x.lora_magnitude_vector": torch.zeros(3)},
        {"y.lora_A.weight": torch.zeros(1, 2)},
        {"y.lora_B.weight": torch.zeros(2, 1)},
        {"y.lora_A.weight": torch.zeros(1, 2, 1, 1), "y.lora_B.weight": torch.zeros(2, 1, 1, 1)},
    ],
    ids=["dora", "half", "other half", "convolution"],
)
def test_an_adapter_that_is_more_than_that_is_refused(odd):
    with pytest.raises(InputError, match="more than LoRA on linear layers"):
        factors({"x.lora_A.weight": torch.zeros(1, 2), "x.lora_B.weight": torch.zeros(2, 1), **odd})
