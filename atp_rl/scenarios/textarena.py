"""Games of TextArena: players take turns, each of them a seat. Needs `pip install 'atp-rl[textarena]'`.

A decision is the choice of a named option, read like everywhere by `choices.parse_choice` and played as `[option]`.
In the phases of a game that the scenario calls talk, what is written is passed on as it is and decides nothing.

A game pays when the others have moved too. So `step` also returns the outcome of a seat that was not pending, if its
last reply has come to something since: it takes the place of the one returned before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from atp_rl.scenarios.env import Env, random_stream
from atp_rl.scenarios.text_env import Judgement, Seat, format_text, judge_choice, tempting
from atp_rl.types import InputError, Key, Message, Outcome, Scenario


class TextArena(Env):
    """The game in `scenario.extra["game"]` (see `scenario`), until it ends or a seat has decided `rounds` times. All
    episodes of a group start with the same seed."""

    def __init__(self, scenario: Scenario, *, seed: Key, group_seed: Key | None = None, **played: Any) -> None:
        """Raises InputError without the package, or for a game that it does not have or start."""
        self.scenario, self.rules = scenario, scenario.extra.get("game", {})
        if missing := [key for key in ("id", "players", "talk", "scores", "settings") if key not in self.rules]:
            raise InputError(f"scenario {scenario.id!r}: `extra.game` lacks {', '.join(missing)}")
        self.names_options = not self.rules["talk"]
        self.seats = tuple(f"player_{i}" for i in range(self.rules["players"]))
        self.at = [Seat(scenario, seed=(*seed, s), group_seed=group_seed, **played) for s in self.seats]
        start = int(random_stream(*(seed if group_seed is None else group_seed), "reset").integers(2**31))
        self.dice = random.Random(start).getstate(), np.random.RandomState(start).get_state()
        with self._own_dice():
            self.game = _started(self.rules, start)
        self.over, self.scores = False, self._scores()
        self._listen()

    def observe(self, shown: Mapping[str, Sequence[int]] | None = None) -> dict[str, list[Message]]:
        if self.over:
            return {}
        seat = self.seats[self.player]
        return {seat: self.at[self.player].conversation(None if shown is None else shown[seat])}

    def step(self, replies: Mapping[str, str]) -> dict[str, Outcome]:
        if self.over or set(replies) != {self.seats[self.player]}:
            raise ValueError(f"replies of {sorted(replies)}; expected {list(self.observe())}")
        player, reply, talks = self.player, replies[self.seats[self.player]], self._talks()
        option = None if talks else self.choice_of(self.seats[player], reply)
        with self._own_dice():
            ended, _ = self.game.step(action=reply if option is None else f"[{option}]")
        before, self.scores = self.scores, self._scores()
        earned = [now - then for now, then in zip(self.scores, before, strict=True)]
        judged = Judgement(None, None) if talks else judge_choice(option, self.scenario.rule)
        outcome = self.at[player].pay(reply, judged, earned[player], over=ended)
        if not ended:
            self._listen()
        self.over = ended or self.at[self.player].round == self.at[self.player].rounds
        others = [i for i, seat in enumerate(self.at) if i != player and seat.outcome and (earned[i] or self.over)]
        outcomes = {self.seats[i]: self.at[i].settle(earned[i], over=self.over) for i in others}
        return {self.seats[player]: self.at[player].settle(0.0, over=self.over) if self.over else outcome, **outcomes}

    def _talks(self) -> bool:
        state = self.game.state.game_state
        return isinstance(state, dict) and state.get("phase") in self.rules["talk"]

    def _listen(self) -> None:
        """Let the seat whose turn it is read what was said since its last one; its own words it knows."""
        self.player, said = self.game.get_observation()
        heard = [(text if who < 0 else f"[Player {who}] {text}") for who, text, _ in said if who != self.player]
        seat = self.at[self.player]
        if not seat.heard:  # the rules of the game, which stay in sight
            seat.texts["task"] = "\n".join([*heard[:1], seat.texts.get("task", "")])
            heard = heard[1:]
        seat.hear("\n".join(heard if self._talks() else [*heard, self.scenario.texts.get("decide", "")]))

    def _scores(self) -> list[float]:
        """What every player has been paid so far: the running scores, or the reward at the end."""
        name, state = self.rules["scores"], self.game.state
        paid = (state.rewards or {}) if name is None else state.game_state[name]
        return [float(paid.get(i, 0.0)) for i in range(len(self.seats))]

    @contextmanager
    def _own_dice(self) -> Iterator[None]:
        """Games draw from Python's and numpy's global generators, which other episodes use in between."""
        outside = random.getstate(), np.random.get_state()
        random.setstate(self.dice[0])
        np.random.set_state(self.dice[1])
        try:
            yield
        finally:
            self.dice = random.getstate(), np.random.get_state()
            random.setstate(outside[0])
            np.random.set_state(outside[1])


def _started(rules: Mapping[str, Any], seed: int) -> Any:
    """The game without its wrappers, which keep a history of their own and change replies."""
    try:
        import textarena  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("the testbed textarena needs a package: pip install 'atp-rl[textarena]'") from None
    try:
        game = textarena.make(rules["id"], **rules["settings"])
        while isinstance(game, textarena.Wrapper):
            game = game.env
        game.reset(num_players=rules["players"], seed=seed)
    except Exception as error:  # each game fails in its own way: settings, missing words or keys, a newer Python
        raise InputError(f"TextArena does not start {dict(rules)}: {type(error).__name__}: {error}") from error
    return game


def scenario(
    game: str,
    *,
    options: Sequence[str],
    payoffs: Mapping[str, float],
    rule: str,
    rule_text: str,
    players: int = 2,
    talk: Sequence[str] = (),
    scores: str | None = None,
    index: int = 0,
    **settings: Any,
) -> Scenario:
    """A (held-out) scenario of the testbed `textarena`.

    Args:
        game: its id, e.g. `IteratedPrisonersDilemma-v0`.
        options: the words that a decision may be, as the game reads them in brackets.
        payoffs: what each of them pays at best.
        rule: the option that the rule requires; `rule_text`: the sentence that says so.
        talk: values of the game state's `phase` in which a reply decides nothing.
        scores: name of the game state's running scores. None: the game's own reward, which comes at the end.
        index: tells scenarios of one game apart; they start from different seeds.
        settings: of the game, e.g. `num_rounds=3`.
    """
    rules = {"id": game, "players": players, "talk": list(talk), "scores": scores, "settings": settings}
    return Scenario(
        id=f"textarena/{game}/{index}",
        testbed="textarena",
        family=game,
        split="held_out",
        texts={
            "task": rule_text,
            "rule": rule_text,
            "decide": f"{format_text(tuple(options))}. It is played as [your choice].",
        },
        options=tuple(options),
        payoffs=dict(payoffs),
        rule=rule,
        extra={"required": rule, "tempting": tempting(payoffs, rule), "game": rules},
    )
