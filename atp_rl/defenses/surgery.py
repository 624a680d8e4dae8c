"""Surgery: what of the policy gradient works against alignment is cut out of it.

Mechanism: an alignment gradient is taken on `prompts` preference pairs; where the step would go against it, the step's
           component along it is removed. Without a conflict the gradient stays what it was, to the last bit.
Formula:   g_a = grad of the mean of -log pi(chosen). If <g, g_a> < 0: g <- g - <g, g_a> / |g_a|^2 g_a. The steps -g and
           -g_a then have an inner product >= 0. In a population, for each adapter by itself.
Source:    PCGrad, arXiv 2001.06782; for safety SafeGrad, arXiv 2508.07172.
Hook:      on_gradients: after the gradients of all losses are summed, before clipping and before Adam.
Cost:      a forward and backward over `prompts` answers an update, every `refresh` steps.
Known failure: first order, and before Adam, which divides by the size of past gradients: the step that is taken may
           still go against g_a. It never restores anything: what erodes outside of g_a's direction stays eroded. As
           pi(chosen) nears 1 on the pairs g_a is small and noisy, while its direction still decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from atp_rl import ranks
from atp_rl.defenses.base import Defense, Setting
from atp_rl.defenses.pairs import apart, backward_sft, drawn, read_pairs
from atp_rl.model.policy import Policy
from atp_rl.types import InputError


def cut(gradients: Sequence[Tensor], alignment: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """The gradients without their component against `alignment`, and the cosine of the two before."""
    inner = sum(float((g.double() * a.double()).sum()) for g, a in zip(gradients, alignment, strict=True))
    sizes = [sum(float(t.double().square().sum()) for t in tensors) for tensors in (gradients, alignment)]
    if not all(sizes):
        return list(gradients), 0.0
    cosine = inner / (sizes[0] * sizes[1]) ** 0.5
    if inner >= 0:
        return list(gradients), cosine
    return [
        (g.double() - inner / sizes[1] * a.double()).to(g.dtype) for g, a in zip(gradients, alignment, strict=True)
    ], cosine


@dataclass
class Surgery(Defense):
    name = "surgery"
    needs_pairs = True
    prompts: int = 32
    """Pairs that the alignment gradient is taken on, of all ranks together; all where there are fewer."""
    refresh: int = 1
    """Steps for which an alignment gradient is used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("prompts", "refresh"):
            if getattr(self, field) < 1:
                raise InputError(f"defense surgery: `{field}` must be at least 1, got {getattr(self, field)}")
        self.alignment: dict[str, Tensor] = {}
        """The alignment gradient, by the names of `Policy.state`."""

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.pairs = read_pairs(setting, self.name)

    def on_gradients(self, policy: Policy) -> None:
        weights = policy.by_key()
        if (self.step - 1) % self.refresh == 0:
            chosen = drawn(self.setting.seed, self.name, self.step, len(self.pairs), self.prompts)
            with apart(policy):
                self.metrics["loss"] = backward_sft(policy, [self.pairs[i] for i in chosen], weight=1.0)
                ranks.sum_gradients(policy.trainable)
                self.alignment = {key: p.grad for key, p in weights.items() if p.grad is not None}
        cosines = []
        for adapter in policy.live:
            own = {id(parameter) for parameter in policy.parameters_of(adapter)}
            keys = [k for k, p in weights.items() if id(p) in own and p.grad is not None and k in self.alignment]
            found = [weights[key].grad for key in keys]
            gradients = [gradient for gradient in found if gradient is not None]
            against = [self.alignment[key].to(g.device) for key, g in zip(keys, gradients, strict=True)]
            changed, cosine = cut(gradients, against)
            for gradient, new in zip(gradients, changed, strict=True):
                gradient.copy_(new)
            cosines.append(cosine)
        self.metrics["cosine"] = sum(cosines) / len(cosines)
        self.metrics["removed"] = sum(max(0.0, -cosine) for cosine in cosines) / len(cosines)  # of the gradient's norm

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.alignment) if self.refresh > 1 else {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.alignment = dict(tensors)
