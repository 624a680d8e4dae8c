"""Alignment by direct preference optimisation: compliant answers over violating ones."""

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
    """Train with TRL's DPOTrainer; the reference policy is the base model.

    A high learning rate alone teaches a small model to stop answering: read the invalid rate beside the violation rate,
    and add an SFT term (`loss_type: [sigmoid, sft]`) where it grows.

    Args:
        base: `tiny`, a Hub id or a local directory, as in `Policy.load`; so are `revision`, `dtype`, `thinking`
            and `quantize`.
        pairs: as `make_pairs` makes them.
        out: directory of the adapter.
        at_step: as in `trainer.fit`.
        trl_options: options of `trl.DPOConfig`.

    Returns and raises as `trainer.fit` and `trainer.trl_config`.
    """
    config = trl_config("dpo", trl_options, out=out, seed=seed, thinking=thinking)
    from trl import DPOTrainer

    rows = [
        {key: pair[key] for key in ("prompt", "chosen", "rejected", "tools") if key in pair}
        | {"chat_template_kwargs": {"enable_thinking": thinking}}
        for pair in pairs
    ]
    return fit(
        DPOTrainer,
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
