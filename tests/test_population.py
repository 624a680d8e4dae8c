"""One adapter for every seat on one base: sampling, learning, saving, copying from peers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atp_rl.evolve.imitation import Copy, Imitation
from atp_rl.evolve.learners import PolicyGradient
from atp_rl.evolve.topology import neighbours
from atp_rl.model.policy import Policy, read_adapters
from atp_rl.model.sampler import HFSampler
from atp_rl.recipe import DefenseSpec, check_defenses
from atp_rl.rollout import Play, rollout
from atp_rl.samples import samples_of
from atp_rl.scenarios import load
from atp_rl.types import SamplingParams
from tests.small_model import episode, lora, nudge, same, turn
from tests.test_learners import SETTINGS

SEATS = ("seat_1", "seat_2", "seat_3")


@pytest.fixture
def adapters(tmp_path) -> list[Path]:
    """Three different adapters, and the anchor."""
    folders = []
    for seed in range(4):
        policy = Policy.load("tiny", lora=lora(), seed=seed)
        nudge(policy, 0.05, seed=seed)
        policy.save_adapter(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    return folders


@pytest.fixture
def population(adapters) -> Policy:
    starts: dict[str, Path] = dict(zip(SEATS, adapters[1:], strict=True))
    return Policy.load("tiny", lora=lora(), seed=0, aligned=adapters[0], seats=SEATS, starts=starts)


def games(**spec):
    return load({"testbed": "collusion", "families": ["bay_fishers"], "per_family": 2, "n": 3, "threshold": 2, **spec})


def play(policy, suite, *, population, group_size=2, rounds=2):
    how = Play(rounds, "all_unsupervised", 3, SamplingParams(max_new_tokens=12), population=population)
    return rollout(suite, HFSampler(policy), how, group_size=group_size, seed=(0,)).groups


def test_seats_start_from_their_own_adapters_or_the_aligned_one(adapters):
    starts = {"seat_2": adapters[2]}
    policy = Policy.load("tiny", lora=lora(), seed=0, aligned=adapters[0], seats=SEATS, starts=starts)
    assert policy.live == SEATS
    assert policy.adapter_hash("seat_1") == policy.adapter_hash("aligned") == policy.adapter_hash("seat_3")
    assert policy.adapter_hash("seat_2") != policy.adapter_hash("aligned")
    trainable = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trainable
    assert not any(".aligned." in name for name in trainable)
    for seat in SEATS:
        assert len(policy.parameters_of(seat)) == len(trainable) / 3


def test_one_batch_over_mixed_adapters_draws_what_each_adapter_draws_alone(population, adapters):
    groups = play(population, games(fixed=1, fixed_as="aligned"), population=True)
    turns = [t for group in groups for e in group for t in e.turns]
    assert {t.player for t in turns} == {"seat_1", "seat_2", "aligned"}
    for player, folder in {"seat_1": adapters[1], "seat_2": adapters[2], "aligned": adapters[0]}.items():
        alone = Policy.load("tiny", lora=lora(), seed=0, aligned=folder)
        for t in (t for t in turns if t.player == player):
            row = (*t.prompt_ids, *t.completion.token_ids)
            with torch.no_grad():
                expected = alone.acted_tokens([row], [range(len(t.prompt_ids), len(row))]).logprobs[0]
            assert t.completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_population_without_aligned_adapter_is_anchored_at_the_bare_base():
    policy = Policy.load("tiny", lora=lora(), seed=0, seats=SEATS)
    nudge(policy, 0.05, seed=1)
    rows, acted = [[5, 6, 7, 8]] * 2, [[2, 3]] * 2
    with torch.no_grad():
        both = policy.acted_tokens(rows, acted, players=["aligned", "seat_2"]).logprobs
        bare = policy.acted_tokens(rows[:1], acted[:1], players="aligned").logprobs
    assert torch.allclose(both[0], bare[0], atol=1e-5)
    assert not torch.allclose(both[1], bare[0], atol=1e-3)


def test_saved_adapters_are_plain_peft_ones_and_come_back(population, tmp_path):
    population.save_adapter(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == list(SEATS)
    before = population.state()
    assert same(read_adapters(tmp_path / "saved"), before)
    alone = Policy.load("tiny", lora=lora(), seed=0, aligned=tmp_path / "saved" / "seat_2")
    assert alone.adapter_hash("aligned") == population.adapter_hash("seat_2")
    nudge(population, 0.05, seed=9)
    assert not same(population.state(), before)
    population.restore(before)
    assert same(population.state(), before)


def update(policy, groups, rewards, **changed):
    options: dict[str, Any] = SETTINGS | {"max_grad_norm": 1e9} | changed
    learner = PolicyGradient(policy, **options)
    metrics = learner.update(policy, groups, rewards, [])
    return metrics, policy.state()


def test_each_seat_learns_from_its_own_rewards_as_if_it_were_alone(population, adapters):
    """The update of a population is, for each seat, that of a single policy on that seat's turns."""
    groups = play(population, games(), population=True, group_size=3)
    rewards = torch.tensor(
        [[1.0, 0.2, 0.0, 0.0, 0.9, 0.4, 0.3, 0.1, 0.8], [0.0, 0.5, 0.3, 1.0, 0.1, 0.2, 0.7, 0.6, 0.0]]
    )
    before = population.state()
    _, after = update(population, groups, rewards)
    for i, seat in enumerate(SEATS):
        alone = Policy.load("tiny", lora=lora(), seed=0, aligned=adapters[1 + i])
        own = [
            [
                replace(
                    e,
                    messages={seat: e.messages[seat]},
                    turns=[replace(t, player="policy") for t in e.turns if t.seat == seat],
                )
                for e in group
            ]
            for group in groups
        ]
        _, expected = update(alone, own, rewards[:, i::3])
        moved = torch.cat([(after[f"{seat}/{key}"] - before[f"{seat}/{key}"]).flatten() for key in expected])
        alone_moved = torch.cat([(value - before[f"{seat}/{key}"]).flatten() for key, value in expected.items()])
        assert (moved - alone_moved).norm() < 0.02 * alone_moved.norm()  # Adam makes a full step of a rounding error


def test_a_shared_adapter_takes_the_seats_of_a_group_for_its_baseline():
    policy = Policy.load("tiny", lora=lora(), seed=0)
    groups = play(policy, games(), population=False)
    assert [len(samples_of(group)) for group in groups] == [6, 6]  # 2 episodes x 3 seats
    assert [(s.episode.sample, s.seat) for s in samples_of(groups[0])] == [(k, s) for k in range(2) for s in SEATS]
    before = policy.state()
    metrics, after = update(policy, groups, torch.tensor([[1.0, 0, 0, 0, 0, 0], [0.5] * 6]))
    assert metrics["evolve/mixed_groups"] == 0.5
    assert not same(before, after)


def test_frozen_seats_are_not_learned_from():
    policy = Policy.load("tiny", lora=lora(), seed=0)
    groups = play(policy, games(fixed=1, fixed_as="aligned"), population=False)
    assert {s.seat for group in groups for s in samples_of(group)} == {"seat_1", "seat_2"}


# --- imitation


def played(*payoffs, round=0):
    """A turn for every seat, paid so much; its reply is the number of the turn."""
    turns = []
    for i, payoff in enumerate(payoffs):
        t = turn((1, 2), (10 + i,), round=round)
        turns.append(replace(t, seat=SEATS[i], player=SEATS[i], outcome=replace(t.outcome, payoff=payoff)))
    return replace(episode(*turns), messages={seat: [] for seat in SEATS})


def test_a_seat_copies_the_best_paid_decisions_that_it_can_see():
    #       seat_1 sees seat_2, seat_2 sees both, seat_3 nobody
    models = {"seat_1": ["seat_2"], "seat_2": ["seat_1", "seat_3"], "seat_3": []}
    group = [played(0.1, 0.3, 0.5), played(0.2, 0.3, -0.1)]
    copies = Imitation(models, 1.0).copies([group])
    assert copies == [
        Copy("seat_1", (1, 2), (11,)),  # .3 of seat_2, in both episodes
        Copy("seat_1", (1, 2), (11,)),
        Copy("seat_2", (1, 2), (12,)),  # .5 of seat_3
        Copy("seat_3", (1, 2), (12,)),  # its own better one
    ]


def test_where_all_were_paid_the_same_nothing_is_copied():
    models = {seat: [s for s in SEATS if s != seat] for seat in SEATS}
    assert Imitation(models, 1.0).copies([[played(0.4, 0.4, 0.4)]]) == []


def test_a_seat_that_the_aligned_adapter_plays_copies_nobody_and_may_be_copied():
    models = {seat: [s for s in SEATS if s != seat] for seat in SEATS}
    group = [played(0.1, 0.2, 0.5), played(0.1, 0.3, 0.4)]
    for e in group:
        e.turns = [replace(t, player="aligned") if t.seat == "seat_3" else t for t in e.turns]
    assert Imitation(models, 1.0).copies([group]) == [
        Copy("seat_1", (1, 2), (12,)),  # .5 of seat_3
        Copy("seat_2", (1, 2), (12,)),
    ]


def test_groups_that_are_played_for_compliance_show_nothing():
    group = [played(0.1, 0.3, 0.5), played(0.2, 0.3, -0.1)]
    ruled = [replace(e, scenario=replace(e.scenario, extra={**e.scenario.extra, "stream": "rule"})) for e in group]
    imitation = Imitation({seat: [] for seat in SEATS}, 1.0)
    assert imitation.copies([group, ruled]) == imitation.copies([group])
    assert imitation.copies([ruled]) == []


def test_dissenters_of_a_population_are_not_trained_by_imitation(population):
    (dissenters,) = check_defenses([DefenseSpec(name="dissenters")])
    groups = play(population, [dissenters.on_scenario(s) for s in games()], population=True)
    for group in groups:
        for e in group:  # what seat_1 does in the first episode is paid
            e.turns = [
                replace(t, outcome=replace(t.outcome, payoff=float(t.seat == "seat_1" and e.sample % 2 == 0)))
                for t in e.turns
            ]
    before = population.state()
    models = {seat: [s for s in SEATS if s != seat] for seat in SEATS}
    nothing = torch.zeros(len(groups), 4)
    update(population, groups, nothing, imitation=Imitation(models, 2.0), weight_decay=0.1)
    changed = {key.split("/")[0] for key, value in population.state().items() if not torch.equal(value, before[key])}
    assert changed == {"seat_1", "seat_2"}


def test_imitation_raises_what_was_copied_in_the_copying_seat_alone(population):
    groups = play(population, games(), population=True)
    models = {"seat_1": ["seat_2"], "seat_2": [], "seat_3": []}
    for group in groups:
        for e in group:  # seat_2 is paid, the others are not
            e.turns = [replace(t, outcome=replace(t.outcome, payoff=float(t.seat == "seat_2"))) for t in e.turns]
    imitation = Imitation(models, 2.0)
    copied = [c for c in imitation.copies(groups) if c.seat == "seat_1"]
    assert copied
    rows = [(*c.prompt_ids, *c.reply_ids) for c in copied]
    acted = [range(len(c.prompt_ids), len(row)) for c, row in zip(copied, rows, strict=True)]

    def likelihood(seat):
        with torch.no_grad():
            return population.acted_tokens(rows, acted, players=[seat] * len(rows)).logprobs.sum().item()

    before = {seat: likelihood(seat) for seat in SEATS}
    nothing = torch.zeros(len(groups), 6)  # no reward differs, so the policy gradient is zero
    metrics, _ = update(population, groups, nothing, imitation=imitation)
    assert metrics["evolve/imitation_loss"] > 0
    assert likelihood("seat_1") > before["seat_1"] + 1e-3
    assert likelihood("seat_3") == pytest.approx(before["seat_3"], abs=1e-4)


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("all", {"a": ["b", "c", "d"], "b": ["a", "c", "d"], "c": ["a", "b", "d"], "d": ["a", "b", "c"]}),
        ("ring", {"a": ["b", "d"], "b": ["a", "c"], "c": ["b", "d"], "d": ["a", "c"]}),
    ],
)
def test_who_may_copy_whom(topology, expected):
    assert neighbours(topology, "abcd", degree=3, seed=0) == expected


def test_a_random_graph_is_symmetric_and_depends_on_the_seed_alone():
    seats = [f"seat_{i}" for i in range(40)]
    graph = neighbours("random", seats, degree=4, seed=1)
    assert graph == neighbours("random", seats, degree=4, seed=1) != neighbours("random", seats, degree=4, seed=2)
    assert all(a in graph[b] for a in seats for b in graph[a])
    assert 3 < sum(map(len, graph.values())) / 40 < 5
