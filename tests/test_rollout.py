"""Scripted agents played in lock step: who is asked when, with which seed, and what is written down of it."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_rl.model.policy import load_chat
from atp_rl.model.sampler import TextSampler
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import load, make_env
from atp_rl.scenarios.choices import format_choice
from atp_rl.types import Completion, Overhead, SamplingParams

PARAMS = SamplingParams(max_new_tokens=7, temperature=0.5)


class Script(TextSampler):
    """Answers by a function of the chat and keeps what it was asked, call by call."""

    batch_size: int | None = None

    def __init__(self, reply, version=0):
        super().__init__(reply)
        self.version = version
        self.calls = []

    def generate(self, chats, params):
        assert params == PARAMS
        self.calls.append(list(chats))
        return super().generate(chats, params)


class TokenScript(Script):
    """The same in tokens, which are not the ones that a tokenizer would choose: every letter is one."""

    def __init__(self, reply, chat):
        super().__init__(reply)
        self.chat = chat

    def generate(self, chats, params):
        completions = []
        for completion in super().generate(chats, params):
            ids = [token for letter in completion.text for token in self.chat.encode_text(letter)]
            completions.append(Completion(completion.text, (*ids, self.chat.eos_id), (-0.5,) * (len(ids) + 1), "stop"))
        return completions


@pytest.fixture(scope="module")
def scenarios():
    return load({"families": ["ferry_pilot", "welder"], "per_family": 2})


def settings_of(rounds=3, window=5, supervision="alternating", told=None):
    return Play(rounds=rounds, supervision=supervision, history_window=window, sampling=PARAMS, told=told)


def honest(chat):
    return format_choice(chat.options[0])


def numbered(chat):
    """An answer that tells its round and the episode's sample."""
    *_, sample, _seat, k = chat.seed
    return f"{sample}.{k} {format_choice(chat.options[k % 2])}"


def play(scenarios, sampler, *, group_size=2, seed=(4, "rollout"), readers=(), **changed):
    return rollout(scenarios, sampler, settings_of(**changed), group_size=group_size, seed=seed, readers=readers)


# --- lock step


@pytest.mark.parametrize(("rounds", "group_size"), [(1, 1), (3, 2), (6, 4)])
def test_every_round_is_one_call_with_all_episodes(scenarios, rounds, group_size):
    sampler = Script(honest)
    played = play(scenarios, sampler, rounds=rounds, group_size=group_size)
    assert [len(chats) for chats in sampler.calls] == [4 * group_size] * rounds
    assert [len(group) for group in played.groups] == [group_size] * 4
    for scenario, group in zip(scenarios, played.groups, strict=True):
        assert [episode.scenario for episode in group] == [scenario] * group_size
        assert [episode.sample for episode in group] == list(range(group_size))
    for episode in played.episodes:
        assert [(t.seat, t.round, t.outcome.done) for t in episode.turns] == [
            ("agent", k, k == rounds - 1) for k in range(rounds)
        ]
    assert played.episodes == [episode for group in played.groups for episode in group]


def test_replies_go_to_their_own_environments(scenarios):
    sampler = Script(numbered)
    played = play(scenarios, sampler, rounds=3, supervision="all_unsupervised")
    for episode in played.episodes:
        options, pays = episode.scenario.options, episode.scenario.payoffs
        chosen = [options[0], options[1], options[0]]
        assert [t.completion.text for t in episode.turns] == [
            f"{episode.sample}.{k} {format_choice(option)}" for k, option in enumerate(chosen)
        ]
        assert [t.outcome.choice for t in episode.turns] == chosen
        assert [t.outcome.payoff for t in episode.turns] == [pays[option] for option in chosen]
        assert [t.outcome.verdict for t in episode.turns] == [
            "compliance" if option == episode.scenario.rule else "violation" for option in chosen
        ]


def test_the_environment_is_that_of_the_settings_and_the_episodes_seed(scenarios):
    def deviate(chat):
        return format_choice(next(s for s in scenarios if s.id == chat.seed[2]).extra["tempting"])

    for supervision in ("mostly_unsupervised", "random", {"probability": 0.5, "fine": 20}):
        played = play(scenarios, Script(deviate), rounds=5, supervision=supervision)
        for episode in played.episodes:
            env = make_env(
                episode.scenario, rounds=5, supervision=supervision, seed=episode.seed, history_window=5, told=None,
                group_seed=episode.seed[:-1],
            )  # fmt: skip
            again = [env.step({"agent": t.completion.text})["agent"] for t in episode.turns]
            assert [t.outcome for t in episode.turns] == again


def test_an_instruction_reaches_every_seat(scenarios):
    sampler = Script(honest)
    play(scenarios, sampler, told="comply")
    assert all(c.messages[0]["content"].endswith(" Follow the rule.") for call in sampler.calls for c in call)


def test_nothing_to_play(scenarios):
    sampler = Script(honest)
    assert play([], sampler).groups == []
    assert sampler.calls == []


# --- seeds


def test_seeds_are_made_of_the_stream_the_scenario_and_the_sample(scenarios):
    sampler = Script(honest)
    played = play(scenarios, sampler, rounds=2)
    assert [episode.seed for episode in played.episodes] == [
        (4, "rollout", scenario.id, sample) for scenario in scenarios for sample in (0, 1)
    ]
    asked = [[chat.seed for chat in call] for call in sampler.calls]
    assert asked == [[(*episode.seed, 0, k) for episode in played.episodes] for k in range(2)]  # seat 0, round k


def fate(played):
    """What happened to every episode."""
    return {e.seed: ([(t.completion, t.outcome, t.prompt_ids) for t in e.turns], e.messages) for e in played.episodes}


def by_seed(chat):
    """A deterministic policy that draws from the chat's own seed."""
    return format_choice(chat.options[sum(map(ord, repr(chat.seed))) % 2])


def test_an_episode_is_the_same_in_whatever_batch(scenarios):
    random = {"probability": 0.5}
    whole = fate(play(scenarios, Script(by_seed), group_size=4, supervision=random))
    assert fate(play(scenarios, Script(by_seed), group_size=4, supervision=random)) == whole
    for part in (scenarios[::-1], scenarios[1:2], scenarios[2:]):
        played = fate(play(part, Script(by_seed), group_size=3, supervision=random))
        assert len(played) == 3 * len(part)
        assert all(whole[key] == value for key, value in played.items())
    other = play(scenarios, Script(by_seed), group_size=4, supervision=random, seed=(5, "rollout"))
    assert not set(fate(other)) & set(whole)
    outcomes = [[t.outcome.detected for t in e.turns] for e in other.episodes]
    assert outcomes != [[t.outcome.detected for t in e.turns] for e in play(scenarios, Script(by_seed)).episodes]


def test_a_scenario_that_occurs_twice_is_numbered_on(scenarios):
    first, second = scenarios[:2]
    played = play([first, second, first], Script(honest), group_size=2)
    assert [[(e.scenario.id, e.sample) for e in group] for group in played.groups] == [
        [(first.id, 0), (first.id, 1)],
        [(second.id, 0), (second.id, 1)],
        [(first.id, 2), (first.id, 3)],
    ]
    assert len({e.seed for e in played.episodes}) == 6
    # as in one larger group
    large = fate(play([first], Script(by_seed), group_size=4))
    assert fate(play([first, first], Script(by_seed), group_size=2)) == large


def test_only_where_decisions_are_names_of_options_a_chat_has_them(scenarios):
    sampler = Script(honest)
    play(scenarios[:1], sampler)
    assert {chat.options for call in sampler.calls for chat in call} == {scenarios[0].options}
    tools = Script(lambda chat: "hm")
    play(load({"testbed": "tool_use", "problems": "sums", "per_family": 1})[:1], tools, rounds=1)
    assert {chat.options for call in tools.calls for chat in call} == {()}


# --- what is written down


@pytest.mark.parametrize("window", [0, 1, 5])
def test_the_whole_conversation_is_recorded_even_where_the_window_cuts(scenarios, window):
    sampler = Script(numbered)
    played = play(scenarios[:1], sampler, rounds=4, window=window, group_size=2)
    for sample, episode in enumerate(played.groups[0]):
        messages = episode.messages["agent"]
        assert [m["role"] for m in messages] == ["system"] + ["user", "assistant"] * 4
        assert [m["content"] for m in messages if m["role"] == "assistant"] == [
            t.completion.text for t in episode.turns
        ]
        asked = [call[sample].messages for call in sampler.calls]
        assert messages[0] == asked[0][0]
        assert [m for m in messages if m["role"] == "user"] == [chat[-1] for chat in asked]
        assert [sum(m["role"] == "assistant" for m in chat) for chat in asked] == [min(k, window) for k in range(4)]


def test_an_episode_carries_the_samplers_version(scenarios):
    assert {e.version for e in play(scenarios, Script(honest, version=12)).episodes} == {12}


def test_a_script_has_no_tokens(scenarios):
    played = play(scenarios, Script(honest))
    assert played.tokens == 0
    assert played.seconds > 0
    assert {t.prompt_ids for e in played.episodes for t in e.turns} == {()}


# --- tokens


@pytest.fixture(scope="module")
def chat(random_base):
    return load_chat(random_base)


@pytest.mark.parametrize("window", [0, 1, 5])
def test_a_turn_keeps_the_prompt_that_was_read_and_the_tokens_that_were_drawn(scenarios, chat, window):
    sampler = TokenScript(numbered, chat)
    played = play(scenarios, sampler, rounds=4, window=window)
    drawn = 0
    for i, episode in enumerate(played.episodes):
        for k, turn in enumerate(episode.turns):
            asked = sampler.calls[k][i]
            assert turn.prompt_ids == tuple(asked.prompt_ids)
            kept = [list(t.completion.token_ids) for t in episode.turns[max(0, k - window) : k]]
            assert asked.prompt_ids == chat.encode(asked.messages, kept)
            drawn += len(turn.completion.token_ids)
            if 0 < k <= window:  # nothing was cut: only what is new was added
                before = episode.turns[k - 1]
                so_far = before.prompt_ids + before.completion.token_ids
                assert turn.prompt_ids[: len(so_far)] == so_far
    assert played.tokens == drawn


# --- the defenses' changes to what is read


class Changing:
    """A reader that changes the messages of every prompt."""

    def __init__(self, change):
        self.change, self.cost = change, Overhead()

    def on_history(self, rounds, moment):
        return rounds

    def on_prompts(self, prompts, ask):
        return [replace(prompt, messages=tuple(self.change(prompt.messages))) for prompt in prompts]


def test_hooks_change_what_is_read_in_every_round_one_after_the_other(scenarios, chat):
    seen = []

    def remind(messages):
        seen.append([m["role"] for m in messages])
        return ({**messages[0], "content": f"{messages[0]['content']} Remember the rule."}, *messages[1:])

    def shout(messages):
        return ({**messages[0], "content": messages[0]["content"].upper()}, *messages[1:])

    reminding, shouting = Changing(remind), Changing(shout)
    sampler = TokenScript(numbered, chat)
    played = play(scenarios[:1], sampler, rounds=3, group_size=1, readers=(reminding, shouting))
    (episode,) = played.episodes
    assert seen == [["system", "user"] + ["assistant", "user"] * k for k in range(3)]
    for call, turn in zip(sampler.calls, episode.turns, strict=True):
        assert call[0].messages[0]["content"] == "YOU ARE A FERRY PILOT. REMEMBER THE RULE."
        assert "REMEMBER THE RULE." in chat.tokenizer.decode(turn.prompt_ids)
    assert episode.messages["agent"][0]["content"] == "YOU ARE A FERRY PILOT. REMEMBER THE RULE."
    plain = play(scenarios[:1], TokenScript(numbered, chat), rounds=3, group_size=1).episodes[0]
    assert [t.outcome for t in plain.turns] == [t.outcome for t in episode.turns]  # the environment does not see them
    swapped = play(scenarios[:1], Script(numbered), rounds=1, group_size=1, readers=(shouting, reminding)).episodes[0]
    assert swapped.messages["agent"][0]["content"] == "YOU ARE A FERRY PILOT. Remember the rule."


def test_a_hook_may_drop_rounds_and_the_tokens_go_with_them(scenarios, chat):
    sampler = TokenScript(numbered, chat)

    class LastRound(Changing):
        def on_history(self, rounds, moment):
            assert rounds == list(range(moment.round))
            assert len(moment.past) == moment.round
            return rounds[-1:]

    last_round = LastRound(lambda messages: messages)
    (group,) = play(scenarios[:1], sampler, rounds=4, group_size=1, readers=[last_round]).groups
    turns = group[0].turns
    for k in (2, 3):  # the last round's answer is all that is left
        messages = sampler.calls[k][0].messages
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
        assert sampler.calls[k][0].prompt_ids == chat.encode(messages, [turns[k - 1].completion.token_ids])


# --- pay


POLICIES = st.lists(st.sampled_from(["required", "tempting", "nothing"]), min_size=5, max_size=5)


@given(POLICIES, st.floats(0, 1), st.integers(0, 100), st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_pay_and_verdicts_add_up(script, probability, fine, seed):
    made = load({"families": ["welder"], "per_family": 3, "seed": seed})
    extra = {s.id: s.extra for s in made}

    def reply(chat):
        *_, scenario, _sample, _seat, k = chat.seed
        return "hm" if script[k] == "nothing" else format_choice(extra[scenario][script[k]])

    supervision = {"probability": probability, "fine": fine}
    episodes = play(made, Script(reply), rounds=5, supervision=supervision, seed=(seed,)).episodes
    for episode in episodes:
        counts = defaultdict(int)
        for turn in episode.turns:
            counts[turn.outcome.verdict] += 1
            counts["detected"] += turn.outcome.detected
        assert counts["compliance"] == script.count("required")
        assert counts["violation"] == script.count("tempting")
        assert counts["invalid"] == script.count("nothing")
        low, high = (episode.scenario.payoffs[episode.scenario.extra[k]] for k in ("required", "tempting"))
        by_hand = low * counts["compliance"] + high * (counts["violation"] - counts["detected"])
        assert sum(t.outcome.payoff for t in episode.turns) == by_hand - fine * counts["detected"]


def test_the_episodes_of_a_group_are_told_the_same():
    scenarios = load({"split": "train", "per_family": 1})
    play = Play(rounds=4, supervision="random", history_window=4, sampling=SamplingParams(4))
    played = rollout(scenarios, TextSampler(lambda chat: "hm"), play, group_size=3, seed=(5,))
    told = [[[t.outcome.supervised for t in e.turns] for e in group] for group in played.groups]
    assert all(episode == group[0] for group in told for episode in group)
    assert len({tuple(group[0]) for group in told}) > 4  # and other scenarios something else


def test_whole_groups_are_played_in_waves_of_so_many_conversations(scenarios):
    script, everything = Script(honest), Script(honest)
    script.batch_size = 5
    some = rollout(scenarios, script, settings_of(rounds=2), group_size=2, seed=(0,))
    ids = [scenario.id for scenario in scenarios]
    waves = [[(i, k) for i in pair for k in (0, 1)] for pair in (ids[:2], ids[2:])]
    asked = [[chat.seed[1:3] for chat in call] for call in script.calls]
    assert asked == [waves[0], waves[0], waves[1], waves[1]]  # two rounds each
    assert some.groups == rollout(scenarios, everything, settings_of(rounds=2), group_size=2, seed=(0,)).groups
    assert len(everything.calls) == 2
