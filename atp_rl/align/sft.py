"""Alignment by imitation: supervised fine-tuning on the compliant answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from atp_rl.align.trainer import Metrics, fit, trl_config
from atp_rl.model.policy import Quantize


def train(
    base: str,
    pairs: Sequence[Mapping[str, Any]],
    *,
    out: Path,
    lora: LoraConfig,
    trl_options: Mapping[str, Any],
    seed: int,
    revision: str | None = None,
    dtype: str = "float32",
    thinking: bool = False,
    quantize: Quantize | None = None,
    at_step: Callable[[], None] = lambda: None,
) -> Metrics:
    """Train with TRL's SFTTrainer on `prompt` and `chosen` of every pair; the loss is that of the answer alone.

    Args:
        base: `tiny`, a Hub id or a local directory, as in `Policy.load`; so are `revision`, `dtype`, `thinking`
            and `quantize`.
        pairs: as `make_pairs` makes them.
        out: directory of the adapter.
        at_step: as in `trainer.fit`.
        trl_options: options of `trl.SFTConfig`.

    Returns and raises as `trainer.fit` and `trainer.trl_config`.
    """
    config = trl_config("sft", trl_options, out=out, seed=seed, thinking=thinking)
    from trl import SFTTrainer

    rows = [
        {
            "prompt": pair["prompt"],
            "completion": pair["chosen"],
            "chat_template_kwargs": {"enable_thinking": thinking},
            **({"tools": pair["tools"]} if "tools" in pair else {}),
        }
        for pair in pairs
    ]
    return fit(
        SFTTrainer,
        base,
        rows,
        config,
        out=out,
        lora=lora,
        revision=revision,
        dtype=dtype,
        thinking=thinking,
        quantize=quantize,
        at_step=at_step,
    )
