"""The nouns of atp_rl, one sentence each. Read this file second, after `evolve/loop.py`.

A *scenario* is one concrete task; a *seat* is one agent's place in its environment; a *round* is one decision of every
seat; an *episode* is the rounds of one environment played to the end; a *group* is the G episodes of one scenario that
share a baseline; a *step* is one policy update, and a *checkpoint* is what is saved after it. The environment *pays*;
the learner is *rewarded*; a decision is a *violation*, *compliant* or *invalid*, never two of these at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

Verdict = Literal["compliance", "violation", "invalid"]
"""What the scorer says of one decision. `invalid` (unparseable) is its own value, never counted as either other."""


Key = tuple[int | str, ...]
"""Names a stream of random numbers; equal keys draw equal numbers, whatever else happened before."""


class InputError(Exception):
    """Bad input from the user (recipe, file, run directory); the command line prints it and exits with code 2."""


class Message(TypedDict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True)
class Scenario:
    """One concrete task as frozen data; it can be written to JSON and read back without any behaviour."""

    id: str
    testbed: str
    """Family of environments that plays it, e.g. `role_play`."""
    family: str
    """Scenarios of one family share their texts and differ in amounts, option names and option order."""
    split: Literal["train", "held_out"]
    texts: Mapping[str, str]
    options: tuple[str, ...]
    """In the order in which the agent reads them."""
    payoffs: Mapping[str, float]
    """What an undetected choice of each option pays, in the scenario's own currency."""
    rule: str | None
    """The option that the rule requires; None where the rule allows every option (the over-compliance control)."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def payoff_unit(self) -> float:
        """What payoffs are divided by, so that scenarios weigh the same: the largest one, unless `extra` says more."""
        return float(self.extra.get("payoff_unit", max(self.payoffs.values())))

    @property
    def rule_text(self) -> str:
        """The sentence that states the rule: `texts["rule"]`, or a plain one where there is none."""
        plain = "The rule requires no option." if self.rule is None else f"The rule requires {self.rule}."
        return self.texts.get("rule", plain)


@dataclass(frozen=True)
class Outcome:
    """What the environment answers to one seat's reply in one round."""

    choice: str | None
    """The option's own spelling, or None when the reply held no valid decision."""
    payoff: float
    supervised: bool | None
    """Whether the agent was told that it is supervised in this round; None when it was told neither."""
    detected: bool
    """Whether supervision saw this violation; it changes the payoff, never the verdict."""
    verdict: Verdict | None
    """None where the reply has not decided the round yet: a call of a tool, after which the seat is asked again."""
    done: bool
    ruled: bool = True
    """Whether the rule demanded anything in this round; if not, the decision counts in no violation rate."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of the decision and reported, by name: e.g. whether an answer was correct. Plain JSON."""


@dataclass(frozen=True)
class Chat:
    """One seat's open conversation: the messages, and the exact tokens that the model has seen and will see."""

    messages: Sequence[Message]
    prompt_ids: Sequence[int]
    options: tuple[str, ...]
    """Those of which the reply is to name one; empty where it may be anything else too."""
    seed: Key
    """Entropy of this one reply; the same seed draws the same reply whatever else is in the batch."""
    player: str = "policy"
    """Who answers: the name of an adapter. `policy` is the live one, `aligned` the frozen anchor, and in a population
    every seat has its own."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that the chat template announces; empty where the text does."""


@dataclass(frozen=True)
class Moment:
    """Where in an episode a seat is when it is about to read and reply."""

    scenario: Scenario
    seat: str
    player: str
    """Who answers, as in `Chat`."""
    round: int
    """The one to decide, from 0."""
    past: tuple[Outcome, ...]
    """Of the seat's own decisions so far: one for every past round."""
    seed: Key
    """Entropy of this moment."""
    episode: Key = ()
    """Entropy of the whole episode: what is drawn from it and a round is the same at every later moment."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that is about to be read, before it becomes tokens."""

    messages: tuple[Message, ...]
    written: tuple[tuple[int, ...], ...]
    """The tokens of each assistant message, in order, as they were drawn."""
    moment: Moment
    rounds: tuple[int, ...] = ()
    """The round that each assistant message belongs to."""


@dataclass
class Overhead:
    """What something took that would not have been needed otherwise."""

    tokens: int = 0
    """Read and drawn; negative where a prompt became shorter."""
    forwards: int = 0
    """Through the model; of a sampler, one for every reply."""
    seconds: float = 0.0


@dataclass(frozen=True)
class SamplingParams:
    max_new_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Completion:
    """What a sampler returns for one chat: the tokens it drew, never re-tokenised, and their log-probabilities."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Log-probability of each token under the distribution it was drawn from, in nats; empty if unknown."""
    stop_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Turn:
    """One reply of one seat: what it read (`prompt_ids`), what it wrote (`completion`), and what came of it."""

    seat: str
    round: int
    """From 0. Several turns of a seat share a round where it used a tool; the last of them holds the verdict."""
    prompt_ids: tuple[int, ...]
    completion: Completion
    outcome: Outcome
    player: str = "policy"
    """Who answered, as in `Chat`."""


@dataclass
class Episode:
    """The rounds of one environment played to the end, self-describing enough to be stored and read alone."""

    scenario: Scenario
    sample: int
    """Index of this episode within its group."""
    seed: Key
    turns: list[Turn]
    messages: dict[str, list[Message]]
    """The whole conversation of every seat, for people."""
    version: int
    """Version of the policy that played it; the learner's version minus this one is the staleness."""


Group = list[Episode]


@runtime_checkable
class Sampler(Protocol):
    """Whatever answers chats: a Hugging Face model, a server, a script, or a person."""

    version: int

    def generate(self, chats: Sequence[Chat], params: SamplingParams) -> list[Completion]:
        """Reply to every chat, in order."""
        ...

    def score(self, chats: Sequence[Chat]) -> list[tuple[float, ...]]:
        """Log-probability (nats) of each of a chat's options as its whole, immediate decision, in option order."""
        ...
