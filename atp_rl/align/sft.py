"""Alignment by imitation: supervised fine-tuning on the compliant answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atp_rl.align.trainer import Metrics, Training, fit


def train(pairs: Sequence[Mapping[str, Any]], training: Training) -> Metrics:
    """Train with TRL's SFTTrainer on `prompt` and `chosen` of every pair; the loss is that of the answer alone.

    Args:
        pairs: as `make_pairs` makes them.
        training: its options are those of `trl.SFTConfig`.

    Returns and raises as `trainer.fit` and `trainer.trl_config`.
    """
    config = training.config("sft")
    from trl import SFTTrainer

    rows = [
        {
            "prompt": pair["prompt"],
            "completion": pair["chosen"],
            "chat_template_kwargs": {"enable_thinking": training.thinking},
            **({"tools": pair["tools"]} if "tools" in pair else {}),
        }
        for pair in pairs
    ]
    return fit(SFTTrainer, rows, config, training)
