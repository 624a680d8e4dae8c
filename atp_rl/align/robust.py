"""robust_align: alignment by GRPO that leaves later training on the payoff less to work with.

Mechanism: reinforcement only finds what is sampled now and then. Both options make the aligned policy rarely sample
anything but compliance, or make compliance hold in a neighbourhood of the policy, before evolution begins.

- `entropy` c: the objective also has -c H, H being the mean entropy (nats) of the policy's next-token distributions in
  its replies to rule prompts, which all prompts of alignment are. GRPO alone stops to sharpen once a group of replies
  all comply; this does not. Source: entropy as reward, TokenBuncher (arXiv 2508.20697). There -H is a reward of the
  drawn replies; but where a reply is one decision, all its options are drawn from one distribution, so they share one
  H, and as a reward it moved nothing here. So the other part of the same objective's gradient is taken, through H
  itself: TRL's entropy bonus with the weight -c. Its second part, a noise on the other logits, is left out.
- `frpo_lambda` l: instead of the mean reward the objective is the worst one in a KL ball around the policy, in its dual
  form -l log E[exp(-A / l)] over a group's advantages A. Its gradient is that of GRPO with the advantage of sample i
  replaced by l (1 - G w_i), where w = exp(-A / l) / sum exp(-A / l): bad samples are pushed away exponentially harder
  than good ones are drawn near. The logarithm's bias at small groups G is taken off by the jackknife. l -> infinity is
  GRPO, times G / (G - 1). Source: FRPO (arXiv 2602.08813), with its baseline and jackknife.

Hook: before evolution, in `align.method: grpo`; both work together. Cost: none.
Measured on the tiny model (recipes/tiny/role_play.yaml and grpo.yaml, align.per_family=8, 25 steps): over the last five
steps the entropy was .0102 without, .0089 with c = .1 and .0036 with c = 1, and the compliance reward .969, .969, .955.

Known failure: the invalid rate is not protected: low entropy may be that of a wrong decision or format, so c must not
outweigh the compliance reward before most replies comply. A policy without entropy cannot learn the payoff within the
rule either; and one violation sampled in evolution is paid as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer


def frpo_advantages(advantages: Tensor, lam: float) -> Tensor:
    """Advantages [N, G] whose policy gradient is that of FRPO's objective (see above), jackknifed; each row sums to 0.

    With S the sum of e = exp(-A / lam) over the group, and S_k without sample k:
    lam (1 - G (G e_i / S - (G - 1) / G sum_{k != i} e_i / S_k)).
    """
    group = advantages.shape[1]
    # a constant factor of e cancels; this one keeps the largest at 1
    e = torch.exp((advantages.min(1, keepdim=True).values - advantages) / lam)
    others = e.sum(1, keepdim=True) - torch.diag_embed(e).sum(1)  # S_k [N, G]
    others = others.clamp(min=torch.finfo(e.dtype).tiny)
    left_out = e * ((1 / others).sum(1, keepdim=True) - 1 / others)
    weights = group * e / e.sum(1, keepdim=True) - (group - 1) / group * left_out
    return lam * (1 - group * weights)


class FRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer on the advantages of `frpo_advantages`."""

    def __init__(self, *args: Any, frpo_lambda: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frpo_lambda = frpo_lambda

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        everywhere: Any = self.accelerator.gather(output["advantages"])  # a group may lie on several processes
        group = self.num_generations  # nothing is evaluated here
        robust = frpo_advantages(everywhere.view(-1, group), self.frpo_lambda).flatten()
        own = len(output["advantages"])
        output["advantages"] = robust[self.accelerator.process_index * own :][:own]
        return output
