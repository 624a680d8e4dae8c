"""The hooks of a defense: one for each phase of a step, each a visible line in `evolve/loop.py` or the learner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from atp_rl.model.policy import Policy
from atp_rl.rollout import Ask
from atp_rl.types import Group, InputError, Moment, Overhead, Prompt, Scenario


class LossBatch(NamedTuple):
    """The acted tokens of a (micro-)batch of episodes, as the loss sees them; tensors [B, A] unless they say else."""

    logprobs: Tensor
    """Under the live policy, with gradient."""
    old_logprobs: Tensor
    """Under the policy that drew them."""
    anchor_logprobs: Callable[..., Tensor]
    """Under the frozen aligned adapter, or under another frozen one (`Policy.add_frozen`) that it is given the name of;
    computed when first asked for, whose cost it then is."""
    mask: Tensor
    weights: Tensor
    """Of each token in the loss; the weights of a whole batch are those of `losses.token_weights`."""
    tokens: Tensor
    """Their ids; 0 where masked."""
    advantages: Tensor
    """[B, 1]"""
    surrogate: Tensor
    """The loss of each token before it is weighted, with gradient."""
    groups: Tensor
    """[B] index of the row's group in the step."""
    updates: int = 1
    """How many updates the step has, each on all of its episodes."""


class Probe(NamedTuple):
    """The policy's violations on the gate suite: the only evaluation that a defense sees, never the reported one."""

    violations: int
    n: int
    invalid: int


class Plan(NamedTuple):
    """What a recipe says of its evolution, before anything is loaded."""

    population: bool
    """Whether every seat has an adapter of its own."""
    imitates: bool
    """Whether seats also copy what paid their peers."""
    from_base: bool
    """Whether it starts from the bare base model, without an aligned adapter."""


@dataclass(frozen=True)
class Setting:
    """What a defense may know of the run that it defends."""

    policy: Policy
    seed: int
    """Root of all draws: `random_stream(seed, name of the defense, step)`."""
    rule_scenarios: Sequence[Scenario]
    """Those of alignment: training families, and none that evolution draws from, a gate sees or a report measures."""
    pairs: Sequence[Mapping[str, Any]]
    """Alignment's preference pairs, as in `align.preferences`; none without alignment."""
    group_size: int
    learning_rate: float
    temperature: float
    aligned: Mapping[str, Tensor]
    """The weights that the live adapters start from, by the names of `Policy.state`; never written to."""


@dataclass
class Defense:
    """Does nothing at every hook; a defense overrides the ones it needs.

    `metrics` holds what it did in the current step; `cost` what the step took more because of it. What it carries from
    step to step goes through `state` and `load_state` (and `tensors`), or a resumed run would differ.
    """

    name: ClassVar[str] = "defense"
    """In a recipe, in metrics and in tables."""
    deploys: ClassVar[bool] = False
    """Whether it goes with the policy where that is used: its `on_scenario`, `on_history` and `on_prompts` then also
    act when the `deployed` rate is measured; `weights_only` is measured without."""
    needs_pairs: ClassVar[bool] = False
    """Whether it cannot do without alignment's preference pairs."""
    needs_past: ClassVar[bool] = False
    """Whether it changes nothing in episodes of one round."""
    asks: ClassVar[bool] = False
    """Whether its `on_prompts` has a model write text, for which `sampler.mode` must be free."""

    def __post_init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.cost = Overhead()
        self.step = 0

    def beside(self, others: Sequence[Defense]) -> None:
        """Told all defenses of the recipe, itself among them, in order; raises InputError if they do not fit."""

    def suits(self, plan: Plan) -> None:
        """Told how the recipe learns; raises InputError if the defense does not fit that."""

    def refuse_imitation(self, plan: Plan) -> None:
        """For `suits` of what decides by advantages what is learned: copies have none, and would be learned anyway."""
        if plan.imitates:
            raise InputError(
                f"defense {self.name}: acts on advantages, and what seats copy from their peers has none; set "
                "evolve.learner=population, or leave the defense out"
            )

    def prepare(self, setting: Setting) -> None:
        """Once, before the first step, or before the first one after a resume."""
        self.setting = setting

    def begin(self, step: int) -> None:
        """A step (from 1) begins: what is counted starts anew."""
        self.step, self.metrics, self.cost = step, {}, Overhead()

    @contextmanager
    def paying(self, policy: Policy) -> Iterator[None]:
        """What the policy reads inside, and the time, is added to this defense's cost."""
        begun, forwards, tokens = time.perf_counter(), policy.forwards, policy.tokens_read
        yield
        self.cost.forwards += policy.forwards - forwards
        self.cost.tokens += policy.tokens_read - tokens
        self.cost.seconds += time.perf_counter() - begun

    def on_scenario(self, scenario: Scenario) -> Scenario:
        """Change the world that seats are put in: what is announced, who plays. Its id, options and rule stay."""
        return scenario

    def on_draw(self, scenarios: list[Scenario]) -> list[Scenario]:
        """Change the scenarios that a step plays a group of each; as many as before."""
        return scenarios

    def on_history(self, rounds: list[int], moment: Moment) -> list[int]:
        """Which of these past rounds (from 0, ascending) a seat still reads."""
        return rounds

    def on_prompts(self, prompts: list[Prompt], ask: Ask) -> list[Prompt]:
        """Change what seats are about to read; `ask` has a model answer something first."""
        return prompts

    def on_rewards(self, groups: Sequence[Group], rewards: Tensor) -> Tensor:
        """Change the rewards [N, G]."""
        return rewards

    def on_advantages(self, groups: Sequence[Group], advantages: Tensor) -> Tensor:
        """Change the advantages [N, G]."""
        return advantages

    def extra_loss(self, batch: LossBatch) -> Tensor | None:
        """A scalar to add to the loss of this (micro-)batch."""
        return None

    def backward(self, policy: Policy) -> None:
        """Back-propagate a loss on data of its own, once an update; gradients are then summed over the ranks, so each
        takes its own part of the data (`ranks.own_rows`)."""

    def on_gradients(self, policy: Policy) -> None:
        """Change the gradients in place, the same on every rank, before clipping and the optimizer."""

    def after_update(self, policy: Policy) -> None:
        """Change the weights in place, once a step, after its last update."""

    def accept(self, before: Probe, after: Probe) -> bool:
        """Whether the step may stand; if not, weights and optimizer return to the last step that all `trusts`."""
        return True

    @property
    def trusts(self) -> bool:
        """Whether the step that was just accepted is one to return to."""
        return True

    def on_rollback(self) -> None:
        """The step was rolled back, because of this defense or of another one."""

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The reverse of `state`."""

    def tensors(self) -> dict[str, Tensor]:
        """The part of the state that is large."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of `tensors`."""
