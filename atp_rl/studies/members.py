"""Makes the runs of a study: one alignment for each testbed and model, and a member for each point of the grid.

Everything is resolved and checked here, before the first run starts. Members are fair to each other: those of one
testbed, model and knobs share scenarios, seeds, budget, evaluation and the aligned adapter that they start from.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atp_rl.recipe import Recipe, load
from atp_rl.studies.file import Knob, Study, find_sources
from atp_rl.types import InputError

MAY_DIFFER = (
    "scenarios.supervision",
    "scenarios.history_window",
    "scenarios.collusion.peer_history",
    "scenarios.collusion.fixed",
    "scenarios.collusion.fixed_as",
)
"""What an arm may change of the scenarios, because that is the defense; it is shown wherever arms are compared."""


@dataclass(frozen=True)
class Job:
    """One run of a study: an alignment, or a member."""

    name: str
    folder: Path
    recipe: Recipe
    """Resolved; `run.dir` is `folder`."""

    @property
    def aligns(self) -> bool:
        return self.recipe.evolve is None

    @property
    def steps(self) -> int:
        return self.recipe.evolve.steps if self.recipe.evolve else 0

    @property
    def complete(self) -> bool:
        return (self.folder / ("aligned" if self.aligns else "summary.json")).exists()

    @property
    def begun(self) -> bool:
        return (self.folder / "recipe.yaml").exists()


@dataclass(frozen=True)
class Member(Job):
    """One point of the grid."""

    arm: str
    testbed: str
    """Label of the study file; empty where there is one testbed. As `model`."""
    model: str
    knobs: Mapping[str, Knob]
    seed: int
    alignment: str | None
    """Name of the alignment that it starts from; None where its recipe starts from something else."""
    differs: tuple[str, ...]
    """Keys in which its scenarios, or what it starts from, differ from those of the first arm."""


@dataclass(frozen=True)
class Plan:
    """A study as runs, in the order in which they are started."""

    study: Study
    folder: Path
    alignments: list[Job]
    members: list[Member]

    @property
    def jobs(self) -> list[Job]:
        return [*self.alignments, *self.members]


def plan(study: Study, folder: Path | None = None) -> Plan:
    """Expand a study, resolve and check every run of it; nothing is written.

    Args:
        folder: the study's directory; None is the one that the study names.

    Raises:
        InputError: one line per problem, with the run, the file and the key; also where members are no fair match.
    """
    folder = folder or study.folder
    problems: list[str] = []
    cells = list(_cells(study, problems))
    if not problems:
        problems += _unchecked(cells)
        problems += _unfair(cells)
        problems += _twins(cells)
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    alignments: dict[str, Job] = {}
    members: list[Member] = []
    for cell in cells:
        first, alignment = _first_arm(cell, cells), _alignment(cell, folder, alignments)
        differs = [*_scenarios_differ(first, cell), *_starts_differ(first, cell)]
        members += (_member(study, cell, seed, folder, alignment, differs) for seed in study.seeds)
    return Plan(study, folder, list(alignments.values()), members)


def choose(plan: Plan, arms: Sequence[str]) -> Plan:
    """The plan with the members of these arms alone, and what they start from; no arms are all of them."""
    if unknown := [arm for arm in arms if arm not in plan.study.arms]:
        raise InputError(f"--only {unknown[0]}: no such arm; known are {', '.join(plan.study.arms)}")
    members = [member for member in plan.members if not arms or member.arm in arms]
    needed = {member.alignment for member in members}
    return replace(plan, members=members, alignments=[job for job in plan.alignments if job.name in needed])


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of what decides a run's numbers.

    Where it lives and how it is tracked do not, nor, for a member that starts from its study's own alignment, where
    the study is; an adapter elsewhere counts with its whole path.
    """
    resolved = recipe.model_dump(exclude={"run", "track"})
    if recipe.evolve and _is_of_the_study(Path(recipe.evolve.start_from), Path(recipe.run.dir).parent):
        resolved["evolve"]["start_from"] = "/".join(Path(recipe.evolve.start_from).parts[-2:])
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def _is_of_the_study(adapter: Path, study: Path) -> bool:
    """Whether this is `STUDY/<alignment>/aligned`.

    A recipe holds the adapter's absolute path, and its run's as it was given. These two are compared, not looked up:
    the study may have been moved since.
    """
    folder = [part for part in study.parts if part != ".."]
    return adapter.name == "aligned" and [*adapter.parts[:-2]][-len(folder) :] == folder


def check_directories(jobs: Sequence[Job]) -> None:
    """Raises InputError where a directory holds a run of another recipe, or something else."""
    from atp_rl.tracking.run import Run

    problems = []
    for job in jobs:
        try:
            if not job.begun:
                Run.check_new(job.folder)
            elif changed := _changed(job.recipe, load([str(job.folder / "recipe.yaml")])):
                problems.append(
                    f"{job.folder}: was made with another recipe ({', '.join(changed)}); give the arm another name, "
                    "choose another folder with --out, or move that one away"
                )
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


@dataclass(frozen=True)
class _Cell:
    """The members that differ in their seed alone."""

    name: str
    where: str
    """The part of `name` that says testbed and model."""
    testbed: str
    model: str
    arm: str
    knobs: Mapping[str, Knob]
    sources: list[str]
    base: Recipe
    """Without arm and knobs: what alignment is made from."""
    recipe: Recipe


def _cells(study: Study, problems: list[str]) -> Iterator[_Cell]:
    testbeds, models = study.testbeds or {"": []}, study.models or {"": []}
    for (testbed, of_testbed), (model, of_model) in itertools.product(testbeds.items(), models.items()):
        common = find_sources([*study.recipes, *of_testbed, *of_model, *study.set])
        where = _joined(testbed if len(testbeds) > 1 else "", model if len(models) > 1 else "")
        base = _load(where or study.name, common, problems)
        if base is None:
            continue
        for (arm, of_arm), knobs in itertools.product(study.arms.items(), _combinations(study.knobs)):
            settings = [f"{key}={json.dumps(value)}" for key, value in knobs.items()]
            varied = [f"{key.rpartition('.')[2]}_{v}" for key, v in knobs.items() if len(study.knobs[key]) > 1]
            name, sources = _joined(where, arm, *varied), [*common, *find_sources(of_arm), *settings]
            if recipe := _load(name, sources, problems):
                yield _Cell(name, where, testbed, model, arm, knobs, sources, base, recipe)


def _combinations(knobs: Mapping[str, Sequence[Knob]]) -> list[dict[str, Knob]]:
    return [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]


def _load(name: str, sources: Sequence[str], problems: list[str]) -> Recipe | None:
    try:
        return load(sources)
    except InputError as error:
        problems += [f"{name}: {line}" for line in str(error).splitlines()]
        return None


def _unchecked(cells: Sequence[_Cell]) -> list[str]:
    """What is wrong with the recipes of a study; seeds do not matter to it."""
    from atp_rl import pipeline

    problems = []
    for cell in cells:
        try:
            if cell.recipe.evolve is None:
                raise InputError("has no `evolve` section; a study compares what evolution does")
            pipeline.check(cell.recipe)
        except InputError as error:
            problems += [f"{cell.name}: {line} (in {', '.join(cell.sources)})" for line in str(error).splitlines()]
    return problems


def _unfair(cells: Sequence[_Cell]) -> list[str]:
    """Where arms of one testbed, model and knobs do not have the same scenarios, budget and evaluation."""
    problems = []
    for cell in cells:
        first = _first_arm(cell, cells)
        differences = [key for key in _scenarios_differ(first, cell) if not key.startswith(MAY_DIFFER)]
        if (budgets := (_budget(cell.recipe), _budget(first.recipe)))[0] != budgets[1]:
            product = "evolve.steps x scenarios_per_step x group_size"
            differences.append(f"{product} ({budgets[0]} and {budgets[1]} episodes)")
        differences += _different({"evaluate": first.recipe.evaluate}, {"evaluate": cell.recipe.evaluate})
        if differences:
            problems.append(
                f"{cell.name}: is no fair match for {first.name}: differs in {', '.join(differences)} (its files: "
                f"{', '.join(cell.sources)}); set what arms share in `set`, or vary it as a knob"
            )
    return problems


def _twins(cells: Sequence[_Cell]) -> list[str]:
    """Where two arms of one testbed, model and knobs are the same recipe."""
    problems, known = [], dict[tuple[str, str, str, str], _Cell]()
    for cell in cells:
        key = (cell.testbed, cell.model, json.dumps(dict(cell.knobs)), fingerprint(cell.recipe))
        twin = known.setdefault(key, cell)
        if twin is not cell:
            problems.append(
                f"{cell.name}: is the same recipe as {twin.name}: the arms `{twin.arm}` and `{cell.arm}` differ in "
                f"nothing; leave one out, or change what it sets (its files: {', '.join(cell.sources)})"
            )
    return problems


def _first_arm(cell: _Cell, cells: Sequence[_Cell]) -> _Cell:
    where = (cell.testbed, cell.model, cell.knobs)
    return next(other for other in cells if (other.testbed, other.model, other.knobs) == where)


def _scenarios_differ(a: _Cell, b: _Cell) -> list[str]:
    return _different({"scenarios": a.recipe.scenarios}, {"scenarios": b.recipe.scenarios})


def _starts_differ(a: _Cell, b: _Cell) -> list[str]:
    """Why two cells start from other adapters."""
    return [
        key
        for key, of in (
            ("align", lambda recipe: recipe.align),
            ("model", lambda recipe: recipe.model),
            ("evolve.start_from", lambda recipe: recipe.evolve and recipe.evolve.start_from),
        )
        if of(a.recipe) != of(b.recipe)
    ]


def _budget(recipe: Recipe) -> int:
    """Episodes of the whole evolution."""
    evolve = recipe.evolve
    return evolve.steps * evolve.scenarios_per_step * evolve.group_size if evolve else 0


def _changed(wanted: Recipe, found: Recipe) -> list[str]:
    """Keys in which a run's recipe differs from the one that is wanted."""
    if fingerprint(wanted) == fingerprint(found):
        return []
    return [key for key in _different(dict(wanted), dict(found)) if not key.startswith(("run", "track"))]


def _different(a: Any, b: Any, key: str = "") -> list[str]:
    """The dotted keys at which two trees of mappings and models have other values."""
    a, b = (value.model_dump() if hasattr(value, "model_dump") else value for value in (a, b))
    if not isinstance(a, dict) or not isinstance(b, dict):
        return [] if a == b else [key]
    return [d for k in {**a, **b} for d in _different(a.get(k), b.get(k), f"{key}.{k}" if key else k)]


def _alignment(cell: _Cell, folder: Path, made: dict[str, Job]) -> str | None:
    """Name of the alignment that the members of a cell start from, which is added to `made` if it is new.

    An arm that changes the model or how it is aligned gets one of its own, from its own recipe.
    """
    from atp_rl.pipeline import stages

    if "align" not in stages(cell.recipe):
        return None
    same = (cell.base.align, cell.base.model) == (cell.recipe.align, cell.recipe.model)
    recipe, of = (cell.base, cell.where) if same else (cell.recipe, cell.name)
    name = _joined("align", of)
    job = Job(name, folder / name, _placed(recipe, folder / name, name, evolve=None, defenses=[]))
    twin = next((other for other in made.values() if fingerprint(other.recipe) == fingerprint(job.recipe)), None)
    made.setdefault((twin or job).name, job)
    return (twin or job).name


def _member(
    study: Study, cell: _Cell, seed: int, folder: Path, alignment: str | None, differs: Sequence[str]
) -> Member:
    name, evolve = f"{cell.name}-seed{seed}", cell.recipe.evolve
    assert evolve is not None
    if alignment:
        evolve = evolve.model_copy(update={"start_from": str(folder / alignment / "aligned")})
    track = cell.recipe.track.model_copy(update={"group": cell.recipe.track.group or study.name})
    recipe = _placed(cell.recipe, folder / name, cell.name, seed=seed, evolve=evolve, track=track)
    return Member(
        name, folder / name, recipe, cell.arm, cell.testbed, cell.model, cell.knobs, seed, alignment, tuple(differs)
    )


def _placed(recipe: Recipe, folder: Path, name: str, **changes: Any) -> Recipe:
    from atp_rl.pipeline import with_absolute_paths

    run = recipe.run.model_copy(update={"dir": str(folder), "name": name})
    return with_absolute_paths(recipe.model_copy(update={"run": run, **changes}))


def _joined(*parts: str) -> str:
    return "-".join(part for part in parts if part)
