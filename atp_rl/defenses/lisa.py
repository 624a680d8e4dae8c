"""LISA: steps of alignment and steps of evolution take turns, each kept near where the other left off.

Mechanism: `align_steps` steps learn from alignment's pairs in place of the episodes (whose advantages are set to zero),
           then `evolve_steps` steps learn from the episodes, and so on; in both a proximal term holds the weights near
           those of the last switch. Episodes are played, and counted, in both kinds of step: arms are compared at equal
           environment steps, of which this one learns from a part.
Formula:   loss + rho / 2 |theta - theta_switch|^2; in alignment steps the loss is the mean of -log pi(chosen). After a
           rollback theta_switch is what was restored. Refused beside the learner `imitation`, whose copies would be
           learned in alignment steps too.
Source:    Lisa, arXiv 2405.18641 (bi-state optimization with a proximal term).
Hook:      begin (the switch), on_advantages, backward, on_gradients, on_rollback.
Cost:      in alignment steps a forward and backward over `batch` answers an update.
Known failure: within `evolve_steps` steps evolution can tip what `align_steps` steps have to repair, and SFT on pairs
           repairs slowly. Adam is shared by both kinds of step, so moments of the one push into the first of the other;
           it also divides the proximal gradient, which is small against a clipped policy gradient unless rho is large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_rl.defenses.base import Defense, Plan, Setting
from atp_rl.defenses.pairs import backward_sft, drawn, read_pairs
from atp_rl.model.policy import Policy
from atp_rl.types import Group, InputError


@dataclass
class Lisa(Defense):
    name = "lisa"
    needs_pairs = True
    align_steps: int = 10
    """Steps of alignment in a turn; it begins with them."""
    evolve_steps: int = 90
    """Steps of evolution in a turn."""
    rho: float = 0.1
    """Weight of the proximal term, >= 0."""
    batch: int = 32
    """Pairs an alignment step learns from, of all ranks together; all where there are fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("align_steps", "evolve_steps", "batch"):
            if getattr(self, field) < 1:
                raise InputError(f"defense lisa: `{field}` must be at least 1, got {getattr(self, field)}")
        if not self.rho >= 0:
            raise InputError(f"defense lisa: `rho` must be >= 0, got {self.rho}")
        self.switch: dict[str, Tensor] = {}
        """The weights at the last switch, by the names of `Policy.state`."""

    def suits(self, plan: Plan) -> None:
        self.refuse_imitation(plan)

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.pairs = read_pairs(setting, self.name)

    @property
    def aligning(self) -> bool:
        """Whether the current step is one of alignment."""
        return self._place < self.align_steps

    @property
    def _place(self) -> int:
        return (self.step - 1) % (self.align_steps + self.evolve_steps)

    def begin(self, step: int) -> None:
        super().begin(step)
        if self._place in (0, self.align_steps):
            self.switch = self.setting.policy.state()
        self.metrics["aligning"] = float(self.aligning)

    def on_advantages(self, groups: Sequence[Group], advantages: Tensor) -> Tensor:
        return torch.zeros_like(advantages) if self.aligning else advantages

    def backward(self, policy: Policy) -> None:
        if self.aligning:
            chosen = drawn(self.setting.seed, self.name, self.step, len(self.pairs), self.batch)
            self.metrics["loss"] = backward_sft(policy, [self.pairs[i] for i in chosen], weight=1.0)

    def on_gradients(self, policy: Policy) -> None:
        squares = 0.0
        for key, weight in policy.by_key().items():
            away = weight.detach() - self.switch[key].to(weight.device)
            weight.grad = self.rho * away if weight.grad is None else weight.grad + self.rho * away
            squares += float(away.square().sum())
        self.metrics["away"] = squares**0.5

    def on_rollback(self) -> None:
        self.switch = self.setting.policy.state()

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.switch)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.switch = dict(tensors)
