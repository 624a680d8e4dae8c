"""Alignment by direct preference optimisation: compliant answers over violating ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atp_rl.align.trainer import Metrics, Training, fit


def train(pairs: Sequence[Mapping[str, Any]], training: Training) -> Metrics:
    """Train with TRL's DPOTrainer; the reference policy is the base model.

    A high learning rate alone teaches a small model to stop answering: read the invalid rate beside the violation rate,
    and add an SFT term (`loss_type: [sigmoid, sft]`) where it grows.

    Args:
        pairs: as `make_pairs` makes them.
        training: its options are those of `trl.DPOConfig`.

    Returns and raises as `trainer.fit` and `trainer.trl_config`.
    """
    config = training.config("dpo")
    from trl import DPOTrainer

    rows = [
        {key: pair[key] for key in ("prompt", "chosen", "rejected", "tools") if key in pair}
        | {"chat_template_kwargs": {"enable_thinking": training.thinking}}
        for pair in pairs
    ]
    return fit(DPOTrainer, rows, config, training)
