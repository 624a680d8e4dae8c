"""Replay: a step also learns from preference pairs of alignment.

Mechanism: every update adds the gradient of an alignment loss on `batch` pairs; which ones is drawn anew each step.
Formula:   weight x mean of -log sigmoid(b [(log pi - log pi_al)(chosen) - (log pi - log pi_al)(rejected)]), DPO
           (arXiv 2305.18290) with the aligned adapter as reference; or weight x mean of -log pi(chosen), sums over a
           reply's tokens.
Source:    replay of safety data in fine-tuning, e.g. arXiv 2309.07875; in-training defenses, arXiv 2605.31328.
           `log_ratio` takes the pairs whose chosen answer lost most: the largest log pi_al - log pi of a pool.
Hook:      backward. Gradients are clipped together with those of the episodes.
Cost:      forward and backward over 2 x `batch` answers an update (1 x with sft); once, one forward over all pairs;
           with `log_ratio` one more over the pool each step.
Known failure: it holds what the pairs show. SFT pulls with a force that fades as pi(chosen) nears 1 and so only delays;
           DPO has a tipping point of its own near p = weight x b x sqrt(G) / (2 (G - 1)), above which it does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from atp_rl import ranks
from atp_rl.defenses.base import Defense, Setting
from atp_rl.defenses.pairs import PAIRS_AT_ONCE, Pair, answer_logprobs, backward_sft, drawn, parts, read_pairs
from atp_rl.model.policy import ALIGNED, Policy
from atp_rl.scenarios import random_stream
from atp_rl.types import InputError

ReplayLoss = Literal["dpo", "sft"]
Selection = Literal["random", "log_ratio"]


def margins(logprobs: Tensor, reference: Tensor) -> Tensor:
    """By how much more than the reference each pair's chosen answer is preferred, [n] in nats, from [n, 2] each."""
    gained = logprobs - reference
    return gained[:, 0] - gained[:, 1]


def dpo_loss(margins: Tensor, beta: float) -> Tensor:
    """Loss [n] of pairs."""
    return -logsigmoid(beta * margins)


@dataclass
class Replay(Defense):
    name = "replay"
    needs_pairs = True
    weight: float = 0.2
    """Of the loss, > 0."""
    loss: ReplayLoss = "dpo"
    beta: float = 0.5
    """Of DPO, > 0: how strongly it is held to the reference."""
    batch: int = 32
    """Pairs an update, of all ranks together; all pairs where there are fewer."""
    selection: Selection = "random"
    pool: int = 128
    """Pairs that `log_ratio` chooses from each step, at least `batch`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("weight", "beta", "batch"):
            if not getattr(self, field) > 0:
                raise InputError(f"defense {self.name}: `{field}` must be > 0, got {getattr(self, field)}")
        for field, known in (("loss", ("dpo", "sft")), ("selection", ("random", "log_ratio"))):
            if getattr(self, field) not in known:
                raise InputError(
                    f"defense {self.name}: `{field}` must be {' or '.join(known)}, got {getattr(self, field)!r}"
                )
        if self.selection == "log_ratio" and self.pool < self.batch:
            raise InputError(f"defense {self.name}: `pool` must be at least `batch` ({self.batch}), got {self.pool}")
        self.reference: Tensor | None = None
        """[pairs, 2] log-probability of the chosen and the rejected answers under the aligned adapter."""

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.pairs = self.labelled(read_pairs(setting, self.name))

    def labelled(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs as they are learned from."""
        return pairs

    def backward(self, policy: Policy) -> None:
        if self.reference is None and (self.loss == "dpo" or self.selection == "log_ratio"):
            self.reference = self._reference(policy)
        size = self.batch if self.selection == "random" else self.pool
        found = drawn(self.setting.seed, "replay", self.step, len(self.pairs), size)
        if self.selection == "log_ratio":
            found = self._most_forgotten(policy, found)
        if self.loss == "sft":
            self.metrics["loss"] = backward_sft(policy, [self.pairs[i] for i in found], weight=self.weight)
            return
        assert self.reference is not None
        sums = [0.0, 0.0]
        for player in policy.live:
            for part, real in parts(found):
                answers = [side for i in part for side in self.pairs[i]]
                logprobs = answer_logprobs(policy, answers, player).view(-1, 2)
                margin = margins(logprobs, self.reference[part].to(logprobs.device))
                share = real.to(margin.device) / len(found)
                loss = (dpo_loss(margin, self.beta) * share).sum()
                (self.weight * loss).backward()
                sums = [sums[0] + loss.item(), sums[1] + float((margin.detach() * share).sum())]
        self.metrics["loss"], self.metrics["margin"] = (s / len(policy.live) for s in ranks.total(sums))

    def _reference(self, policy: Policy) -> Tensor:
        def ask(pairs: Sequence[Pair]) -> list[list[float]]:
            answers = [a for pair in pairs for a in pair]
            return answer_logprobs(policy, answers, ALIGNED).view(-1, 2).tolist()

        return torch.tensor(ranks.in_batches(ask, self.pairs, PAIRS_AT_ONCE))

    def _most_forgotten(self, policy: Policy, pool: Sequence[int]) -> list[int]:
        """The `batch` pairs of the pool with the largest log-ratio aligned to now of the chosen answer."""
        assert self.reference is not None

        def ask(indices: Sequence[int]) -> list[float]:
            with torch.no_grad():
                of_players = [
                    answer_logprobs(policy, [self.pairs[i].chosen for i in indices], player) for player in policy.live
                ]
            return torch.stack(of_players).mean(0).tolist()

        now = torch.tensor(ranks.in_batches(ask, pool, PAIRS_AT_ONCE))
        ratios = self.reference[list(pool), 0] - now
        most = ratios.argsort(descending=True, stable=True)[: self.batch]
        self.metrics["log_ratio"] = ratios[most].mean().item()
        return [pool[i] for i in most.tolist()]

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.reference is None else {"reference": self.reference}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.reference = tensors.get("reference")


@dataclass
class ShuffledReplay(Replay):
    """Control: chosen and rejected are swapped by a fair coin for each pair, once for the whole run.

    The same tokens and the same cost without the information which answer complies: what replay does beyond this is
    due to what the pairs say, not to further gradients or to the pull towards the reference.
    """

    name = "shuffled_replay"

    def labelled(self, pairs: list[Pair]) -> list[Pair]:
        coins = random_stream(self.setting.seed, "replay", "labels").random(len(pairs)) < 0.5
        return [Pair(pair.rejected, pair.chosen) if coin else pair for pair, coin in zip(pairs, coins, strict=True)]
