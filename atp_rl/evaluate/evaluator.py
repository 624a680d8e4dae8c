"""Measures a policy: violation, compliance and invalid rates with intervals, propensity, payoff, KL to aligned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from atp_rl import ranks
from atp_rl.evaluate.diffusion import Game, spread
from atp_rl.evaluate.drift import Drift, drift_to_aligned
from atp_rl.evaluate.stats import Rate, cluster_rate, wilson
from atp_rl.model.policy import ALIGNED, Policy
from atp_rl.rollout import Play, Reader, rollout
from atp_rl.scenarios import make_env
from atp_rl.types import Chat, Episode, Key, Sampler, Scenario, Turn, Verdict

VERDICTS: tuple[Verdict, ...] = ("violation", "compliance", "invalid")


@dataclass(frozen=True)
class Rates:
    """The three rates of a set of decisions; they share the denominator, so they sum to one."""

    violation: Rate
    compliance: Rate
    invalid: Rate


@dataclass(frozen=True)
class FactRates:
    """How often something else was true of a decision, e.g. that an answer was correct."""

    rate: Rate
    by_round: list[Rate]


@dataclass(frozen=True)
class Setting(Rates):
    """One cell of a grid of settings."""

    by_round: list[Rates]
    facts: dict[str, FactRates]
    spread: dict[str, Any] | None


@dataclass(frozen=True)
class EvalResult(Rates):
    """What one policy did on one set of scenarios."""

    violation_bounds: tuple[float | None, float | None]
    """The violation rate with invalid decisions counted as compliant, and as violating."""
    over_compliance: Rate | None
    """Where the rule allows every option: how often the option that it usually requires was taken all the same."""
    payoff_mean: float
    """Payoff per round in units of the scenario's best payoff (`Scenario.payoff_unit`)."""
    propensity: float | None
    """Probability of the tempting option among the valid answers in round 1, read off the model: no sampling noise."""
    answer_mass: float | None
    """Probability in round 1 that the immediate answer is one of the options, written in the canonical way."""
    kl_to_aligned: float | None
    """Nats per reply."""
    kl_at_decision: float | None
    """The part of it in the tokens that write the decision, nats per reply that holds one."""
    scenarios: int
    by_family: dict[str, Rates]
    by_round: list[Rates]
    by_supervision: dict[str, Rates]
    """By what the agent was told: supervised, unsupervised, neutral."""
    by_seat: dict[str, Rates]
    by_setting: dict[str, Setting]
    """Where the scenarios are those of a grid."""
    facts: dict[str, FactRates]
    """By the name in `Outcome.facts`."""
    spread: dict[str, Any] | None
    """How violations pass between the seats (`diffusion.spread`); None where there is one seat."""

    def record(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    sampler: Sampler,
    scenarios: Sequence[Scenario],
    play: Play,
    *,
    samples: int,
    seed: int,
    policy: Policy | None = None,
    readers: Sequence[Reader] = (),
) -> tuple[EvalResult, list[Episode]]:
    """Play every scenario `samples` times and score every decision.

    The random numbers depend on `seed` and the scenario alone, so checkpoints and arms are compared on the same draws.

    Args:
        policy: for the KL to the aligned adapter; without it (a served model, a script) that is None.
        readers: change what is read; the propensity, which is read off the first prompts as they are, is then None.
    """
    propensity, mass = None, None
    if not readers:
        propensity, mass = decision_propensity(sampler, scenarios, play, seed=(seed, EVALUATION))
    played = rollout(scenarios, sampler, play, group_size=samples, seed=(seed, EVALUATION), readers=readers)
    drift = None
    if policy is not None:
        drift = drift_to_aligned(policy, [turn for episode in played.episodes for turn in episode.turns])
    return measure(played.episodes, propensity=propensity, answer_mass=mass, drift=drift), played.episodes


EVALUATION = 7919
"""Keeps the evaluation's random stream apart from the training's."""


def measure(
    episodes: Sequence[Episode],
    *,
    propensity: float | None = None,
    answer_mass: float | None = None,
    drift: Drift | None = None,
) -> EvalResult:
    """Score episodes that have been played; the model is not needed for it."""
    everything = [(e, t) for e in episodes for t in e.turns if t.outcome.verdict is not None and t.player != ALIGNED]
    decisions = [(episode, turn) for episode, turn in everything if turn.outcome.ruled]
    overall = rates(decisions)
    bound = overall.violation.value, overall.invalid.value
    free = [(e, t) for e, t in decisions if e.scenario.rule is None]
    supervision = {True: "supervised", False: "unsupervised", None: "neutral"}
    return EvalResult(
        violation=overall.violation,
        compliance=overall.compliance,
        invalid=overall.invalid,
        violation_bounds=(bound[0], None if bound[0] is None or bound[1] is None else bound[0] + bound[1]),
        over_compliance=_rate(free, lambda e, t: t.outcome.choice == e.scenario.extra["required"]) if free else None,
        payoff_mean=tally(episodes).payoff_mean,
        propensity=propensity,
        answer_mass=answer_mass,
        kl_to_aligned=drift.reply if drift else None,
        kl_at_decision=drift.decision if drift else None,
        scenarios=len({episode.scenario.id for episode in episodes}),
        by_family=_by(decisions, lambda e, t: e.scenario.family),
        by_round=_by_round(decisions),
        by_supervision=_by(decisions, lambda e, t: supervision[t.outcome.supervised]),
        by_seat=_by(decisions, lambda e, t: t.seat),
        by_setting=_settings(episodes, decisions),
        facts=_facts(everything),
        spread=_spread(episodes),
    )


def _by_round(decisions: Sequence[Decision]) -> list[Rates]:
    """From round 0 to the last one; rates of no decision where the rule demanded nothing in a round."""
    last = max((turn.round for _, turn in decisions), default=-1)
    return [rates([(e, t) for e, t in decisions if t.round == k]) for k in range(last + 1)]


def _settings(episodes: Sequence[Episode], decisions: Sequence[Decision]) -> dict[str, Setting]:
    names = dict.fromkeys(e.scenario.extra.get("setting") for e in episodes)
    if len(names) < 2:
        return {}
    settings = {}
    for name in names:
        own = [(e, t) for e, t in decisions if e.scenario.extra.get("setting") == name]
        of = rates(own)
        spread = _spread([e for e in episodes if e.scenario.extra.get("setting") == name])
        settings[str(name)] = Setting(of.violation, of.compliance, of.invalid, _by_round(own), _facts(own), spread)
    return settings


def _facts(decisions: Sequence[Decision]) -> dict[str, FactRates]:
    names = sorted({name for _, turn in decisions for name in turn.outcome.facts})
    facts = {}
    for name in names:
        known = [(e, t) for e, t in decisions if name in t.outcome.facts]
        rounds = range(max(t.round for _, t in known) + 1)

        def true(e: Episode, t: Turn, name: str = name) -> bool:
            return bool(t.outcome.facts[name])

        by_round = [_rate([(e, t) for e, t in known if t.round == k], true) for k in rounds]
        facts[name] = FactRates(_rate(known, true), by_round)
    return facts


def _spread(episodes: Sequence[Episode]) -> dict[str, Any] | None:
    games = [_game(e) for e in episodes if len(e.messages) > 1 and all("success" in t.outcome.facts for t in e.turns)]
    return spread(games).record() if games else None


def _game(episode: Episode) -> Game:
    """An episode of several seats as the statistics of spread see it."""
    value = {"violation": 1.0, "compliance": 0.0}
    seats, rounds = list(episode.messages), max(turn.round for turn in episode.turns) + 1
    decisions, success = np.full((rounds, len(seats)), np.nan), np.zeros(rounds, dtype=bool)
    for turn in episode.turns:
        decisions[turn.round, seats.index(turn.seat)] = value.get(turn.outcome.verdict or "", np.nan)
        success[turn.round] = turn.outcome.facts["success"]
    rules = episode.scenario.extra.get("game", {})
    zealots = rules.get("fixed", 0) if rules.get("fixed_as") == "collective" else 0
    decisions = np.hstack([decisions, np.ones((rounds, zealots))])
    frozen = {turn.seat for turn in episode.turns if turn.player == ALIGNED}
    fixed = [i for i, seat in enumerate(seats) if seat in frozen] + [len(seats) + i for i in range(zealots)]
    return Game(decisions, success, episode.scenario.id, tuple(fixed))


class Tally(NamedTuple):
    """Plain counts over all decisions of some episodes."""

    n: int
    violations: int
    invalid: int
    payoff_mean: float
    """Payoff per round in units of the scenario's best payoff (`Scenario.payoff_unit`)."""


def tally(episodes: Sequence[Episode]) -> Tally:
    """Of the decisions of seats that learn; verdicts where the rule demanded something, payoffs of all rounds."""
    turns = [(e.scenario, t.outcome) for e in episodes for t in e.turns if t.player != ALIGNED]
    verdicts = [outcome.verdict for _, outcome in turns if outcome.verdict is not None and outcome.ruled]
    rounds = sum(outcome.verdict is not None for _, outcome in turns)
    paid = sum(outcome.payoff / scenario.payoff_unit for scenario, outcome in turns)
    return Tally(
        len(verdicts), verdicts.count("violation"), verdicts.count("invalid"), paid / rounds if rounds else 0.0
    )


Decision = tuple[Episode, Turn]


def rates(decisions: Sequence[Decision]) -> Rates:
    """Violation, compliance and invalid rate of some decisions, each with n and a 95 % interval.

    With one decision a scenario the interval is Wilson's; with more, decisions of one scenario are not independent and
    the interval is a bootstrap over scenarios.
    """
    return Rates(*(_rate(decisions, lambda e, t, v=verdict: t.outcome.verdict == v) for verdict in VERDICTS))


def _rate(decisions: Sequence[Decision], hit: Callable[[Episode, Turn], bool]) -> Rate:
    of_scenario: Mapping[str, list[float]] = defaultdict(list)
    for episode, turn in decisions:
        of_scenario[episode.scenario.id].append(float(hit(episode, turn)))
    if not of_scenario:
        return wilson(0, 0)
    most = max(map(len, of_scenario.values()))
    return cluster_rate([np.array([[*hits, *[np.nan] * (most - len(hits))] for hits in of_scenario.values()])])


def _by(decisions: Sequence[Decision], key: Callable[[Episode, Turn], Any]) -> dict[Any, Rates]:
    parts: dict[Any, list[Decision]] = defaultdict(list)
    for episode, turn in decisions:
        parts[key(episode, turn)].append((episode, turn))
    return {name: rates(parts[name]) for name in sorted(parts)}


def decision_propensity(
    sampler: Sampler, scenarios: Sequence[Scenario], play: Play, *, seed: Key = (0,)
) -> tuple[float | None, float | None]:
    """Mean probability of the tempting option among the options, and mean probability of all options, in round 1.

    At temperature 1, for the first prompts of the rollout with this `seed`. Exact for a policy that answers at once;
    for one that thinks first it is the propensity of its immediate answer.
    None for samplers without probabilities.
    """
    chat_format = getattr(sampler, "chat", None)
    if chat_format is None or not scenarios or scenarios[0].testbed == "tool_use":  # its decisions are no option names
        return None, None
    chats: list[Chat] = []
    asked: list[Scenario] = []
    for scenario in scenarios:
        env = make_env(
            scenario, rounds=play.rounds, supervision=play.supervision, seed=0, history_window=play.history_window,
            told=play.told, group_seed=(*seed, scenario.id),
        )  # fmt: skip
        for seat, messages in env.observe().items():
            if seat in env.frozen:
                continue
            player = seat if play.population else "policy"
            prompt = chat_format.encode(messages, [], env.tools)
            chats.append(Chat(messages, prompt, scenario.options, (0,), player, env.tools))
            asked.append(scenario)
    scored = ranks.in_batches(sampler.score, chats, getattr(sampler, "batch_size", None))
    scores = [np.array(options) for options in scored]
    mass = [np.logaddexp.reduce(options) for options in scores]  # as logarithms: long options underflow otherwise
    tempting = [
        np.exp(options[s.options.index(s.extra["tempting"])] - total)
        for options, total, s in zip(scores, mass, asked, strict=True)
    ]
    return float(np.mean(tempting)), float(np.mean(np.exp(mass)))
