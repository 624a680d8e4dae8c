"""Replay: its losses and choices by hand, its gradient, and that its pairs are none that is evaluated on."""

from __future__ import annotations

import math

import pytest
import torch

from atp_rl.defenses.pairs import Pair, answer, answer_logprobs, apart, backward_sft, drawn, read_pairs
from atp_rl.defenses.replay import Replay, ShuffledReplay, dpo_loss, margins
from atp_rl.model.sync_probe import decision_logprobs
from atp_rl.pipeline import suites_of
from atp_rl.recipe import load
from atp_rl.scenarios import load as load_scenarios
from atp_rl.scenarios.choices import format_choice
from atp_rl.scenarios.files import write_jsonl
from atp_rl.types import Chat, InputError
from tests.command_line import RECIPES, ROLE_PLAY
from tests.small_model import gradients, make_policy, nudge
from tests.small_pairs import rows, setting


def prepared(defense: Replay, policy, count: int = 12) -> Replay:
    defense.prepare(setting(policy, count))
    defense.begin(1)
    return defense


def test_the_loss_of_a_pair_by_hand():
    # the chosen answer lost half a nat and the rejected one gained half
    margin = margins(torch.tensor([[-1.5, -0.5], [-1.0, -1.0]]), torch.tensor([[-1.0, -1.0], [-1.0, -1.0]]))
    assert margin.tolist() == [-1.0, 0.0]
    assert dpo_loss(margin, 0.5).tolist() == pytest.approx([math.log(1 + math.exp(0.5)), math.log(2)])


def test_answers_are_read_as_they_are_played():
    policy = make_policy()
    chat, (row, *_) = policy.chat, rows(1)
    chosen = answer(chat, row, "chosen")
    assert chosen.prompt == tuple(chat.encode(row["prompt"], []))
    assert chosen.reply == (*chat.encode_text(row["chosen"][0]["content"]), chat.eos_id)
    later = [*row["prompt"], row["rejected"][0], {"role": "user", "content": "Choose again."}]
    second = answer(chat, row | {"prompt": later}, "chosen")
    first = answer(chat, row, "rejected")
    assert second.prompt[: len(first.prompt) + len(first.reply)] == (*first.prompt, *first.reply)


def test_log_probabilities_are_those_of_the_decisions():
    policy = make_policy()
    pairs = read_pairs(setting(policy, 3), "replay")
    options = [tuple(part[side][0]["content"] for side in ("chosen", "rejected")) for part in rows(3)]
    names = [tuple(o.removeprefix('{"choice": "').removesuffix('"}') for o in pair) for pair in options]
    assert format_choice(names[0][0]) == options[0][0]
    chats = [Chat([], pair.chosen.prompt, n, (0,)) for pair, n in zip(pairs, names, strict=True)]
    found = answer_logprobs(policy, [side for pair in pairs for side in pair], "policy")
    assert found.tolist() == pytest.approx(decision_logprobs(policy, chats), abs=1e-5)


def test_at_the_aligned_adapter_nothing_is_lost_and_the_gradient_is_half_of_beta_times_the_margins():
    policy = make_policy()
    replay = prepared(Replay(weight=0.2, beta=0.5, batch=10), policy)
    replay.backward(policy)
    assert replay.metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert replay.metrics["margin"] == pytest.approx(0, abs=1e-5)
    found = gradients(policy)
    policy.model.zero_grad()
    pairs = [replay.pairs[i] for i in drawn(0, "replay", 1, 12, 10)]
    logprobs = answer_logprobs(policy, [side for pair in pairs for side in pair], "policy").view(-1, 2)
    (-0.2 * 0.5 / 2 * (logprobs[:, 0] - logprobs[:, 1]).mean()).backward()
    by_hand = gradients(policy)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-5
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, by_hand[key], atol=1e-6, rtol=1e-4)


def test_sft_is_the_mean_of_the_chosen_answers_and_adds_to_gradients_that_are_there():
    policy = make_policy()
    replay = prepared(Replay(loss="sft", weight=0.3, batch=10), policy)
    for parameter in policy.trainable:
        parameter.grad = torch.ones_like(parameter)
    replay.backward(policy)
    assert replay.tensors() == {}  # it needs no reference
    found = gradients(policy)
    policy.model.zero_grad()
    chosen = [replay.pairs[i].chosen for i in drawn(0, "replay", 1, 12, 10)]
    loss = -answer_logprobs(policy, chosen, "policy").mean()
    assert replay.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    (0.3 * loss).backward()
    for key, gradient in gradients(policy).items():
        torch.testing.assert_close(found[key], 1 + gradient, atol=1e-6, rtol=1e-4)


def test_what_is_computed_apart_leaves_gradients_as_they_were():
    policy = make_policy()
    kept = [torch.full_like(parameter, 3.0) for parameter in policy.trainable]
    for parameter, gradient in zip(policy.trainable, kept, strict=True):
        parameter.grad = gradient
    with apart(policy):
        assert all(parameter.grad is None for parameter in policy.trainable)
        backward_sft(policy, read_pairs(setting(policy, 2), "x"), weight=1.0)
        assert any(parameter.grad is not None for parameter in policy.trainable)
    assert all(parameter.grad is gradient for parameter, gradient in zip(policy.trainable, kept, strict=True))
    assert all((gradient == 3).all() for gradient in kept)


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_a_policy_that_was_pushed_away_is_brought_back(loss):
    policy = make_policy()
    replay = prepared(Replay(loss=loss, weight=1.0, batch=6), policy, 6)
    chosen = [pair.chosen for pair in replay.pairs]
    nudge(policy, 0.05, seed=7)
    before = answer_logprobs(policy, chosen, "policy").mean().item()
    optimizer = torch.optim.Adam(policy.trainable, lr=3e-3)
    losses = []
    for step in range(1, 9):
        replay.begin(step)
        optimizer.zero_grad()
        replay.backward(policy)
        optimizer.step()
        losses.append(replay.metrics["loss"])
    assert losses[-1] < losses[0]
    if loss == "sft":
        assert answer_logprobs(policy, chosen, "policy").mean().item() > before


def test_a_step_takes_other_pairs_than_the_one_before_and_never_one_twice():
    steps = [drawn(0, "replay", step, 100, 32) for step in (1, 2, 1)]
    assert steps[0] == steps[2] != steps[1]
    assert all(len(set(step)) == 32 for step in steps)
    assert sorted(drawn(0, "replay", 1, 5, 32)) == [0, 1, 2, 3, 4]
    assert drawn(1, "replay", 1, 100, 32) != steps[0]


def test_the_pairs_that_lost_most_are_taken():
    policy = make_policy()
    replay = prepared(Replay(selection="log_ratio", batch=2, pool=12), policy)
    now = answer_logprobs(policy, [pair.chosen for pair in replay.pairs], "policy").detach()
    lost = torch.tensor([0.0, 1.0, -2.0, 5.0, 0.5, 0.1, 4.0, 0.2, 0.3, -1.0, 0.0, 0.9])  # nats
    replay.reference = torch.stack([now + lost, now], dim=1)
    pool = [3, 11, 2, 6, 1]
    assert replay._most_forgotten(policy, pool) == [3, 6]
    assert replay.metrics["log_ratio"] == pytest.approx(4.5, abs=1e-4)


def test_the_reference_is_paid_once_and_goes_through_a_resume():
    policy = make_policy()
    replay = prepared(Replay(batch=2), policy)
    with replay.paying(policy):
        replay.backward(policy)
    assert replay.cost.forwards == 2 + 1  # 12 pairs in two forwards, and those of the step
    nudge(policy, 0.05, seed=3)
    successor = prepared(Replay(batch=2), policy)
    successor.load_tensors(replay.tensors())
    with successor.paying(policy):
        successor.backward(policy)
    assert successor.cost.forwards == 1
    replay.begin(1)
    replay.backward(policy)
    assert replay.metrics == successor.metrics


def test_shuffled_pairs_have_the_same_tokens_and_no_information():
    policy = make_policy()
    honest, shuffled = Replay(), ShuffledReplay()
    for defense in (honest, shuffled):
        defense.prepare(setting(policy, 100))
    swapped = [new == Pair(old.rejected, old.chosen) for old, new in zip(honest.pairs, shuffled.pairs, strict=True)]
    assert all(new in (old, Pair(*old[::-1])) for old, new in zip(honest.pairs, shuffled.pairs, strict=True))
    assert 30 < sum(swapped) < 70
    again = ShuffledReplay()
    again.prepare(setting(policy, 100))
    assert again.pairs == shuffled.pairs
    other = ShuffledReplay()
    other.prepare(setting(policy, 100, seed=1))
    assert other.pairs != shuffled.pairs


@pytest.mark.parametrize("testbed", ["role_play", "collusion", "tool_use"])
def test_pairs_are_of_no_scenario_that_is_trained_gated_or_reported(testbed):
    suites = suites_of(load([str(RECIPES / "tiny" / f"{testbed}.yaml")]))
    ids = {name: {scenario.id for scenario in suite} for name, suite in vars(suites).items()}
    pairs = ids.pop("align")
    assert pairs
    for name, others in ids.items():
        assert others, name
        assert not pairs & others, name


def test_also_in_a_file_nothing_that_pairs_come_from_is_measured(tmp_path):
    write_jsonl(load_scenarios({"families": None, "per_family": 8}), tmp_path / "own.jsonl")
    suites = suites_of(load([ROLE_PLAY, f"scenarios.file={tmp_path / 'own.jsonl'}"]))
    measured = {s.id for s in (*suites.gate, *suites.held_in, *suites.held_out)}
    assert measured
    assert not {s.id for s in suites.align} & measured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "replay: `weight` must be > 0, got 0.0"),
        ({"beta": -1.0}, "`beta` must be > 0"),
        ({"batch": 0}, "`batch` must be > 0, got 0"),
        ({"loss": "ipo"}, "`loss` must be dpo or sft, got 'ipo'"),
        ({"selection": "best"}, "`selection` must be random or log_ratio, got 'best'"),
        ({"selection": "log_ratio", "pool": 16}, r"`pool` must be at least `batch` \(32\), got 16"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Replay(**options)


def test_without_pairs_it_says_what_to_do():
    with pytest.raises(
        InputError, match=r"shuffled_replay needs alignment's preference pairs.*start from the `aligned`"
    ):
        ShuffledReplay().prepare(setting(make_policy(), 0))
