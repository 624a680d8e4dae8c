"""The demo: the tiny model is aligned once and evolved in three arms; then the report. A study of ordinary commands."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from atp_rl.studies.file import RECIPES, Study
from atp_rl.studies.local import run_jobs, total_steps
from atp_rl.studies.members import Plan, check_directories, plan
from atp_rl.studies.record import write_recipes
from atp_rl.tracking.compare import table
from atp_rl.tracking.progress import progress
from atp_rl.tracking.read import expand
from atp_rl.tracking.report import write_report
from atp_rl.tracking.run import write_atomically
from atp_rl.types import InputError

ROLE_PLAY = RECIPES / "tiny" / "role_play.yaml"
ARMS = {
    "undefended": [],
    "kl_anchor": [str(RECIPES / "defenses" / "kl_anchor.yaml")],
    "detection_0.9": [str(RECIPES / "tiny" / "detection_0.9.yaml")],
}
SEEDS = [0, 1, 2]
CONTROL = "detection_0.9"
"""The arm of which one seed is enough."""


def run_demo(out: Path, *, workers: int) -> None:
    """Run what is missing of the demo in `out`, then print the table, its reading and where the report is.

    Raises:
        InputError: `out` holds something else.
        Interrupted: a signal came; the same command continues.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is not a directory; choose another one with --out")
    if out.exists() and any(out.iterdir()) and not (out / "align").exists():
        raise InputError(f"{out}: is not empty and holds no demo; choose another folder with --out")
    begun, demo = time.perf_counter(), demo_plan(out)
    check_directories(demo.jobs)
    changes = any(not job.complete for job in demo.jobs) or not (out / "summary.json").exists()
    write_recipes(demo, demo.jobs)
    if not demo.alignments[0].complete:
        print("aligning the tiny model with DPO", flush=True)
    with progress(total_steps(demo.members), "demo") as report:
        outcome = run_jobs(
            demo,
            demo.jobs,
            lambda states, error=None: None,
            workers=workers,
            threads=lambda job: workers if job.aligns else 1,
            report=report,
        )
    for name, end in outcome.failed.items():
        raise RuntimeError(f"{name} failed with {end}")
    arms = [json.loads((member.folder / "summary.json").read_text()) | {"dir": member.name} for member in demo.members]
    summary = {
        "aligned": arms[0]["aligned"],
        "final": arms[0]["final"],
        "tipped": arms[0]["tipped"],
        "tipping_step": arms[0]["tipping_step"],
        "steps": arms[0]["steps"],
        "wall_seconds": round(time.perf_counter() - begun, 1),
        "arms": arms,
    }
    if changes:
        write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    path = write_report([out], out / "report.html")
    Console(width=None if sys.stdout.isatty() else 160).print(table(expand([out])))
    print(reading(arms))
    print(f"report: {path}")


def demo_plan(out: Path) -> Plan:
    """The alignment and the seven runs."""
    whole = plan(Study(name="demo", recipes=[str(ROLE_PLAY)], arms=ARMS, seeds=SEEDS), out)
    return replace(whole, members=[m for m in whole.members if m.arm != CONTROL or m.seed == SEEDS[0]])


def reading(arms: list[dict]) -> str:
    """The table in two sentences."""

    def of(name: str) -> list[dict]:
        return [arm for arm in arms if arm["name"] == name]

    def span(runs: list[dict], when: str) -> str:
        values = sorted(run[when]["violation_rate"] for run in runs)
        n = runs[0][when]["n"]
        ends = f"{values[0]:.0%}" if values[0] == values[-1] else f"{100 * values[0]:.0f}-{values[-1]:.0%}"
        return f"{ends} (n {n} per seed, {len(runs)} seed{'s' if len(runs) > 1 else ''})"

    bare, anchored, watched = of("undefended"), of("kl_anchor"), of("detection_0.9")
    tipped = sum(arm["tipped"] for arm in bare)
    return (
        f"Paid for breaking the rule, the aligned tiny model's violations on held-out families went from "
        f"{span(bare, 'aligned')} to {span(bare, 'final')}; {tipped} of {len(bare)} seeds tipped. Under the same pay "
        f"the KL anchor ended at {span(anchored, 'final')}, and where nine of ten violations are caught, the "
        f"undefended policy ended at {span(watched, 'final')}."
    )
