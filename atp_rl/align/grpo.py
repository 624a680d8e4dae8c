"""Alignment by reinforcement: GRPO on the compliance reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atp_rl.align.trainer import Metrics, Training, fit
from reward_models import compliance


def train(
    prompts: Sequence[Mapping[str, Any]],
    training: Training,
    *,
    entropy: float | None = None,
    frpo_lambda: float | None = None,
) -> Metrics:
    """Train with TRL's GRPOTrainer on `reward_models.compliance`; the reference policy, with `beta` > 0, is the base.

    Args:
        prompts: with `options` and `required`, as `make_pairs` makes them (pairs will do too).
        training: its options are those of `trl.GRPOConfig`; its `beta` defaults to 0, which is no reference at all.
        entropy, frpo_lambda: see `align/robust.py`.

    Returns and raises as `trainer.fit` and `trainer.trl_config`.
    """
    config = training.config("grpo")
    if entropy is not None:
        config.entropy_coef = -entropy  # TRL subtracts the weighted entropy from the loss
    from trl import GRPOTrainer

    rows = [{key: row[key] for key in ("prompt", "options", "required")} for row in prompts]
    if frpo_lambda is None:
        return fit(GRPOTrainer, rows, config, training, reward_funcs=compliance)
    from atp_rl.align.robust import FRPOTrainer

    return fit(FRPOTrainer, rows, config, training, reward_funcs=compliance, frpo_lambda=frpo_lambda)
