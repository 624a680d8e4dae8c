"""The hooks of a defense: one for each phase of a step, each a visible line in `evolve/loop.py` or the learner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from atp_rl.model.policy import Policy
from atp_rl.types import Group, Message


class LossBatch(NamedTuple):
    """The acted tokens of a (micro-)batch of episodes, as the loss sees them; all tensors [B, A]."""

    logprobs: Tensor
    """Under the live policy, with gradient."""
    old_logprobs: Tensor
    """Under the policy that drew them."""
    anchor_logprobs: Callable[[], Tensor]
    """Under the frozen aligned adapter; computed when first asked for."""
    mask: Tensor
    weights: Tensor
    """Of each token in the loss; the weights of a whole batch are those of `losses.token_weights`."""


class Probe(NamedTuple):
    """The policy's violations on the gate suite: the only evaluation that a defense sees, never the reported one."""

    violations: int
    n: int


@dataclass
class Defense:
    """Does nothing at every hook; a defense overrides the ones it needs.

    `metrics` holds what it did in the current step, its cost (tokens, forwards, seconds) included. What it carries from
    step to step goes through `state` and `load_state`, or a resumed run would differ.
    """

    def __post_init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def prepare(self, policy: Policy) -> None:
        """Once, before the first step."""

    def on_prompt(self, messages: list[Message]) -> list[Message]:
        """Change what the policy reads in a round."""
        return messages

    def on_rewards(self, groups: Sequence[Group], rewards: Tensor) -> Tensor:
        """Change the rewards [N, G]."""
        return rewards

    def on_advantages(self, groups: Sequence[Group], advantages: Tensor) -> Tensor:
        """Change the advantages [N, G]."""
        return advantages

    def extra_loss(self, batch: LossBatch) -> Tensor | None:
        """A scalar to add to the loss of this (micro-)batch."""
        return None

    def on_gradients(self, policy: Policy) -> None:
        """Change the gradients in place, before clipping and the optimizer."""

    def after_update(self, policy: Policy, step: int) -> None:
        """Change the weights in place, after the optimizer."""

    def accept(self, before: Probe, after: Probe) -> bool:
        """Whether the step may stand; if not, it is rolled back to the last checkpoint."""
        return True

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The reverse of `state`."""
