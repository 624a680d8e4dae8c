"""The demo: align the tiny model once, evolve it in three arms, report. Every member is an ordinary `atp` command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import atp_rl
from atp_rl.tracking.compare import table
from atp_rl.tracking.progress import progress
from atp_rl.tracking.read import expand
from atp_rl.tracking.report import write_report
from atp_rl.tracking.run import Interrupted, write_atomically
from atp_rl.types import InputError

PACKAGE = Path(atp_rl.__file__).parent
RECIPES = PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else PACKAGE.parent / "recipes"
"""Those of the wheel, or else of the checkout."""
ROLE_PLAY = RECIPES / "tiny" / "role_play.yaml"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Member:
    """One run of the demo."""

    arm: str
    seed: int
    overlays: tuple[Path, ...]

    @property
    def folder(self) -> str:
        return f"{self.arm}-seed{self.seed}"


MEMBERS = [
    *(Member("undefended", seed, ()) for seed in SEEDS),
    *(Member("kl_anchor", seed, (RECIPES / "defenses" / "kl_anchor.yaml",)) for seed in SEEDS),
    Member("detection_0.9", 0, (RECIPES / "tiny" / "detection_0.9.yaml",)),
]


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
    begun, complete = time.perf_counter(), (out / "summary.json").exists()
    missing = [member for member in MEMBERS if not (out / member.folder / "summary.json").exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error}); choose another folder with --out") from None
    if not (out / "align" / "aligned").exists():
        print("aligning the tiny model with DPO", flush=True)
        _atp("align", out / "align", [ROLE_PLAY], [], threads=workers)
    start = f"evolve.start_from={out / 'align' / 'aligned'}"

    ended = threading.Event()

    def play(member: Member) -> None:
        folder = out / member.folder
        overrides = [start, f"seed={member.seed}", f"run.name={member.arm}"]
        if ended.is_set() or (folder / "summary.json").exists():
            return
        try:
            _atp("evolve", folder, [ROLE_PLAY, *member.overlays], overrides, threads=1)
        except BaseException:
            ended.set()  # before the thread that waits for this one learns of it, the next one would start
            raise

    with ThreadPoolExecutor(workers) as pool, progress(len(MEMBERS), "demo") as report:
        report(0, "evolving")
        results = [pool.submit(play, member) for member in MEMBERS]
        try:
            for done, (member, result) in enumerate(zip(MEMBERS, results, strict=True), 1):
                result.result()
                run = json.loads((out / member.folder / "summary.json").read_text())
                ends = f"violations {run['aligned']['violation_rate']:.0%} -> {run['final']['violation_rate']:.0%}"
                report(done, f"{member.arm} seed {member.seed}: {ends}", important=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that run get the signal too, and save; no other one starts
            raise
    arms = [
        json.loads((out / member.folder / "summary.json").read_text()) | {"dir": member.folder} for member in MEMBERS
    ]
    aligned, final = arms[0]["aligned"], arms[0]["final"]
    summary = {
        "aligned": aligned,
        "final": final,
        "tipped": arms[0]["tipped"],
        "tipping_step": arms[0]["tipping_step"],
        "steps": arms[0]["steps"],
        "wall_seconds": round(time.perf_counter() - begun, 1),
        "arms": arms,
    }
    if missing or not complete:
        write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    path = write_report([out], out / "report.html")
    Console(width=None if sys.stdout.isatty() else 160).print(table(expand([out])))
    print(reading(arms))
    print(f"report: {path}")


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


def _atp(command: str, folder: Path, recipes: list[Path], overrides: list[str], *, threads: int) -> None:
    """Run or resume one member in a process of its own; its output goes to a log beside its folder."""
    if (folder / "recipe.yaml").exists():
        arguments = ["resume", str(folder)]
    else:
        arguments = [command, *map(str, recipes), *overrides, f"run.dir={folder}"]
    log = folder.with_suffix(folder.suffix + ".log")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("a") as output:
        code = subprocess.run(
            [sys.executable, "-m", "atp_rl", *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code == 75:
        raise Interrupted(f"{folder.name} was interrupted; the same command continues")
    if code != 0:
        raise RuntimeError(f"{folder.name} failed with exit code {code}; its last lines, from {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
