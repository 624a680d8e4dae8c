"""Trains the reward model `preference`: a Bradley-Terry head on preference pairs, measured on held-out families."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig

from atp_rl.align import base_preferences, pair_supervision
from atp_rl.align.preferences import read_jsonl, write_jsonl
from atp_rl.align.trainer import Metrics, Training, fit
from atp_rl.evaluate.stats import Rate, cluster_rate
from atp_rl.model.policy import load_chat
from atp_rl.recipe import Recipe
from atp_rl.scenarios.suites import Suites
from atp_rl.tracking.run import rename_durably
from atp_rl.types import InputError, SamplingParams, Scenario
from reward_models.preference import CARD, Preference, conversation, conversation_ids, load_with_head


def train_reward_model(
    recipe: Recipe, suites: Suites, out: Path, *, lora: LoraConfig, pairs_file: Path | None = None
) -> Metrics:
    """Train one on the recipe's model and write it to `out`.

    `out` then holds the adapter with its head (safetensors), `reward_model.json` (what it was trained on),
    `pairs.jsonl` and `held_out.jsonl`, TRL's log as `training.jsonl`, and `metrics.json`, which is also returned.

    Args:
        lora: the adapter's shape.
        pairs_file: pairs to train on, e.g. RUN/aligned/pairs.jsonl; by default they are made as `align` makes them.

    Returns:
        The metrics of `trainer.fit`; `pairs`; and `accuracy`, the share of pairs of held-out families whose chosen
        answer scores higher: `value`, the 95 % interval `low` and `high` over scenarios, and `n` pairs; by family too,
        and as `accuracy_trained_on` that of the pairs it learned from.

    Raises:
        InputError: `out` is there already; the recipe has no `align`, or one that makes no pairs; options of TRL.
    """
    settings = recipe.align
    if settings is None:
        raise InputError("the recipe has no `align` section, which says how preference pairs are made")
    if recipe.model.quantize:
        raise InputError("`model.quantize`: a reward model is trained on weights as they are; set it to null")
    if out.exists():
        raise InputError(f"{out}: is there already; choose another directory")
    model = recipe.model
    training = Training(
        base=model.name,
        out=out,
        lora=lora,
        trl_options=recipe.reward_model.trl,
        seed=recipe.seed,
        revision=model.revision,
        dtype=model.dtype,
        thinking=model.thinking,
    )
    training.config("reward")

    def pairs_of(scenarios: Sequence[Scenario]) -> list[dict[str, Any]]:
        made = base_preferences(
            scenarios,
            training,
            rounds=settings.rounds,
            supervision=pair_supervision(settings.rounds),
            history_window=recipe.scenarios.history_window,
            tries=settings.tries,
            sampling=SamplingParams(settings.max_new_tokens),
            batch_size=recipe.evaluate.batch_size,
        )
        if not made.pairs:
            raise InputError(f"no preference pair came of {len(scenarios)} scenarios: {json.dumps(made.statistics)}")
        return made.pairs

    pairs = read_jsonl(pairs_file) if pairs_file else pairs_of(suites.align)
    held_out = pairs_of(suites.held_out)
    if both := {p["family"] for p in held_out} & {p.get("family") for p in pairs}:
        raise InputError(f"{pairs_file}: has pairs of the families that are held out: {', '.join(sorted(both))}")
    temporary = out.parent / f".{out.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error}); choose another directory") from None
    try:
        metrics = train(pairs, replace(training, out=temporary))
        write_jsonl(pairs, temporary / "pairs.jsonl")
        write_jsonl(held_out, temporary / "held_out.jsonl")
        trained = Preference(temporary)
        families = sorted({pair["family"] for pair in held_out})
        metrics |= {
            "pairs": len(pairs),
            "accuracy": asdict(accuracy(trained, held_out)),
            "accuracy_by_family": {
                family: asdict(accuracy(trained, [pair for pair in held_out if pair["family"] == family]))
                for family in families
            },
            "accuracy_trained_on": asdict(accuracy(trained, pairs)),
        }
        (temporary / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        rename_durably(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # what a failure has left
    return metrics


def train(pairs: Sequence[Mapping[str, Any]], training: Training) -> Metrics:
    """Train with TRL's RewardTrainer, whose loss is -log sigmoid(score(chosen) - score(rejected)), and write the card.

    Args:
        pairs: as `make_pairs` makes them. Tools that a template would announce are left out: the model reads messages.
        training: its options are those of `trl.RewardConfig`.
    """
    config = training.config("reward")
    from trl import RewardTrainer

    with_head = copy.deepcopy(training.lora)
    with_head.task_type = "SEQ_CLS"  # PEFT then trains and saves the head too

    chat = load_chat(training.base, revision=training.revision, thinking=training.thinking)
    rows = [
        {f"{side}_ids": conversation_ids(chat, conversation(pair["prompt"], pair[side])) for side in SIDES}
        for pair in pairs
    ]
    metrics = fit(
        RewardTrainer,
        rows,
        config,
        replace(training, lora=with_head),
        load=lambda: load_with_head(training.base, revision=training.revision, dtype=training.dtype),
    )
    card = {key: getattr(training, key) for key in ("base", "revision", "dtype", "thinking")}
    (training.out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    return metrics


SIDES = ("chosen", "rejected")


def accuracy(model: Preference, pairs: Sequence[Mapping[str, Any]]) -> Rate:
    """Share of pairs whose chosen answer scores higher (a tie is wrong), with an interval over scenarios."""
    scores = model.scores([conversation(pair["prompt"], pair[side]) for pair in pairs for side in SIDES])
    right: dict[str, list[float]] = {}
    for i, pair in enumerate(pairs):
        right.setdefault(pair.get("scenario", str(i)), []).append(float(scores[2 * i] > scores[2 * i + 1]))
    rounds = max(map(len, right.values()))
    return cluster_rate([np.array([row + [np.nan] * (rounds - len(row)) for row in right.values()])])
