"""Alignment before evolution: preference pairs from scenarios, then one of TRL's trainers from the bare base model."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig

from atp_rl import ranks
from atp_rl.align import dpo, grpo, sft
from atp_rl.align.preferences import Preferences, make_pairs, write_jsonl
from atp_rl.align.trainer import Metrics, Training
from atp_rl.model.policy import Policy, Quantize, load_chat
from atp_rl.model.sampler import HFSampler
from atp_rl.scenarios import Supervision
from atp_rl.types import SamplingParams, Scenario

Method = Literal["sft", "dpo", "grpo"]


def run_alignment(
    method: Method,
    scenarios: Sequence[Scenario],
    *,
    base: str,
    out: Path,
    lora: LoraConfig,
    trl_options: Mapping[str, Any],
    seed: int,
    rounds: int,
    supervision: Supervision,
    history_window: int,
    tries: int,
    sampling: SamplingParams,
    batch_size: int = 256,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    thinking: bool = False,
    quantize: Quantize | None = None,
    robust: Mapping[str, float | None] | None = None,
    at_step: Callable[[], None] = lambda: None,
) -> Metrics:
    """Make pairs with the base model, train an adapter on them, and write both to `out`.

    `out` then holds `adapter_model.safetensors` and `adapter_config.json`, `pairs.jsonl`, `statistics.json` (what was
    asked and what was dropped, see `Preferences`) and `training.jsonl` (TRL's log). GRPO trains on the prompts of all
    conversations, with or without a pair; SFT and DPO on the pairs.

    Args:
        scenarios: those of the training split.
        base, revision, dtype, thinking, quantize: the model, as in `Policy.load`.
        trl_options: options of TRL's config for this method.
        rounds, supervision, history_window, tries, sampling: as in `make_pairs`.
        batch_size: conversations that are sampled at once (memory only, never the result).
        robust: further arguments of `grpo.train`.
        at_step: called between the steps of both parts; what it raises ends the alignment.

    Returns:
        `pairs`, `prompts`, `dropped` (prompts without a pair) and the metrics of `trainer.fit`.

    Raises:
        InputError: a bad option of TRL or a template that it cannot use (before anything is sampled), no pair at all,
            or a training that led nowhere.
    """
    training = Training(base, out, lora, trl_options, seed, revision, dtype, thinking, quantize, at_step)
    training.config(method)
    load_chat(base, revision=revision, thinking=thinking).check_rendering(rounds, replies=method != "grpo")
    say = print if ranks.is_first() else lambda *_, **__: None
    say(f"asking {base} for a compliant and a violating answer to {len(scenarios)} scenarios", flush=True)
    preferences = base_preferences(
        scenarios,
        training,
        rounds=rounds,
        supervision=supervision,
        history_window=history_window,
        tries=tries,
        sampling=sampling,
        batch_size=batch_size,
    )
    if ranks.is_first():
        out.mkdir(parents=True, exist_ok=True)
        write_jsonl(preferences.pairs, out / "pairs.jsonl")
        (out / "statistics.json").write_text(json.dumps(preferences.statistics, indent=2) + "\n")
    say(f"{len(preferences.pairs)} pairs of {len(preferences.prompts)} prompts", flush=True)
    if method == "grpo":
        metrics = grpo.train(preferences.prompts, training, **robust or {})
    else:
        metrics = {"sft": sft.train, "dpo": dpo.train}[method](preferences.pairs, training)
    _free()  # evolution loads the base again
    asked, paired = len(preferences.prompts), len(preferences.pairs)
    return {"pairs": paired, "prompts": asked, "dropped": asked - paired, **metrics}


def base_preferences(
    scenarios: Sequence[Scenario],
    training: Training,
    *,
    rounds: int,
    supervision: Supervision,
    history_window: int,
    tries: int,
    sampling: SamplingParams,
    batch_size: int,
) -> Preferences:
    """What the base of a training to come answers when it is told either side; the arguments are `make_pairs`'s."""
    policy = Policy.load(
        training.base,
        lora=training.lora,
        seed=training.seed,
        revision=training.revision,
        dtype=training.dtype,
        thinking=training.thinking,
        quantize=training.quantize,
    )
    preferences = make_pairs(
        scenarios,
        HFSampler(policy, batch_size=batch_size),  # a fresh adapter changes nothing: this is the base
        rounds=rounds,
        supervision=supervision,
        history_window=history_window,
        tries=tries,
        seed=training.seed,
        sampling=sampling,
        at_step=training.at_step,
    )
    del policy
    _free()  # the trainer loads its own copy of the base
    return preferences


def pair_supervision(rounds: int) -> Supervision:
    """What conversations of so many rounds are told of supervision while pairs are made."""
    return "all_unsupervised" if rounds == 1 else "random"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


__all__ = ["Method", "Preferences", "base_preferences", "make_pairs", "pair_supervision", "run_alignment"]
