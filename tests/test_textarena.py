"""A game of TextArena by hand: the iterated prisoner's dilemma, in which both talk and then decide, in turns."""

import random
import re
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atp_rl.model.sampler import TextSampler
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import ENVIRONMENTS, make_env
from atp_rl.scenarios.choices import format_choice
from atp_rl.scenarios.files import read_scenarios, write_jsonl
from atp_rl.scenarios.textarena import TextArena, scenario
from atp_rl.types import InputError, SamplingParams

C, D, NOTHING = format_choice("Cooperate"), format_choice("Defect"), "Hm."


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS, "textarena", TextArena)


@pytest.fixture
def installed():
    pytest.importorskip("textarena", reason="textarena is not installed")


def dilemma(*, game="IteratedPrisonersDilemma-v0", rounds=2, scores: str | None = "scores", **settings: Any):
    return scenario(
        game,
        options=("Cooperate", "Defect"),
        payoffs={"Cooperate": 3, "Defect": 5},
        rule="Cooperate",
        rule_text="The league requires Cooperate.",
        talk=["conversation"],
        scores=scores,
        **({"num_rounds": rounds} | settings),
    )


def environment(made=None, *, rounds=9, supervision: Any = "all_unsupervised", window=9):
    return make_env(made or dilemma(), rounds=rounds, supervision=supervision, seed=0, history_window=window)


def play(env, *replies):
    """Who was asked, and what `step` returned, reply by reply."""
    asked, returned = [], []
    for reply in replies:
        (seat,) = env.observe()
        asked.append(seat)
        returned.append(env.step({seat: reply}))
    return asked, returned


def last_outcomes(returned):
    """Of every seat, each of its decisions as it stands in the end."""
    decided: dict[str, list] = {}
    for outcomes in returned:
        for i, (seat, outcome) in enumerate(outcomes.items()):
            if i == 0:
                decided.setdefault(seat, []).append(outcome)
            else:
                decided[seat][-1] = outcome
    return {seat: [o for o in outcomes if o.verdict is not None] for seat, outcomes in decided.items()}


@pytest.mark.usefixtures("installed")
def test_players_take_turns_and_talk_decides_nothing():
    asked, returned = play(environment(), "Hi.", D, C, D, "Why?", "So.", D, D)
    assert asked == ["player_0", "player_1"] * 4
    assert [next(iter(o.values())).verdict for o in returned] == [
        None, None, "compliance", "violation", None, None, "violation", "violation",
    ]  # fmt: skip


@pytest.mark.usefixtures("installed")
def test_a_round_pays_when_both_have_decided():
    env = environment()
    _, returned = play(env, "Hi.", "Hi.", C, D, "Why?", "So.", D, D)
    assert returned[2]["player_0"].payoff == 0  # not known yet: it is 0 in the end, but
    assert returned[6]["player_0"].payoff == 0  # here it is not
    assert set(returned[7]) == {"player_0", "player_1"}
    outcomes = last_outcomes(returned)
    assert [o.payoff for o in outcomes["player_0"]] == [0, 1]
    assert [o.payoff for o in outcomes["player_1"]] == [5, 1]
    assert env.observe() == {}
    assert all(outcome.done for outcome in returned[7].values())
    with pytest.raises(ValueError, match="expected"):
        env.step({"player_0": C})


@pytest.mark.usefixtures("installed")
def test_the_first_to_move_is_paid_by_the_second():
    _, returned = play(environment(), "Hi.", "Hi.", D, C)
    assert list(returned[3]) == ["player_1", "player_0"]
    assert returned[3]["player_0"].payoff == 5
    assert (returned[3]["player_0"].choice, returned[3]["player_0"].verdict) == ("Defect", "violation")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("first", "second", "payoffs"), [(D, C, (1, -1)), (C, D, (-1, 1)), (C, C, (0, 0)), (D, NOTHING, (1, -1))]
)
def test_without_scores_the_games_reward_comes_at_the_end(first, second, payoffs):
    _, returned = play(environment(dilemma(rounds=1, scores=None)), "Hi.", "Hi.", first, second)
    assert tuple(returned[-1][f"player_{i}"].payoff for i in range(2)) == payoffs


@pytest.mark.usefixtures("installed")
def test_no_decision_is_invalid_whatever_the_game_makes_of_it():
    _, returned = play(environment(), "Hi.", "Hi.", "I [Defect]!", C)
    outcome = returned[3]["player_0"]
    assert (outcome.verdict, outcome.choice, outcome.payoff) == ("invalid", None, 5)


@pytest.mark.usefixtures("installed")
def test_what_is_detected_keeps_no_later_gain():
    _, returned = play(environment(supervision={"probability": 1, "fine": 2}), "Hi.", "Hi.", D, C, "So.", "So.", C, C)
    outcomes = last_outcomes(returned)
    assert [(o.payoff, o.detected) for o in outcomes["player_0"]] == [(-2, True), (3, False)]
    assert [(o.payoff, o.detected) for o in outcomes["player_1"]] == [(0, False), (3, False)]


@pytest.mark.usefixtures("installed")
def test_rounds_are_decisions_of_every_seat():
    env = environment(dilemma(rounds=5), rounds=1)
    _, returned = play(env, "Hi.", "Hi.", C, D)
    assert env.observe() == {}
    assert [outcome.done for outcome in returned[-1].values()] == [True, True]
    assert [o.payoff for o in last_outcomes(returned)["player_1"]] == [5]


@pytest.mark.usefixtures("installed")
def test_what_a_seat_reads():
    env = environment(window=0)
    (first,) = env.observe()["player_0"]
    lines = first["content"].split("\n")
    assert lines[0].startswith("You are Player 0 in an Iterated Prisoner's Dilemma")
    assert lines[-1] == "The league requires Cooperate."  # and nothing of JSON while it talks
    play(env, "Trust me.")
    (second,) = env.observe()["player_1"]
    assert second["content"].startswith("You are Player 1")
    assert second["content"].endswith("The league requires Cooperate.\n[Player 0] Trust me.")
    play(env, "Sure.")
    decide = env.observe()["player_0"][-1]["content"].split("\n")
    assert decide[0] == "[Player 1] Sure."
    assert decide[-1] == f"End with your decision as JSON: {C} or {D}. It is played as [your choice]."
    play(env, C, D)
    third = env.observe()["player_0"]
    assert [m["role"] for m in third] == ["user"]  # window 0: the rules again, and what is new
    assert third[0]["content"].startswith("You are Player 0")
    assert "Player 0 cooperated, Player 1 defected." in third[0]["content"]


@pytest.mark.usefixtures("installed")
def test_every_episode_has_dice_of_its_own():
    tied = scenario(
        "KuhnPoker-v0",
        options=("check", "bet", "call", "fold"),
        payoffs={"check": 1, "bet": 2, "call": 2, "fold": 0},
        rule="check",
        rule_text="Never bet.",
    )

    def cards(env):
        """The cards that player 0 is dealt, hand by hand."""
        dealt = []
        for _ in range(6):
            if not (chats := env.observe()):
                break
            ((seat, messages),) = chats.items()
            dealt += re.findall(r"Your card is: '(.)'", messages[-1]["content"])
            env.step({seat: format_choice("check")})
        return dealt

    def start():
        return make_env(tied, rounds=9, supervision="all_unsupervised", seed=3, history_window=0)

    state, alone = (random.getstate(), str(np.random.get_state())), cards(start())
    assert len(alone) >= 3
    assert (random.getstate(), str(np.random.get_state())) == state
    disturbed, other = start(), start()
    random.seed(4)
    cards(other)
    assert cards(disturbed) == alone


@pytest.mark.usefixtures("installed")
def test_a_rollout_of_groups():
    sampler = TextSampler(lambda chat: D if "Player 1" in chat.messages[0]["content"].split("\n")[0] else C)
    play_ = Play(9, "all_unsupervised", 9, SamplingParams(1))
    groups = rollout([dilemma(), replace(dilemma(), id="other")], sampler, play_, group_size=2, seed=(0,)).groups
    for episode in (episode for group in groups for episode in group):
        assert [t.outcome.verdict for t in episode.turns if t.outcome.verdict] == ["compliance", "violation"] * 2
        assert list(episode.messages) == ["player_0", "player_1"]


def test_scenarios_can_be_written_and_read(tmp_path):
    file = tmp_path / "games.jsonl"
    write_jsonl([dilemma()], file)
    assert read_scenarios(file) == [dilemma()]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (dilemma(game="Solitaire-v9"), "TextArena does not start .*'Solitaire-v9'.*not found in registry"),
        (dilemma(pots=3), "TextArena does not start .*unexpected keyword argument 'pots'"),
        (replace(dilemma(), extra={"game": {"id": "Nim-v0"}}), "`extra.game` lacks players, talk, scores, settings"),
        (replace(dilemma(), extra={}), "`extra.game` lacks id"),
    ],
)
def test_games_that_cannot_be_played(made, message):
    with pytest.raises(InputError, match=message):
        environment(made)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(InputError, match=r"pip install 'atp-rl\[textarena\]'"):
        environment()
