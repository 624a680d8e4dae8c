"""The benchmarks compare what they say they compare: the same work, all of it, whatever the way."""

from __future__ import annotations

import json
import math

import pytest
import torch

from atp_rl.model.sampler import HFSampler
from atp_rl.rollout import rollout
from atp_rl.samples import training_rows
from tests.benchmarks import growth, profile_step, propensity, startup
from tests.benchmarks.__main__ import main
from tests.benchmarks.evolution_step import EvolutionStep, counted, step_work
from tests.benchmarks.growth import exponent
from tests.benchmarks.profile_step import StepClock, Tree, floors
from tests.benchmarks.rollouts import batched_generate, make_policy, ours
from tests.benchmarks.timing import Contest
from tests.benchmarks.trl_step import TrlStep, rollout_output


def test_ways_are_timed_in_turn_and_compared_with_the_first():
    seconds, order = {"slow": [4.0, 8.0], "fast": [2.0, 1.0]}, []

    def way(name):
        def timed():
            order.append(name)
            return seconds[name][order.count(name) - 1], {"decisions": 1}

        return timed

    rows = Contest("work", {name: way(name) for name in seconds}).run(2, lambda _: None).rows()
    assert order == ["slow", "fast", "slow", "fast"]
    assert [row["times_faster"] for row in rows] == [1.0, 4.0]  # by minima: 4 / 4, 4 / 1
    assert [row["seconds_median"] for row in rows] == [6.0, 1.5]


def test_trl_plays_the_same_scenarios_and_learns_from_them():
    work = step_work(2, scenarios=2, group_size=2)
    step = TrlStep(work, batch_size=2)
    model = step.trainer.model
    assert model is not None
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    seconds, played = step()
    assert seconds > played.seconds > 0
    assert [e.scenario.id for e in played.episodes] == [s.id for s in work.scenarios for _ in range(2)]
    assert counted(played)["decisions"] == 8  # 2 scenarios x 2 episodes x 2 rounds
    mixed = any(len({sum(t.outcome.payoff for t in e.turns) for e in group}) > 1 for group in played.groups)
    moved = [n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])]
    assert bool(moved) == mixed  # equal payoffs have no advantage


def test_trl_is_told_which_tokens_were_acted():
    policy = make_policy()
    work = step_work(2, scenarios=1, group_size=2)
    played = EvolutionStep(policy, work).play()
    output = rollout_output(played.groups)
    for i, episode in enumerate(played.episodes):
        (row,) = training_rows(episode.turns)
        assert output["prompt_ids"][i] + output["completion_ids"][i] == list(row.ids)
        acted = [token for token, own in zip(output["completion_ids"][i], output["env_mask"][i], strict=True) if own]
        assert acted == [token for turn in episode.turns for token in turn.completion.token_ids]


def test_exponent_of_a_power():
    assert exponent([2, 4, 8], [3 * n**1.7 for n in (2, 4, 8)]) == pytest.approx(1.7)


@pytest.mark.parametrize(("seats", "decisions"), [(1, 12), (4, 48)])
def test_games_have_so_many_seats(seats, decisions):
    work = growth.seats_work(seats)  # 4 games x seats x 3 rounds
    policy = make_policy()
    assert [way(policy, work).decisions for way in (batched_generate, ours)] == [decisions, decisions]


def test_every_round_is_in_the_prompt():
    work = growth.rounds_work(3).part(1)
    policy = make_policy()
    played = rollout(work.scenarios, HFSampler(policy), work.play, group_size=1, seed=(0,))
    (episode,) = played.episodes
    assert len(training_rows(episode.turns)) == 1


def test_every_scenario_is_asked_once_and_scored():
    asked = propensity.chats(make_policy())
    assert len({chat.seed for chat in asked}) == propensity.SCENARIOS


def test_help_starts_fast():
    assert min(startup.import_seconds() for _ in range(2)) < 1.0


def test_tree_counts_what_is_shared_once():
    # abc, abd, x: a b c d x; c and d see three tokens each, a one, b two, x one
    assert Tree.of([(1, 2, 3), (1, 2, 4), (9,)]) == Tree(tokens=5, context=1 + 2 + 3 + 3 + 1)
    assert Tree.of([(1, 2), (1, 2), (1,)]) == Tree(tokens=2, context=3)


def test_profile_accounts_for_the_whole_step():
    policy = make_policy()
    work = step_work(1, scenarios=2, group_size=2)
    step = EvolutionStep(policy, work)
    clock = StepClock(policy, work.play.sampling.max_new_tokens)
    with clock.running("rollout"):
        played = step.play()
    with clock.running("update"):
        step.learn(played)
    parts = clock.parts
    assert {"rollout: prompts", "rollout: rest"} <= parts.keys()  # no reply left the drafts
    assert {"update: forward", "update: backward", "update: optimizer", "update: rest"} <= parts.keys()
    assert all(part.seconds > 0 for part in parts.values())
    rollout_s = sum(part.seconds for name, part in parts.items() if name.startswith("rollout"))
    assert rollout_s >= played.seconds
    prompts = {turn.prompt_ids for episode in played.episodes for turn in episode.turns}
    assert parts["rollout: prompts"].tokens >= sum(map(len, prompts))
    floor = floors(policy, played.groups)
    assert max(map(len, prompts)) < floor["rollout"].tokens < sum(len(p) + 16 for p in prompts) + 1
    assert floor["update"].tokens <= parts["update: forward"].tokens
    assert floor["update"].flops > 2 * floor["rollout"].flops * 0.9  # forward and backward of about the same tokens


def test_one_section_alone_writes_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "ROUNDS", (1, 2))
    out = tmp_path / "bench.json"
    main(["--out", str(out), "--repeats", "1", "--only", "rounds"])
    record = json.loads(out.read_text())
    assert [row["work"] for row in record["rows"]] == ["8 scenarios x 1 rounds"] * 3 + ["8 scenarios x 2 rounds"] * 3
    assert {fit["way"] for fit in record["growth"]} == set(growth.WAYS)
    assert all(math.isfinite(fit["exponent"]) for fit in record["growth"])


def test_profile_is_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile_step, "step_work", lambda rounds: step_work(rounds, scenarios=1, group_size=2))
    profile_step.main(["--rounds", "1", "--repeats", "1", "--out", str(tmp_path / "profile.json")])
    (step,) = json.loads((tmp_path / "profile.json").read_text())["steps"]
    assert step["floor"]["rollout"]["flops"] > 0
    assert "floor of the update" in capsys.readouterr().out
