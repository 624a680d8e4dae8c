"""Merge-back: on products and not on factors, exact at both ends."""

from __future__ import annotations

import math

import pytest
import torch

from atp_rl.defenses.merge_back import MergeBack, merged
from atp_rl.model.low_rank import Factors, factors
from atp_rl.model.policy import ALIGNED
from atp_rl.types import InputError
from tests.small_model import make_policy, nudge, same
from tests.small_pairs import rows, setting


def one(row: int, column: int, size: float) -> Factors:
    """The matrix [2, 2] with a single entry, as a product of rank 1."""
    down, up = torch.zeros(1, 2), torch.zeros(2, 1)
    down[0, column], up[row, 0] = 1.0, size
    return Factors(down, up)


def full(update: Factors) -> torch.Tensor:
    return update.up.double() @ update.down.double()


def test_two_updates_by_hand():
    along, error = merged(one(0, 0, 3.0), one(0, 0, 1.0), 0.5)  # 1 + .5 (3 - 1)
    torch.testing.assert_close(full(along), torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double())
    assert error == pytest.approx(0, abs=1e-6)
    # diag(1.5, .5) has rank 2: what is cut off is .5 of a norm of sqrt(2.5)
    across, error = merged(one(0, 0, 3.0), one(1, 1, 1.0), 0.5)
    torch.testing.assert_close(full(across), torch.tensor([[1.5, 0.0], [0.0, 0.0]]).double())
    assert error == pytest.approx(0.5 / math.sqrt(2.5))


def moved(**options) -> tuple:
    policy = make_policy()
    defense = MergeBack(every=1, **options)
    defense.prepare(setting(policy))
    nudge(policy, 0.05, seed=5)
    defense.begin(1)
    return policy, defense


def test_keeping_all_is_the_identity_to_the_last_bit():
    policy, defense = moved(keep=1.0)
    before = policy.state()
    defense.after_update(policy)
    assert same(policy.state(), before)


def test_keeping_nothing_gives_the_aligned_adapter_and_its_logits_exactly():
    policy, defense = moved(keep=0.0)
    chat = policy.chat
    ids = [chat.encode(row["prompt"], []) for row in rows(3)]
    places = [range(1, len(row)) for row in ids]
    aligned, mask = policy.acted_distribution(ids, places, ALIGNED)
    before, _ = policy.acted_distribution(ids, places, "policy")
    assert not torch.equal(before[mask], aligned[mask])
    defense.after_update(policy)
    assert same(policy.state(), dict(defense.setting.aligned))
    after, _ = policy.acted_distribution(ids, places, "policy")
    assert torch.equal(after[mask], aligned[mask])
    assert defense.metrics["truncation_error_max"] == 0


def test_in_between_it_is_the_nearest_product_of_the_rank_to_the_mean_of_both():
    policy, defense = moved(keep=0.7)
    aligned, before = factors(defense.setting.aligned), factors(policy.state())
    defense.after_update(policy)
    errors = []
    for name, update in factors(policy.state()).items():
        wanted = full(aligned[name]) + 0.7 * (full(before[name]) - full(aligned[name]))
        singular = torch.linalg.svdvals(wanted)
        least = float(singular[len(update.down) :].norm())
        assert float((full(update) - wanted).norm()) == pytest.approx(least, abs=1e-5)
        # their factors stay near the mean of both, where Adam's moments were made
        for tensor, start, end in zip(update, aligned[name], before[name], strict=True):
            assert float((tensor - torch.lerp(start, end, 0.7)).norm()) < 0.2 * float((end - start).norm())
        errors.append(least / float(singular.norm()))
    assert defense.metrics["truncation_error_max"] == pytest.approx(max(errors), abs=1e-5)
    assert defense.metrics["truncation_error_mean"] == pytest.approx(sum(errors) / len(errors), abs=1e-5)
    assert max(errors) > 1e-4
    assert defense.metrics["merged"] == 1


def test_it_waits_between_two_merges():
    policy, defense = moved(keep=0.0)
    defense.every = 3
    before = policy.state()
    for step in (1, 2, 4):
        defense.begin(step)
        defense.after_update(policy)
        assert same(policy.state(), before)
        assert defense.metrics == {}
    defense.begin(3)
    defense.after_update(policy)
    assert not same(policy.state(), before)


def test_from_the_bare_base_the_update_itself_shrinks():
    policy = make_policy(anchored=False)
    defense = MergeBack(every=1, keep=0.5)
    defense.prepare(setting(policy))
    nudge(policy, 0.05, seed=5)
    before = factors(policy.state())
    defense.begin(1)
    defense.after_update(policy)
    for name, update in factors(policy.state()).items():
        torch.testing.assert_close(full(update), 0.5 * full(before[name]), atol=1e-6, rtol=1e-4)


def test_with_lines_the_last_layer_keeps_everything():
    state = {}
    for layer in range(3):
        state |= {
            f"layers.{layer}.q.lora_A.weight": torch.ones(1, 2),
            f"layers.{layer}.q.lora_B.weight": torch.ones(2, 1),
        }
    told = setting(make_policy())
    defense = MergeBack(keep=0.6, layers="lines")
    defense.prepare(type(told)(**{**vars(told), "aligned": state}))
    assert list(defense.keeps.values()) == pytest.approx([0.6, 0.8, 1.0])


def test_safemerge_leaves_alone_what_goes_along_with_alignment():
    policy, defense = moved(keep=0.0, layers="safemerge", tau=0.5)
    aligned = factors(defense.setting.aligned)
    (along, across), state = list(aligned)[:2], policy.state()
    for name, update in aligned.items():  # all but one only change what goes into alignment's columns
        state[f"{name}.lora_A.weight"] = update.down + 0.1
        state[f"{name}.lora_B.weight"] = update.up
    outside = torch.linalg.qr(torch.cat([aligned[across].up, torch.randn(aligned[across].up.shape)], 1))[0][:, 2:]
    state[f"{across}.lora_A.weight"], state[f"{across}.lora_B.weight"] = aligned[across].down, outside[:, :2]
    policy.restore(state)
    defense.after_update(policy)
    after = factors(policy.state())
    assert torch.equal(after[along].down, state[f"{along}.lora_A.weight"])
    assert torch.equal(after[across].up, aligned[across].up)
    assert defense.metrics["merged"] == pytest.approx(1 / len(aligned))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be at least 1, got 0"),
        ({"keep": 1.1}, r"`keep` must be in \[0, 1\], got 1.1"),
        ({"tau": -0.1}, r"`tau` must be in \[0, 1\]"),
        ({"layers": "some"}, "`layers` must be uniform, lines or safemerge, got 'some'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MergeBack(**options)
