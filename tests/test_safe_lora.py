"""Safe LoRA: what is written outside of what alignment writes is gone, the rest is as it was."""

from __future__ import annotations

import pytest
import torch

from atp_rl.defenses import Plan
from atp_rl.defenses.safe_lora import SafeLora
from atp_rl.model.low_rank import Factors, factors
from atp_rl.types import InputError
from tests.small_model import make_policy, nudge, same
from tests.small_pairs import setting


def full(update: Factors) -> torch.Tensor:
    return update.up.double() @ update.down.double()


def moved(tau: float) -> tuple:
    policy = make_policy()
    defense = SafeLora(every=2, tau=tau)
    defense.prepare(setting(policy))
    nudge(policy, 0.05, seed=5)
    defense.begin(2)
    return policy, defense


def test_the_update_since_alignment_is_projected_on_the_aligned_columns():
    policy, defense = moved(tau=1.0)
    aligned, before = factors(defense.setting.aligned), factors(policy.state())
    shares = []
    for name, update in aligned.items():
        q = torch.linalg.svd(full(update))[0][:, :2]
        since = full(before[name]) - full(update)
        shares.append(float((q @ q.T @ since).norm() / since.norm()))
    defense.after_update(policy)
    for name, update in factors(policy.state()).items():
        q = torch.linalg.svd(full(aligned[name]))[0][:, :2]
        since = full(before[name]) - full(aligned[name])
        torch.testing.assert_close(full(update), full(aligned[name]) + q @ q.T @ since, atol=1e-6, rtol=1e-4)
        assert torch.equal(update.down, before[name].down)
    assert defense.metrics["projected"] == 1
    assert defense.metrics["cosine"] == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    assert 0 < defense.metrics["cosine"] < 1
    twice = policy.state()
    defense.after_update(policy)
    for name, update in factors(policy.state()).items():
        torch.testing.assert_close(full(update), full(factors(twice)[name]), atol=1e-6, rtol=1e-4)


def test_modules_that_stay_near_are_left_alone_and_so_are_steps_in_between():
    policy, defense = moved(tau=1e-6)
    before = policy.state()
    defense.after_update(policy)
    assert same(policy.state(), before)
    assert defense.metrics["projected"] == 0
    defense.tau = 1.0
    defense.begin(3)
    defense.after_update(policy)
    assert same(policy.state(), before)


def test_the_aligned_adapter_stays_what_it_is():
    policy = make_policy()
    defense = SafeLora(every=1, tau=1.0)
    defense.prepare(setting(policy))
    aligned = policy.state()
    defense.begin(1)
    defense.after_update(policy)
    assert same(policy.state(), aligned)


def test_without_an_aligned_update_there_is_nothing_to_project_on():
    with pytest.raises(InputError, match="safe_lora: projects on the aligned update, and evolution starts without one"):
        SafeLora().prepare(setting(make_policy(anchored=False)))
    with pytest.raises(InputError, match=r"set `evolve\.start_from` to aligned"):
        SafeLora().suits(Plan(population=False, imitates=False, from_base=True))
    SafeLora().suits(Plan(population=True, imitates=True, from_base=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every": 0}, "`every` must be at least 1"), ({"tau": 0.0}, r"`tau` must be in \(0, 1\], got 0.0")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SafeLora(**options)
