"""The alpha sweep: a checkpoint's update since alignment, scaled by alpha. A Pareto curve without any training.

dW_al + alpha (dW - dW_al) = (1 - alpha) dW_al + alpha dW is exact with the factors of both side by side, at twice the
rank; nothing is cut off. `alpha` 0 and 1 are the aligned adapter and the checkpoint themselves, to the last bit.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import Tensor

from atp_rl import ranks
from atp_rl.evolve.setup import deployed, evaluate_suites, load_policy, make_sampler, make_sync_probe, prepare
from atp_rl.model.low_rank import as_state, combination, factors
from atp_rl.model.policy import Policy, read_adapters
from atp_rl.pipeline import anchor_of, suites_of
from atp_rl.recipe import POPULATIONS, check_defenses, load
from atp_rl.tracking.compare import pool, rate_text
from atp_rl.tracking.progress import progress
from atp_rl.tracking.run import Run, check_manifest
from atp_rl.types import InputError


def sweep(path: Path, checkpoint: int, alphas: Sequence[float], overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure a checkpoint at several alphas; the results are also appended to the run's `sweep.jsonl`.

    Args:
        checkpoint: its step.
        overrides: of the run's recipe, e.g. `evaluate.per_family=24`.

    Returns:
        For each alpha a line as `evaluations.jsonl` has them, with `alpha` and `overrides`.

    Raises:
        InputError: no such checkpoint; a population; another engine than hf; an adapter that is more than LoRA.
    """
    ranks.join()
    run, recipe = Run.open(path), load([str(path / "recipe.yaml"), *overrides])
    if not alphas:
        raise InputError("--alphas: give at least one number, e.g. 0,0.5,1")
    if recipe.evolve is None:
        raise InputError(f"{path}: the run has no `evolve` section, so no checkpoint to measure")
    if recipe.evolve.learner in POPULATIONS:
        raise InputError(f"{path}: a sweep needs one adapter that learns, and the learner is {recipe.evolve.learner}")
    if recipe.sampler.engine != "hf":
        fix = "add --set sampler.engine=hf" + (" --set sampler.url=null" if recipe.sampler.url else "")
        raise InputError(f"{path}: a sweep plays in this process, and the engine is {recipe.sampler.engine}; {fix}")
    folders = {int(folder.name.removeprefix("step_")): folder for folder in run.checkpoint_folders()}
    if checkpoint not in folders:
        there = ", ".join(map(str, folders)) or "none"
        raise InputError(f"{path}: no checkpoint {checkpoint}; there are: {there}")
    if problem := check_manifest(folders[checkpoint]):
        raise InputError(f"{folders[checkpoint]}: broken checkpoint ({problem})")
    own = load([str(path / "recipe.yaml")])
    other_file = (recipe.scenarios.paper, recipe.scenarios.file) != (own.scenarios.paper, own.scenarios.file)
    suites, anchor = suites_of(recipe, trained_on=False if other_file else None), anchor_of(recipe, run)
    policy, defenses = load_policy(recipe, anchor, suites), deployed(check_defenses(recipe.defenses, recipe.evolve))
    prepare(recipe, suites, policy, anchor, defenses)
    aligned, evolved = policy.state(), read_adapters(folders[checkpoint])
    as_they_are = {0.0: aligned, 1.0: evolved}
    mixed = {alpha: at(alpha, aligned, evolved) for alpha in alphas if alpha not in as_they_are}
    records: dict[float, dict[str, Any]] = {}
    with progress(len(set(alphas)), "sweep") as report:
        for states in ({alpha: as_they_are[alpha] for alpha in alphas if alpha in as_they_are}, mixed):
            if states is mixed and mixed:
                policy = widened(policy)
            for alpha, state in states.items():
                policy.restore(state)
                sampler = make_sampler(recipe, policy)
                make_sync_probe(recipe, suites, policy).check(policy, sampler)
                record, _ = evaluate_suites(recipe, suites, policy, sampler, defenses, step=checkpoint)
                records[alpha] = record | {"alpha": alpha, "overrides": list(overrides)}
                report(len(records), f"alpha {alpha:g}")
    ordered = [records[alpha] for alpha in dict.fromkeys(alphas)]
    for record in ordered:
        run.log_sweep(record)
    return ordered


def at(alpha: float, aligned: Mapping[str, Tensor], evolved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter aligned + alpha (evolved - aligned), of twice their rank, as a `Policy.state`."""
    start, end = factors(aligned), factors(evolved)
    terms = {name: (start[name].to(update.up.device), update) for name, update in end.items()}
    return as_state({name: combination((1 - alpha, a), (alpha, b)) for name, (a, b) in terms.items()})


def widened(policy: Policy) -> Policy:
    """A policy on the same base whose live adapter has twice the rank at the same scaling; the old one is gone."""
    config, (name,) = copy.deepcopy(policy.lora), policy.live
    factor: Any = math.sqrt(2) if config.use_rslora else 2  # alpha is divided by sqrt(r), or by r
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {module: 2 * rank for module, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {module: factor * alpha for module, alpha in (config.alpha_pattern or {}).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an active adapter is deleted
        policy.model.delete_adapter(name)
    policy.model.add_adapter(name, config)
    return Policy(policy.model, policy.chat, policy.name)


def sweep_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """For a terminal: every split at every alpha."""
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=Text("Aligned + alpha x (checkpoint - aligned). Rates with their 95 % interval and n; KL in nats."),
    )
    for heading in ("alpha", "split", "violation", "invalid", "payoff", "KL"):
        shown.add_column(heading, justify="left" if heading == "split" else "right")
    for record in records:
        for name, split in record["splits"].items():
            rates = (rate_text(pool([split[key]])) for key in ("violation", "invalid"))
            kl = "–" if split["kl_to_aligned"] is None else f"{split['kl_to_aligned']:.3f}"
            cells = (f"{record['alpha']:g}", name.replace("_", "-"), *rates, f"{split['payoff_mean']:.3f}", kl)
            shown.add_row(*map(Text, cells))
    return shown
