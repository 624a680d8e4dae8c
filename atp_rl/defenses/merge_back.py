"""Merge back: every few steps the update since alignment is scaled down.

Mechanism: dW <- dW_al + keep (dW - dW_al) in every module, on the LoRA product, never on its factors one by one. The
           sum of two rank-r products has rank 2r: it is cut to r (the best rank-r approximation, whose relative error
           is logged). `keep` 1 leaves weights as they are and 0 copies the aligned factors, both to the last bit.
           layers: uniform; lines: from `keep` in the first layer linearly up to 1 in the last; safemerge: only modules
           whose update has a cosine below `tau` to its projection on the columns of the aligned update.
Formula:   as above; where evolution starts from the bare base dW_al = 0.
Source:    interpolation of weights, WiSE-FT arXiv 2109.01903; LiNeS, arXiv 2410.17146; SafeMERGE, arXiv 2503.17239
           (which projects with V V^T / |V|, here exactly, and merges once after training).
Hook:      after_update.
Cost:      small decompositions of every module, every `every` steps.
Known failure: between two merges nothing holds, so a policy that tips within `every` steps is brought back part of the
           way only; it takes back what is useful along with what is not. Adam's moments stay those from before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from atp_rl.defenses.base import Defense, Setting
from atp_rl.model.low_rank import (
    Factors,
    as_state,
    column_space,
    combination,
    depths,
    factors,
    share_within,
    truncated,
)
from atp_rl.model.policy import Policy
from atp_rl.types import InputError

Layers = Literal["uniform", "lines", "safemerge"]


def merged(now: Factors, aligned: Factors, keep: float) -> tuple[Factors, float]:
    """aligned + keep (now - aligned) at the rank of `now`, and the relative error of that.

    The product of factors that are interpolated one by one is off by keep (1 - keep) dB dA, which is of second order:
    so near those are the factors that give the product exactly, and Adam's moments still mean something for them.
    """
    if keep in (0, 1):
        return (now if keep else aligned), 0.0
    between = Factors(*(torch.lerp(a, b, keep) for a, b in zip(aligned, now, strict=True)))
    return truncated(combination((1 - keep, aligned), (keep, now)), len(now.down), like=between)


@dataclass
class MergeBack(Defense):
    name = "merge_back"
    every: int = 50
    """Steps between two merges."""
    keep: float = 0.7
    """What stays of the update since alignment, in [0, 1]."""
    layers: Layers = "uniform"
    tau: float = 0.35
    """Of safemerge: the cosine below which a module is merged, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise InputError(f"defense merge_back: `every` must be at least 1, got {self.every}")
        for field in ("keep", "tau"):
            if not 0 <= getattr(self, field) <= 1:
                raise InputError(f"defense merge_back: `{field}` must be in [0, 1], got {getattr(self, field)}")
        if self.layers not in ("uniform", "lines", "safemerge"):
            raise InputError(f"defense merge_back: `layers` must be uniform, lines or safemerge, got {self.layers!r}")

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.aligned = factors(setting.aligned)
        self.spaces = {name: column_space(update) for name, update in self.aligned.items()}
        self.keeps = dict.fromkeys(self.aligned, self.keep)
        if self.layers == "lines":
            depth_of = zip(self.aligned, depths(list(self.aligned)), strict=True)
            self.keeps = {name: self.keep + (1 - self.keep) * depth for name, depth in depth_of}

    def after_update(self, policy: Policy) -> None:
        if self.step % self.every:
            return
        now, errors = factors(policy.state()), list[float]()
        for name, update in now.items():
            aligned = self.aligned[name].to(update.up.device)
            if self.layers == "safemerge":
                since = combination((1, update), (-1, aligned))
                if share_within(since, self.spaces[name].to(update.up.device)) >= self.tau:
                    continue
            now[name], error = merged(update, aligned, self.keeps[name])
            errors.append(error)
        policy.restore(as_state(now))
        self.metrics["merged"] = len(errors) / len(now)
        self.metrics["truncation_error_max"] = max(errors, default=0.0)
        self.metrics["truncation_error_mean"] = sum(errors) / max(1, len(errors))
