"""What reward models are shown of an episode, and what becomes of an answer that none could give."""

from typing import Any

import pytest

from atp_rl.evolve.rewards import before_each_reply, shape, with_means
from atp_rl.model.sampler import TextSampler
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import load
from atp_rl.scenarios.choices import format_choice
from atp_rl.tracking.run import Interrupted
from atp_rl.types import Message, SamplingParams
from tests import small_model
from tests.small_model import episode, turn


def played(testbed="role_play", rounds=3):
    scenarios = load({"testbed": testbed, "split": "train", "per_family": 1})[:2]
    play = Play(rounds, {"probability": 0.5}, 1, SamplingParams(16))
    return rollout(scenarios, TextSampler(speaker()), play, group_size=2, seed=(0,)).groups


def speaker():
    """Every reply is another text, and chooses the first or the second option in turn."""
    said = []

    def reply(chat):
        said.append(chat)
        return f"Reply {len(said)}. {format_choice(chat.options[len(said) % 2])}"

    return reply


class Recorder:
    """A reward model that remembers what it was shown and answers from a list, or 0."""

    def __init__(self, *values: float | None) -> None:
        self.values = values

    def __call__(self, **columns: Any) -> list[float | None]:
        self.columns = columns
        return list(self.values or [0.0] * len(columns["completions"]))


def test_a_reward_model_reads_the_conversation_up_to_the_reply():
    groups = played()
    model = Recorder()
    shape(groups, {"it": 1.0}, {"it": model})
    seen = model.columns
    assert len({*map(len, seen.values())}) == 1
    assert len(seen["prompts"]) == 2 * 2 * 3
    for g, group in enumerate(groups):
        for i, one in enumerate(group):
            for k, own in enumerate(one.turns):
                row = (g * 2 + i) * 3 + k
                read = seen["prompts"][row]
                assert seen["completions"][row] == own.completion.text
                assert [m["content"] for m in read if m["role"] == "assistant"] == [
                    t.completion.text for t in one.turns[:k]
                ]
                assert read == one.messages["agent"][: len(read)]
                assert read[-1]["role"] == "user"
                assert f"Round {k + 1}." in read[-1]["content"]
    assert len({*seen["key"]}) == len(seen["key"])
    assert seen["key"][0] == (*groups[0][0].seed, "agent", 0)


def test_every_seat_has_a_conversation_of_its_own():
    groups = played("collusion", rounds=2)
    model = Recorder()
    rewards = shape(groups, {"it": 1.0}, {"it": model})
    assert rewards.shape == (2, 2 * 8)
    for read, text in zip(model.columns["prompts"], model.columns["completions"], strict=True):
        (of,) = [
            messages
            for group in groups
            for one in group
            for messages in one.messages.values()
            if {"role": "assistant", "content": text} in messages
        ]
        assert read == of[: of.index({"role": "assistant", "content": text})]


def test_replies_are_found_from_the_end():
    said, user = Message(role="assistant", content=""), Message(role="user", content="u")
    turns = [turn(round=0), turn(round=1)]  # equal replies, and a defense has put an assistant's message between
    other = Message(role="assistant", content="reminder")
    messages = [user, said, other, user, said]
    assert before_each_reply(messages, turns) == [[user], [user, said, other, user]]
    assert before_each_reply([], turns) == [[], []]


def test_who_could_not_tell_gets_the_mean_of_its_group_in_that_round():
    places = [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 0)]
    assert with_means([1.0, None, 0.5, 0.25, None, None], places) == [1.0, 0.25, 0.5, 0.25, 0.0, 0.0]
    groups = [[episode(turn(choice="Safe"), sample=i) for i in range(4)]]
    unsure = Recorder(1.0, None, 0.0, 0.2)
    rewards = shape(groups, {"it": 2.0}, {"it": unsure})
    assert rewards.tolist()[0] == pytest.approx([2.0, 0.8, 0.0, 0.4])
    assert rewards[0, 1] == pytest.approx(rewards.mean().item())  # no advantage


def test_weights_add_up():
    groups = [[episode(turn(choice="Safe", payoff=50), sample=i) for i in range(2)]]
    rewards = shape(groups, {"payoff": 1.0, "it": -0.5}, {"payoff": lambda payoff, **_: payoff, "it": Recorder(1, 2)})
    assert rewards.tolist() == [[49.5, 49.0]]


def test_an_evolution_with_a_monitor_errs_alike_when_it_is_resumed(tmp_path):
    watched = [
        "evolve.rewards={payoff: 1.0, monitor: 0.5}",
        "evolve.reward_options.monitor={recall: .7, false_alarm: .3}",
    ]
    whole = small_model.run_of(small_model.small_recipe(tmp_path / "whole", *watched, steps=3))
    broken = small_model.small_recipe(tmp_path / "broken", *watched, steps=3)
    with pytest.raises(Interrupted):
        small_model.run_of(broken, stop=small_model.stop_before(3))
    again = small_model.run_of(broken)
    lines = [[small_model.reproducible(line) for line in run.lines("metrics.jsonl")] for run in (whole, again)]
    assert lines[0] == lines[1]
    plain = small_model.run_of(small_model.small_recipe(tmp_path / "plain", steps=3))
    first = next(iter(plain.lines("metrics.jsonl")))
    assert lines[0][0]["evolve/payoff_mean"] == first["evolve/payoff_mean"]  # the same episodes
    assert lines[0][0]["evolve/reward_mean"] < first["evolve/reward_mean"]
