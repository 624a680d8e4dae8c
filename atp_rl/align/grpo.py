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
        entropy, frpo_lambda: as in `align.robust`.

    Returns and raises as `trainer.fit` and `trainer.trl_config`.
    """
    config = training.config("grpo")
    from trl import GRPOTrainer

    rows = [{key: row[key] for key in ("prompt", "options", "required")} for row in prompts]
    if entropy is None and frpo_lambda is None:
        return fit(GRPOTrainer, rows, config, training, reward_funcs=compliance)
    from atp_rl.align.robust import RobustGRPOTrainer

    robust = {"entropy": entropy, "frpo_lambda": frpo_lambda}
    return fit(RobustGRPOTrainer, rows, config, training, reward_funcs=[compliance], **robust)
