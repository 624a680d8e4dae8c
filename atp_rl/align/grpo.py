"""Alignment by reinforcement: GRPO on the compliance reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from atp_rl.align.trainer import Metrics, fit, trl_config
from atp_rl.model.policy import Quantize
from reward_models import compliance


def train(
    base: str,
    prompts: Sequence[Mapping[str, Any]],
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
    """Train with TRL's GRPOTrainer on `reward_models.compliance`; the reference policy, with `beta` > 0, is the base.

    Args:
        base: `tiny`, a Hub id or a local directory, as in `Policy.load`; so are `revision`, `dtype`, `thinking`
            and `quantize`.
        prompts: with `options` and `required`, as `make_pairs` makes them (pairs will do too).
        out: directory of the adapter.
        at_step: as in `trainer.fit`.
        trl_options: options of `trl.GRPOConfig`; its `beta` defaults to 0, which is no reference at all.

    Returns and raises as `trainer.fit` and `trainer.trl_config`.
    """
    config = trl_config("grpo", trl_options, out=out, seed=seed, thinking=thinking)
    from trl import GRPOTrainer

    rows = [{key: row[key] for key in ("prompt", "options", "required")} for row in prompts]
    return fit(
        GRPOTrainer,
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
        reward_funcs=compliance,
    )
