"""`atp`: the command line. Every command is one call into a room; heavy imports happen inside the commands.

Exit codes: 0 done, 1 failure, 2 bad input, 75 interrupted and resumable.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from atp_rl import scenarios_cli
from atp_rl.types import InputError

if TYPE_CHECKING:
    from atp_rl.recipe import Recipe

app = typer.Typer(
    help="RL fine-tuning for alignment decay: align an agent, let it evolve on what pays, measure what erodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tiny = typer.Typer(help="The tiny models that ship with the package.", no_args_is_help=True)
app.add_typer(tiny, name="tiny")
app.add_typer(scenarios_cli.app, name="scenarios")

RecipeArgs = Annotated[list[str], typer.Argument(help="YAML files and key.sub=value overrides; later ones win.")]
RunDir = Annotated[Path, typer.Argument(help="A run directory.")]
RunDirs = Annotated[list[Path], typer.Argument(help="Directories of runs, or of a demo.")]
Launch = Annotated[
    Path | None, typer.Option("--launch", help="Configuration of `accelerate launch`, which then starts every stage.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Resolve, check and print the plan; load and write nothing.")]


@app.command()
def run(
    recipe: RecipeArgs,
    dry_run: DryRun = False,
    overlay: Annotated[
        list[str] | None, typer.Option("--overlay", "-o", help="YAML file laid over the others; overrides still win.")
    ] = None,
    launch: Launch = None,
) -> None:
    """Run all stages of a recipe: align, evolve, evaluate."""
    from atp_rl import pipeline
    from atp_rl.recipe import dump
    from atp_rl.tracking.run import Run

    files = next((i for i, arg in enumerate(recipe) if not os.path.isfile(arg)), len(recipe))
    resolved = _load([*recipe[:files], *(overlay or []), *recipe[files:]])
    if dry_run:
        from atp_rl.launch import promise
        from atp_rl.memory_plan import memory_lines
        from atp_rl.predict import warn

        suites = pipeline.check(resolved)
        warn(resolved, suites)
        Run.check_new(Path(resolved.run.dir))
        count, wrapper = promise(launch, resolved) if launch else (1, "none")
        shards = count if wrapper in ("fsdp2", "zero3") else 1
        launched = [f"launch: {count} process(es), {wrapper}, as {launch} says"] if launch else []
        plan = [
            *pipeline.plan(resolved, suites),
            *launched,
            *memory_lines(resolved, suites, ranks=count, shards=shards),
        ]
        print("\n".join(plan), dump(resolved), sep="\n\n", end="")
    elif launch:
        from atp_rl.launch import run

        _finish(run(resolved, launch))
    else:
        _finish(pipeline.run(resolved))


@app.command()
def align(recipe: RecipeArgs, dry_run: DryRun = False, launch: Launch = None) -> None:
    """Run the alignment stage alone; `evolve.start_from=RUN/aligned` uses its adapter afterwards."""
    from atp_rl.recipe import load

    if load(recipe).align is None:
        raise InputError("the recipe has no `align` section; nothing to align")
    run([*recipe, "evolve=null"], dry_run, launch=launch)


@app.command()
def evolve(recipe: RecipeArgs, dry_run: DryRun = False, launch: Launch = None) -> None:
    """Run the evolution stage alone, from an adapter that exists or from the bare base."""
    from atp_rl.recipe import load

    resolved = load(recipe)
    if resolved.evolve is None:
        raise InputError("the recipe has no `evolve` section; nothing to evolve")
    if resolved.evolve.start_from == "aligned" and not (resolved.align and resolved.align.adapter):
        raise InputError("`evolve.start_from`: give an adapter directory or `base`; `atp run` aligns first")
    run(recipe, dry_run, launch=launch)


@app.command()
def resume(
    path: RunDir,
    launch: Launch = None,
    stage: Annotated[Literal["align", "evolve"] | None, typer.Option(help="Stop after this stage.")] = None,
) -> None:
    """Continue an interrupted run, bit for bit."""
    if launch:
        from atp_rl.launch import resume

        _finish(resume(path, launch))
    else:
        from atp_rl import pipeline

        _finish(pipeline.resume(path, stage=stage))


@app.command()
def evaluate(
    path: RunDir,
    checkpoint: Annotated[str, typer.Option(help="`all`, or a step.")] = "all",
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Recipe override for what is played, e.g. evaluate.rounds=6.")
    ] = None,
) -> None:
    """Measure the checkpoints of a run again, perhaps on other scenarios, rounds or supervision."""
    from atp_rl import pipeline
    from atp_rl.tracking.compare import evaluation_table

    _print(evaluation_table(pipeline.evaluate_run(path, checkpoint, override or [])))


@app.command()
def predict(
    recipe: Annotated[
        list[str] | None, typer.Argument(help="YAML files and key.sub=value overrides; not needed with --against.")
    ] = None,
    p0: Annotated[
        float | None, typer.Option("--p0", help="Violation rate when aligned; default: the recipe's own run's, or .01.")
    ] = None,
    against: Annotated[
        list[Path] | None, typer.Option("--against", help="Finished runs to lay beside their predictions; repeatable.")
    ] = None,
    scale_by: Annotated[
        Path | None, typer.Option("--scale-by", help="Run that calibrates the model's unit of time, for --against.")
    ] = None,
) -> None:
    """What theory expects: where violations settle, when they tip, and which defenses hold. Loads no model."""
    from atp_rl import pipeline
    from atp_rl.predict import NoPrediction, predict
    from atp_rl.predict_runs import against as beside
    from atp_rl.predict_tables import tables

    if scale_by and not against:
        raise InputError("--scale-by: is for --against; leave it out")
    if against and p0 is not None:
        raise InputError("--p0: is not for --against, where every run has its own; leave it out")
    if against:
        if recipe:
            pipeline.check(_load(recipe))
        shown = beside(against, scale_by)
    elif recipe:
        resolved = _load(recipe)
        suites = pipeline.check(resolved)
        try:
            shown = tables(predict(resolved, suites, p0=p0), resolved.defenses)
        except NoPrediction as reason:
            shown = [f"no prediction: {reason}"]
    else:
        raise InputError("RECIPE: is missing; give a YAML file, or finished runs with --against")
    for each in shown:
        _print(each)


@app.command()
def reward_model(
    recipe: RecipeArgs,
    out: Annotated[Path, typer.Option(help="Directory of the reward model.")],
    pairs: Annotated[
        Path | None, typer.Option(help="Pairs to train on, e.g. RUN/aligned/pairs.jsonl; default: they are made.")
    ] = None,
) -> None:
    """Train a reward model on preference pairs; `evolve.reward_options.preference.model=DIR` uses it."""
    from atp_rl import pipeline

    metrics = pipeline.reward_model(_load([*recipe, "evolve=null"]), out, pairs)
    accuracy = metrics["accuracy"]
    interval = f"[{accuracy['low']:.1%}, {accuracy['high']:.1%}], n {accuracy['n']}"
    _print(f"right on {accuracy['value']:.1%} {interval} of the pairs of held-out families\n{out}")


@app.command()
def sweep(
    path: RunDir,
    checkpoint: Annotated[int, typer.Option(help="Its step.")],
    alphas: Annotated[str, typer.Option(help="Shares of the update since alignment.")] = "0,0.25,0.5,0.75,1",
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Recipe override, e.g. evaluate.per_family=24.")
    ] = None,
) -> None:
    """Measure a checkpoint with its update since alignment scaled: a Pareto curve without training."""
    from atp_rl import sweep as stage

    try:
        shares = [float(alpha) for alpha in alphas.split(",")]
    except ValueError:
        raise InputError(f"--alphas {alphas}: give numbers with commas between them, e.g. 0,0.5,1") from None
    _print(stage.sweep_table(stage.sweep(path, checkpoint, shares, override or [])))


@app.command()
def report(
    runs: RunDirs, out: Annotated[Path | None, typer.Option(help="HTML file; default RUN/report.html.")] = None
) -> None:
    """Write one self-contained HTML file about one or several runs."""
    from atp_rl.tracking.report import write_report

    place = out or runs[0] / "report.html"
    with _writing(place):
        print(write_report(runs, place))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, or a study's file or directory.")],
    paper: Annotated[bool, typer.Option("--paper", help="Beside the figures of arXiv 2510.04860 instead.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Of a study: its arms and (in a file beside it) contrasts.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Of a study: the tables for booktabs.")] = None,
    html: Annotated[Path | None, typer.Option(help="Of a study: tables and pictures in one page.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Of a study: a folder for its pictures as SVG.")] = None,
) -> None:
    """Print the tables of one or several runs, or the league table of a study."""
    from atp_rl.studies.file import study_folder

    if len(runs) == 1 and not paper and (folder := study_folder(runs[0])):
        if not (folder / "study.json").exists():
            raise InputError(
                f"{runs[0]}: this study has not been started; `atp study {runs[0]}` runs it (of one that runs with "
                "--out give that directory)"
            )
        _league(folder, csv=csv, latex=latex, html=html, figures=figures)
        return
    if csv or latex or html or figures:
        raise InputError("--csv, --latex, --html and --figures are for one study: give its file or directory alone")
    from atp_rl.tracking.compare import tables
    from atp_rl.tracking.paper import paper_tables
    from atp_rl.tracking.read import expand

    for shown in paper_tables(expand(runs)) if paper else tables(expand(runs)):
        _print(shown)


@app.command()
def measure(
    runs: RunDirs,
    unaligned: Annotated[
        Path | None, typer.Option(help="Run of the same evolution from the bare base, for the alignment benefit.")
    ] = None,
    turned: Annotated[
        Path | None, typer.Option(help="Run from this one's end with the incentive turned, for the hysteresis.")
    ] = None,
    into: Annotated[Path | None, typer.Option("--json", help="File for all of it as JSON.")] = None,
) -> None:
    """Print what each run measured, with intervals: decay, shape, tipping, warnings, drift, gaps, monitors, cost."""
    from atp_rl.tracking.measures_show import measures_of, tables

    measured = measures_of(runs, unaligned=unaligned, turned=turned)
    for shown in tables(measured):
        _print(shown)
    if into:
        with _writing(into):
            into.write_text(json.dumps([m.record() for m in measured], indent=2, allow_nan=False) + "\n", "utf-8")


def _league(folder: Path, *, csv: Path | None, latex: Path | None, html: Path | None, figures: Path | None) -> None:
    from atp_rl.tracking import league_show
    from atp_rl.tracking.league import read_league

    league = read_league(folder)
    _print(league_show.headline(league))
    for shown in league_show.tables(league):
        _print(shown)
    if csv:
        with _writing(csv):
            _print("\n".join(map(str, league_show.write_csv(league, csv))))
    if latex:
        with _writing(latex):
            latex.write_text(league_show.latex(league), "utf-8")
        _print(latex)
    if html or figures:
        from atp_rl.tracking.league_picture import write_figures, write_html

        if html:
            with _writing(html):
                _print(write_html(league, html))
        if figures:
            with _writing(figures):
                _print("\n".join(map(str, write_figures(league, figures))))


@app.command()
def play(
    scenario: Annotated[str, typer.Argument(help="Part of a scenario's id.")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    supervision: Annotated[str, typer.Option(help="A pattern, or the probability of detection.")] = "alternating",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    scenarios: Annotated[Path | None, typer.Option(help="Scenario file; default: the shipped ones.")] = None,
) -> None:
    """Sit in a seat yourself."""
    from atp_rl.play import play_as_human

    play_as_human(scenario, rounds=rounds, supervision=supervision, seed=seed, file=scenarios)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Everything goes there.")] = Path("demo"),
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each.")] = 2,
) -> None:
    """Tiny model, DPO, two evolution arms x 3 seeds and a control; then the report. Minutes on two CPU cores."""
    from atp_rl.demo import run_demo

    run_demo(out, workers=workers)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A study file, e.g. recipes/studies/defenses.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Directory of its runs; default: the file's `dir`.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side; they share the cores.")] = 2,
    launcher: Annotated[Literal["local", "slurm"], typer.Option(help="Here, or as job arrays of Slurm.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print what would run; write nothing.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Run the members of this arm alone; may be repeated.")] = None,
    member: Annotated[str | None, typer.Option(help="Run this one run alone, as a task of a job array does.")] = None,
) -> None:
    """Run what is missing of a study, resume what was interrupted; the same command continues until all is there."""
    from atp_rl.studies import local, slurm
    from atp_rl.studies.file import find_sources, read_study
    from atp_rl.studies.members import choose, plan
    from atp_rl.studies.show import plan_lines, too_few_seeds

    path = Path(find_sources([str(file)])[0])
    whole = plan(read_study(path), out)
    part = choose(whole, only or [])
    if dry_run:
        print("\n".join(plan_lines(part)))
    if not member and (warning := too_few_seeds(whole.study)):
        print(f"atp: warning: {warning}", file=sys.stderr)
    if launcher == "slurm":
        slurm.submit(part, path, whole=whole, dry_run=dry_run)
    if dry_run or launcher == "slurm":
        return
    outcome = local.run_one(whole, member) if member else local.run_study(part, workers=workers, whole=whole)
    _print(part.folder)
    if outcome.failed:
        for name, end in outcome.failed.items():
            print(f"\natp: {name} failed: {end}", file=sys.stderr)
        if outcome.not_started:
            print(f"\natp: not started, for want of an alignment: {', '.join(outcome.not_started)}", file=sys.stderr)
        raise typer.Exit(1)
    if not member:
        print(f"next: atp compare {shlex.quote(str(out or file))}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe."""
    from atp_rl.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


@tiny.command()
def build(
    out: Annotated[Path, typer.Argument(help="Directory of the model; an interrupted build there is continued.")],
    testbed: Annotated[
        Literal["role_play", "tool_use"], typer.Option(help="Which one: `tiny` (role play, collusion) or `tiny_tools`.")
    ] = "role_play",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a tiny model from scratch (about half an hour on two cores)."""
    from atp_rl.model import tiny as model
    from atp_rl.model.tiny_card import write_card
    from atp_rl.tracking.progress import progress

    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    plan = dataclasses.replace(model.PLANS[testbed], seed=seed)
    with progress(plan.steps, "tiny build") as show:
        model.build(out, plan, report=lambda step, phase, loss: show(step, f"{phase}  loss {loss:.3f}"))
    print(write_card(out))


def _load(sources: Sequence[str]) -> Recipe:
    """The recipe of a command, with a warning where one file's defenses replace another's."""
    from atp_rl import ranks
    from atp_rl.recipe import load, replaced_defenses

    resolved = load(sources)
    if ranks.is_first():
        for line in replaced_defenses(sources):
            print(f"atp: warning: {line}", file=sys.stderr)
    return resolved


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """A place that cannot be written to is bad input."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error}); choose another place") from None


def _finish(path: Path) -> None:
    from atp_rl.tracking.compare import table
    from atp_rl.tracking.read import expand

    if (path / "summary.json").exists():
        _print(table(expand([path])))
    _print(path)


def _print(renderable: object) -> None:
    from rich.console import Console

    from atp_rl import ranks

    if ranks.is_first():
        Console(width=None if sys.stdout.isatty() else 160).print(renderable)


def main() -> None:
    """The console script: runs a command and turns what can go wrong into a message and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about each other
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel that only 4-bit weights need
    command: Callable[[], None] = app
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        command = record(app)  # torchrun then ends all ranks with the message of the one that failed first
    try:
        command()
    except InputError as error:
        print(f"atp: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code != 130:  # Typer's word for Ctrl-C
            raise
        print("atp: stopped; the same command continues a demo or a build, and `atp resume` a run", file=sys.stderr)
        sys.exit(75)
    except Exception as error:
        from atp_rl.tracking.run import Interrupted

        if not isinstance(error, Interrupted):
            raise
        print(f"atp: {error}", file=sys.stderr)
        sys.exit(75)
