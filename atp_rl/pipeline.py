"""The stages of a recipe, in order: align, evolve, summarise."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import reward_models
from atp_rl import ranks
from atp_rl.align import pair_supervision, run_alignment
from atp_rl.align.conversation import best_paid_option
from atp_rl.align.reward_model import train_reward_model
from atp_rl.align.trainer import trl_config
from atp_rl.defenses import Defense
from atp_rl.evolve.in_context_api import evolve_by_api
from atp_rl.evolve.loop import evolve
from atp_rl.evolve.setup import (
    check_service,
    defended,
    evaluate_suites,
    evaluation_play,
    learning_seats,
    load_policy,
    lora_config,
    make_sampler,
    make_sync_probe,
    prepare,
    settings_of,
    training_play,
)
from atp_rl.model.policy import base_path, check_adapter, check_model, read_adapters
from atp_rl.predict import in_a_line, warn
from atp_rl.recipe import POPULATIONS, Recipe, RewardOptions, check_defenses, dump, load
from atp_rl.scenarios import make_env
from atp_rl.scenarios.sandbox import Sandbox
from atp_rl.scenarios.suites import Suites, make_suites
from atp_rl.tracking.progress import progress
from atp_rl.tracking.run import Interrupted, Run, check_manifest, rename_durably, stop_at_step_border
from atp_rl.tracking.summary import summarise
from atp_rl.tracking.wandb_mirror import WandbMirror, resolve_mode
from atp_rl.types import InputError, SamplingParams


def check(recipe: Recipe) -> Suites:
    """Find everything that can be wrong with a recipe before anything expensive starts or is written.

    Raises:
        InputError: scenario files, defenses, W&B mode, TRL options, reward models, adapters, model directory.
    """
    if recipe.align is None and recipe.evolve is None:
        raise InputError("nothing to run: no `align` and no `evolve`; is this an overlay? lay it over another recipe")
    suites = suites_of(recipe)
    _check_testbed(recipe, suites)
    defenses = check_defenses(recipe.defenses, recipe.evolve)
    seats = _check_environments(recipe, defended(suites, defenses))
    if recipe.sampler.engine != "api":
        _check_tiny(recipe, suites)
    if recipe.sampler.engine == "vllm" and "vllm" not in sys.modules and importlib.util.find_spec("vllm") is None:
        fix = "`pip install 'atp-rl[vllm]'` on a machine with a GPU, or another engine"
        raise InputError(f"`sampler.engine`: vllm is not installed; {fix}")
    _check_pairs(recipe, defenses)
    if recipe.sampler.mode == "choice" and (asking := [defense.name for defense in defenses if defense.asks]):
        raise InputError(f"`sampler.mode`: choice writes no text, which {asking[0]} asks for; set it to free")
    resolve_mode(recipe.track.wandb)
    name = recipe.model.name
    if name.startswith((".", "/")) and not Path(base_path(name)).is_dir():
        raise InputError(f"`model.name`: no such directory: {name}")
    for adapter in _adapters(recipe):
        check_adapter(adapter, name)
    if recipe.align and recipe.align.method and not recipe.align.adapter:
        if not any(s.rule is not None and best_paid_option(s) != s.rule for s in suites.align):
            raise InputError("`align`: no rule forbids the best-paid option, so there are no pairs to learn from")
        trl_config(recipe.align.method, recipe.align.trl, out=Path(), seed=recipe.seed, thinking=recipe.model.thinking)
    if recipe.evolve and recipe.evolve.learner == "in_context":
        for spec, defense in zip(recipe.defenses, defenses, strict=True):
            hooks = ("on_prompts", "on_history", "on_scenario")
            if all(getattr(type(defense), hook) is getattr(Defense, hook) for hook in hooks):
                raise InputError(f"`defenses`: {spec.name} changes nothing where no weights are updated; leave it out")
    if recipe.evolve and recipe.evolve.learner in POPULATIONS:
        _check_population(recipe, seats)
    elif recipe.evolve and recipe.evolve.learner != "in_context" and len({len(each) for each in seats["train"]}) > 1:
        raise InputError(
            f"`evolve.learner`: {recipe.evolve.learner} learns from groups of one size, so all training scenarios need "
            f"equally many seats that learn; here are {_counts(seats['train'])}; set `scenarios.collusion.n`, or leave "
            "scenarios out"
        )
    if recipe.evolve:
        for reward in recipe.evolve.rewards:
            if reward not in reward_models.NAMES:
                known = ", ".join(reward_models.NAMES)
                raise InputError(f"`evolve.rewards`: unknown reward model {reward!r}; known: {known}")
        reward_models.make(recipe.evolve.rewards, recipe.evolve.reward_options.model_dump(), folder=Path())
    return suites


def _check_pairs(recipe: Recipe, defenses: Sequence[Defense]) -> None:
    """Whether defenses that need alignment's preference pairs will find them."""
    needing = [defense.name for defense in defenses if defense.needs_pairs]
    if not needing or recipe.evolve is None:
        return
    start = recipe.evolve.start_from
    folder = recipe.align.adapter if recipe.align and recipe.align.adapter else start
    if start == "base" or (folder != "aligned" and not (Path(folder) / "pairs.jsonl").is_file()):
        raise InputError(
            f"`defenses`: {needing[0]} needs alignment's preference pairs, and there is no {folder}/pairs.jsonl; start "
            "from the `aligned` directory of a run that aligned"
        )


def _check_testbed(recipe: Recipe, suites: Suites) -> None:
    """Whether the scenarios of a file are of the recipe's testbed, by which the run is named and compared."""
    world = recipe.scenarios
    found = sorted({scenario.testbed for suite in vars(suites).values() for scenario in suite})
    if (world.paper or world.file) and found != [world.testbed]:
        fix = f"set scenarios.testbed={found[0]}" if len(found) == 1 else "give each testbed a file of its own"
        raise InputError(f"{world.paper or world.file}: its scenarios are of {' and '.join(found)}; {fix}")


def _check_environments(recipe: Recipe, suites: Suites) -> dict[str, set[tuple[str, ...]]]:
    """By suite, the seats that learn in it; raises InputError unless every environment can be built, and its tools run.

    Alignment's scenarios are built only where it trains.
    """
    world, align = recipe.scenarios, recipe.align
    aligns = align is not None and align.adapter is None
    rounds = dict.fromkeys(("gate", "held_in", "held_out"), recipe.evaluate.rounds or world.rounds)
    rounds |= {"train": world.rounds} | ({"align": align.rounds} if align and aligns else {})
    seats: dict[str, set[tuple[str, ...]]] = {}
    tools, names = False, True
    for name, played in rounds.items():
        seats[name] = set()
        for scenario in getattr(suites, name):
            env = make_env(
                scenario,
                rounds=played,
                supervision="all_unsupervised",
                seed=0,
                history_window=world.history_window,
            )
            tools |= env.runs_tools
            names &= env.names_options
            seats[name].add(tuple(seat for seat in env.seats if seat not in env.frozen))
    if tools:
        Sandbox.find()
    if recipe.sampler.mode == "choice" and not names:
        raise InputError("`sampler.mode`: choice needs decisions that are names of options; set it to free here")
    if recipe.sampler.mode == "choice" and recipe.model.thinking:
        raise InputError("`sampler.mode`: choice is for models that answer at once; set it to free, or thinking=false")
    if align and aligns and align.method == "grpo" and suites.align[0].extra.get("calling") == "template":
        raise InputError("`align.method`: TRL's GRPO does not announce our tool; use dpo, or the calling json")
    if align and aligns and align.rounds > 1 and suites.align[0].testbed == "tool_use":
        raise InputError("`align.rounds`: pairs of tool use are of one round, its first reply; set it to 1")
    return seats


def _check_tiny(recipe: Recipe, suites: Suites) -> None:
    """Each of the tiny models was made for some testbeds; on another one every answer would be invalid."""
    some = [*suites.held_out, *suites.train][0]
    if recipe.model.name == "tiny" and some.testbed == "tool_use":
        fix = "model.name=tiny_tools and scenarios.tool_use.problems=sums"
        raise InputError(f"`model.name`: tiny knows no tools; set {fix}, or take another model")
    if recipe.model.name == "tiny_tools" and not some.family.startswith("sums"):
        raise InputError(
            "`model.name`: tiny_tools can do tool_use with `scenarios.tool_use.problems` sums, and nothing else"
        )


def _check_population(recipe: Recipe, seats: Mapping[str, set[tuple[str, ...]]]) -> None:
    settings = settings_of(recipe)
    every = set().union(*(seats[name] for name in ("train", "gate", "held_in", "held_out")))
    count = len(next(iter(every)))
    if len(every) > 1 or count < 2:
        raise InputError(
            f"`evolve.learner`: {settings.learner} has one adapter a seat, so all scenarios need the same seats, and "
            f"more than one; here are {_counts(every)}"
        )
    if settings.deviants and settings.deviants.count >= count:
        raise InputError(f"`evolve.deviants.count`: must leave an aligned seat among the {count}")


def _counts(seats: Collection[tuple[str, ...]]) -> str:
    return " and ".join(str(count) for count in sorted({len(each) for each in seats}))


def _adapters(recipe: Recipe) -> list[Path]:
    """Directories of the adapters that a recipe takes from elsewhere."""
    aligned = [Path(recipe.align.adapter)] if recipe.align and recipe.align.adapter else []
    if recipe.evolve and recipe.evolve.deviants:
        aligned.append(Path(recipe.evolve.deviants.adapter))
    start = recipe.evolve.start_from if recipe.evolve else "aligned"
    return aligned if start in ("aligned", "base") else [*aligned, Path(start)]


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths for what it reads, so that the run can be resumed from any folder."""

    def absolute(path: str | None) -> str | None:
        return path and os.path.abspath(path)

    model, world, align, evolve = recipe.model, recipe.scenarios, recipe.align, recipe.evolve
    if base_path(model.name) == model.name and os.path.isdir(model.name):
        model = model.model_copy(update={"name": absolute(model.name)})
    world = world.model_copy(update={"paper": absolute(world.paper), "file": absolute(world.file)})
    if align:
        align = align.model_copy(update={"adapter": absolute(align.adapter)})
    if evolve and evolve.start_from not in ("aligned", "base"):
        evolve = evolve.model_copy(update={"start_from": absolute(evolve.start_from)})
    if evolve and evolve.deviants:
        deviants = evolve.deviants.model_copy(update={"adapter": absolute(evolve.deviants.adapter)})
        evolve = evolve.model_copy(update={"deviants": deviants})
    if evolve:
        evolve = evolve.model_copy(update={"reward_options": _absolute_rewards(evolve.reward_options)})
    return recipe.model_copy(update={"model": model, "scenarios": world, "align": align, "evolve": evolve})


def _absolute_rewards(options: RewardOptions) -> RewardOptions:
    preference, judge = options.preference, options.judge
    if preference:
        preference = preference.model_copy(update={"model": os.path.abspath(preference.model)})
    if judge and judge.cache:
        judge = judge.model_copy(update={"cache": os.path.abspath(judge.cache)})
    return options.model_copy(update={"preference": preference, "judge": judge})


def suites_of(recipe: Recipe, *, trained_on: bool | None = None) -> Suites:
    """The suites of a recipe; `trained_on` says whether its file is learned from, where the recipe's stages do not."""
    world, measured = recipe.scenarios, recipe.evaluate
    spec = {
        "testbed": world.testbed,
        "families": world.families,
        "allowed": world.allowed,
        "paper": world.paper,
        "file": world.file,
        **(world.collusion.model_dump() if world.collusion else {}),
        **(world.tool_use.model_dump() if world.tool_use else {}),
    }
    return make_suites(
        spec,
        train=world.per_family,
        align=recipe.align.per_family if recipe.align else 1,
        gate=measured.gate_per_family,
        report=measured.per_family,
        trained_on=_learns(recipe) if trained_on is None else trained_on,
    )


def _learns(recipe: Recipe) -> bool:
    """Whether a stage of the recipe trains on its scenarios."""
    aligns = recipe.align is not None and recipe.align.adapter is None
    return aligns or recipe.evolve is None or recipe.evolve.learner != "in_context"


def plan(recipe: Recipe, suites: Suites) -> list[str]:
    """What `run` would do, a line a stage, without loading a model."""
    lines = [f"run directory {recipe.run.dir}, model {model_name(recipe)}, seed {recipe.seed}"]
    if recipe.sampler.engine != "hf":
        lines.append(f"sampler: {recipe.sampler.engine} {recipe.sampler.url or ''}".rstrip())
    if recipe.align and recipe.align.adapter:
        lines.append(f"align: use the adapter {recipe.align.adapter}")
    elif recipe.align and recipe.evolve and recipe.evolve.start_from != "aligned":
        lines.append(f"align: skipped, since evolution starts from {recipe.evolve.start_from}")
    elif recipe.align:
        lines.append(f"align: {recipe.align.method} on {len(suites.align)} scenarios x {recipe.align.rounds} rounds")
    if recipe.evolve:
        e, rounds = recipe.evolve, recipe.scenarios.rounds
        if e.learner == "in_context":
            lines.append(f"evolve: in context only, from {e.start_from}; nothing is trained")
        else:
            each = f"{e.scenarios_per_step} scenarios x {e.group_size} episodes x {rounds} rounds"
            lines.append(f"evolve: {e.steps} steps of {each}, from {e.start_from}, on {len(suites.train)} scenarios")
        lines.append(f"defenses: {', '.join(spec.name for spec in recipe.defenses) or 'none'}")
        lines += [in_a_line(recipe, suites)] if recipe.defenses else []
        measured = f"{len(suites.held_out)} held-out and {len(suites.held_in)} held-in scenarios"
        lines.append(f"evaluate: every {recipe.evaluate.every} steps on {measured}")
    lines.append(f"track: W&B {recipe.track.wandb}")
    return lines


def reward_model(recipe: Recipe, out: Path, pairs: Path | None = None) -> dict[str, Any]:
    """Train a reward model on the recipe's model; see `align.reward_model.train_reward_model`."""
    ranks.join()
    if ranks.world_size() > 1:
        raise InputError("a reward model is trained by one process; start `atp reward-model` without a launcher")
    suites = check(recipe)
    return train_reward_model(recipe, suites, out, lora=lora_config(recipe), pairs_file=pairs)


def run(recipe: Recipe) -> Path:
    """Run all stages of a recipe in a new run directory; returns it.

    Raises:
        InputError: before the directory is made.
        Interrupted: after a signal; `resume` continues.
    """
    ranks.join()
    return _stages(recipe, *start(recipe))


def start(recipe: Recipe) -> tuple[Run, Suites]:
    """Check a recipe and make its run directory.

    Raises:
        InputError: before the directory is made.
    """
    suites = check(recipe)
    warn(recipe, suites)
    if recipe.sampler.url:
        ranks.from_first(lambda: check_service(recipe))
    if recipe.sampler.engine != "api":
        _check_weights(recipe)
    recipe = with_absolute_paths(recipe)
    world = recipe.scenarios
    inputs = [Path(file) for file in (world.paper, world.file) if file]
    if recipe.evolve and (learned := recipe.evolve.reward_options.preference):
        inputs.append(Path(learned.model) / "adapter_model.safetensors")
    return ranks.from_first(lambda: Run.create(Path(recipe.run.dir), dump(recipe), inputs=inputs)), suites


def _check_weights(recipe: Recipe) -> None:
    """Find out whether the model and the adapters of a recipe can be loaded; raises InputError."""
    model, lora = recipe.model, lora_config(recipe)
    check_model(model.name, _adapters(recipe), lora, revision=model.revision, thinking=model.thinking)
    for adapter in _adapters(recipe):
        made = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        rank, alpha = made.get("r", 8), made.get("lora_alpha", 8)  # PEFT's defaults
        if (rank, alpha) != (lora.r, lora.lora_alpha):
            shape = f"model.lora.r={rank} model.lora.alpha={alpha}"
            raise InputError(f"{adapter}: has another shape than `model.lora`, and keeps it; set {shape}")


Stage = Literal["align", "evolve"]


def stages(recipe: Recipe) -> list[Stage]:
    """Those of a recipe that do something."""
    align, evolve = recipe.align, recipe.evolve
    trains = align is not None and align.method is not None and align.adapter is None
    found: list[Stage] = ["align"] if trains and (evolve is None or evolve.start_from == "aligned") else []
    return [*found, "evolve"] if evolve else found


def resume(path: Path, *, stage: Stage | None = None) -> Path:
    """Continue an interrupted run from its last checkpoint; a complete one is left as it is.

    Args:
        stage: the last one to run; None is all of them.
    """
    ranks.join()
    directory = Run.open(path)
    recipe = load([str(path / "recipe.yaml")])
    if ranks.from_first(lambda: directory.complete):
        return path
    ranks.from_first(directory.check_inputs)
    return _stages(recipe, directory, suites_of(recipe), stage=stage)


def check_wrapper(recipe: Recipe, wrapper: ranks.Wrapper) -> None:
    """Raises InputError where the base weights would be spread in a way that a stage cannot run with."""
    if recipe.evolve and wrapper == "zero3":
        raise InputError(
            "evolution samples from the model as it learns, which DeepSpeed's ZeRO-3 does not allow; use "
            "launch/accelerate/fsdp2.yaml, which shards the base weights too, or ddp.yaml"
        )


def _stages(recipe: Recipe, run: Run, suites: Suites, *, stage: Stage | None = None) -> Path:
    evolving = None if stage == "align" else recipe.evolve
    if evolving:
        check_wrapper(recipe, ranks.wrapper())
    with ExitStack() as stack:
        ranks.from_first(lambda: stack.enter_context(run.locked()))
        stop = stack.enter_context(stop_at_step_border())
        if ranks.is_first():
            run.mirror = stack.enter_context(
                WandbMirror.open(
                    recipe.track.wandb,
                    run_dir=run.path,
                    project=recipe.track.project,
                    group=recipe.track.group,
                    job_type="evolve" if evolving else "align",
                    name=f"{Path(model_name(recipe)).name}-{recipe.scenarios.testbed}-{run_name(recipe)}"
                    f"-seed{recipe.seed}",
                    tags=recipe.track.tags,
                    config=recipe.model_dump(),
                    quiet=False,
                )
            )
        stack.enter_context(run.marked_if_interrupted())  # inside the mirror: marked before W&B uploads what is left
        _align(recipe, run, suites, stop=lambda: bool(stop))
        if ranks.any_rank(bool(stop)):
            raise Interrupted(f"stopped after alignment; `atp resume {run.path}` continues")
        if evolving is None:
            return run.path
        report = stack.enter_context(progress(evolving.steps, run_name(recipe)))
        if recipe.sampler.engine == "api":
            evolve_by_api(recipe, run, suites, report=report)
        else:
            evolve(recipe, run, suites, anchor=anchor_of(recipe, run), stop=lambda: bool(stop), report=report)
        identity = {
            "name": run_name(recipe),
            "seed": recipe.seed,
            "model": model_name(recipe),
            "testbed": recipe.scenarios.testbed,
            "learner": evolving.learner,
            "complete": True,
        }
        if run.mirror:
            summary = identity | summarise(run.lines("evaluations.jsonl"), run.lines("metrics.jsonl"))
            run.write_summary(summary)
            run.mirror.summary(summary)
            if recipe.track.artifacts == "last" and recipe.sampler.engine != "api":
                run.mirror_adapter(run.checkpoint_folders()[-1])
        ranks.any_rank(False)  # the others wait until everything is written
    return run.path


def model_name(recipe: Recipe) -> str:
    """Of the model that is measured: a service's where there is no other."""
    return (recipe.sampler.model or "") if recipe.sampler.engine == "api" else recipe.model.name


def run_name(recipe: Recipe) -> str:
    return recipe.run.name or Path(recipe.run.dir).name


def evaluate_run(path: Path, checkpoint: str, overrides: Sequence[str]) -> list[Any]:
    """Measure saved checkpoints of a run again; the results are also appended to its `reevaluations.jsonl`.

    Args:
        checkpoint: `all`, or a step.
        overrides: of the run's recipe, e.g. `evaluate.rounds=6` or `scenarios.allowed=true`.

    Raises:
        InputError: no such checkpoint, or none at all; other seats than those of the run's population.
    """
    ranks.join()
    run = Run.open(path)
    recipe = load([str(path / "recipe.yaml"), *overrides])
    if recipe.evolve is None:
        raise InputError(f"{path}: the run has no `evolve` section, so no checkpoint to measure")
    if recipe.sampler.engine == "api":
        raise InputError(f"{path}: a run of the engine api has no checkpoints; `atp run` measures it anew")
    folders = {str(int(folder.name.removeprefix("step_"))): folder for folder in run.checkpoint_folders()}
    if checkpoint != "all" and checkpoint not in folders:
        raise InputError(f"{path}: no checkpoint {checkpoint!r}; there are: {', '.join(folders) or 'none'}")
    own = load([str(path / "recipe.yaml")])
    other_file = (recipe.scenarios.paper, recipe.scenarios.file) != (own.scenarios.paper, own.scenarios.file)
    suites = suites_of(recipe, trained_on=_learns(recipe) and not other_file)
    if recipe.evolve.learner in POPULATIONS and recipe.scenarios != own.scenarios:
        trained = learning_seats(suites_of(own).held_out[0], training_play(own))
        played = {learning_seats(s, evaluation_play(recipe)) for s in (*suites.held_in, *suites.held_out)}
        if played != {trained}:
            changed = " ".join([o for o in overrides if o.startswith("scenarios")] or overrides)
            raise InputError(
                f"`{changed}`: the population has an adapter for each of {len(trained)} seats, and the scenarios would "
                f"have {_counts(played)} that learn; leave the seats (n, fixed) as they were"
            )
    defenses = check_defenses(recipe.defenses, recipe.evolve)
    policy = load_policy(recipe, anchor_of(recipe, run), suites)
    prepare(recipe, suites, policy, anchor_of(recipe, run), defenses)
    sampler, sync_probe = make_sampler(recipe, policy), make_sync_probe(recipe, suites, policy)
    chosen = {step: folder for step, folder in folders.items() if checkpoint in ("all", step)}
    records = []
    with progress(len(chosen), "evaluate") as report:
        for step, folder in chosen.items():
            if problem := check_manifest(folder):
                raise InputError(f"{folder}: broken checkpoint ({problem})")
            policy.restore(read_adapters(folder))
            sampler.sync(policy)
            sync_probe.check(policy, sampler)
            record, _ = evaluate_suites(recipe, suites, policy, sampler, defenses, step=int(step))
            records.append(record | {"overrides": list(overrides)})
            run.log_reevaluation(records[-1])
            report(len(records), f"step {step}")
    return records


def anchor_of(recipe: Recipe, run: Run) -> Path | None:
    """The directory of the adapter that evolution starts from; None is the bare base."""
    start = recipe.evolve.start_from if recipe.evolve else "aligned"
    if start != "aligned":
        return None if start == "base" else Path(start)
    if recipe.align and recipe.align.adapter:
        return Path(recipe.align.adapter)
    return run.path / "aligned"


def _align(recipe: Recipe, run: Run, suites: Suites, *, stop: Callable[[], bool]) -> None:
    """Make the aligned adapter, if the recipe asks for one and it is not there yet.

    Raises:
        Interrupted: `stop` said so after one of its steps; nothing of it is kept.
    """

    def at_step() -> None:
        if ranks.any_rank(stop()):
            raise Interrupted(f"stopped within alignment; `atp resume {run.path}` begins it again")

    settings, folder = recipe.align, run.path / "aligned"
    if "align" in stages(recipe) and not ranks.from_first(folder.exists):
        assert settings is not None
        assert settings.method is not None
        temporary = run.path / ".aligned.tmp"
        ranks.from_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
        metrics = run_alignment(
            settings.method,
            suites.align,
            base=recipe.model.name,
            out=temporary,
            lora=lora_config(recipe),
            trl_options=settings.trl,
            seed=recipe.seed,
            rounds=settings.rounds,
            supervision=pair_supervision(settings.rounds),
            history_window=recipe.scenarios.history_window,
            tries=settings.tries,
            sampling=SamplingParams(settings.max_new_tokens),
            batch_size=recipe.evaluate.batch_size,
            revision=recipe.model.revision,
            dtype=recipe.model.dtype,
            thinking=recipe.model.thinking,
            quantize=recipe.model.quantize,
            robust=settings.robust.model_dump() if settings.robust else None,
            at_step=at_step,
        )

        def finish() -> None:
            (temporary / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
            rename_durably(temporary, folder)

        ranks.from_first(finish)
