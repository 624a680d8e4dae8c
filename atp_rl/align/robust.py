"""robust_align: alignment by GRPO that leaves later training on the payoff less to work with.

Mechanism: reinforcement only finds what is sampled now and then. Both options make the aligned policy rarely sample
anything but compliance, or make compliance hold in a neighbourhood of the policy, before evolution begins.

- `entropy` c: every reply to a prompt with a rule also gets the reward -c H, H being the mean entropy (nats) of the
  policy's next-token distribution over the reply's tokens. Source: entropy as reward, TokenBuncher (arXiv 2508.20697);
  its second part, a noise on the other logits, is left out.
- `frpo_lambda` l: instead of the mean reward the objective is the worst one in a KL ball around the policy, in its dual
  form -l log E[exp(-A / l)] over a group's advantages A. Its gradient is that of GRPO with the advantage of sample i
  replaced by l (1 - G w_i), where w = exp(-A / l) / sum exp(-A / l): bad samples are pushed away exponentially harder
  than good ones are drawn near. The logarithm's bias at small groups G is taken off by the jackknife. l -> infinity is
  GRPO, times G / (G - 1). Source: FRPO (arXiv 2602.08813), with its baseline and jackknife.

Hook: before evolution, in `align.method: grpo`; both together work: the entropy reward comes first.
Cost: entropy one forward over each batch of replies; FRPO none.
Known failure: the invalid rate is not protected, so low entropy may be that of a wrong format. Where all replies of a
group comply, `scale_rewards: group` blows any difference in entropy up to full advantages, whatever c is. A policy of
no entropy cannot learn the payoff within the rule either; and one violation sampled in evolution is paid as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import pad


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


class RobustGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with `entropy`, `frpo_lambda`, or both (see above)."""

    def __init__(
        self, *args: Any, reward_funcs: list[Any], entropy: float | None, frpo_lambda: float | None, **kwargs: Any
    ) -> None:
        self.entropy_weight, self.frpo_lambda = entropy, frpo_lambda
        further = [] if entropy is None else [self.low_entropy]
        super().__init__(*args, reward_funcs=[*reward_funcs, *further], **kwargs)

    def low_entropy(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        required: Sequence[str | None],
        **_: Any,
    ) -> list[float | None]:
        """A reward function of TRL: minus the weighted mean entropy of each reply; None where there is no rule."""
        assert self.entropy_weight is not None
        prompt_ids, _, _ = self._tokenize_prompts(list(prompts))
        device = self.accelerator.device

        def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
            ids = [torch.tensor(row, device=device) for row in rows]
            return (
                pad(ids, padding_value=self.processing_class.pad_token_id, padding_side=side),
                pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side=side),
            )

        (read, read_mask), (written, mask) = padded(prompt_ids, "left"), padded(completion_ids, "right")
        with torch.no_grad():
            _, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([read, written], dim=1),
                torch.cat([read_mask, mask], dim=1),
                written.shape[1],
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=True,
            )
        assert entropies is not None
        mean = (entropies * mask).sum(1) / mask.sum(1).clamp(min=1)
        return [
            None if rule is None else -self.entropy_weight * value
            for rule, value in zip(required, mean.tolist(), strict=True)
        ]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.frpo_lambda is not None:
            group = self.num_generations if self.model.training else self.num_generations_eval
            everywhere = self.accelerator.gather(output["advantages"])  # a group may lie on several processes
            robust = frpo_advantages(everywhere.view(-1, group), self.frpo_lambda).flatten()
            own = len(output["advantages"])
            output["advantages"] = robust[self.accelerator.process_index * own :][:own]
        return output
