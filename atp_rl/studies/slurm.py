"""Runs a study as job arrays of Slurm: the alignments first, then the members, each a task that requeues itself."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from atp_rl.studies.members import Job, Plan, check_directories
from atp_rl.studies.record import Record, make_folder, recipe_file
from atp_rl.types import InputError

SCRIPT = """\
#!/usr/bin/env bash
# Written by `atp study --launcher slurm`. A task runs one line of a list: a run directory and its recipe.
#
#     sbatch --array=1-N array.sbatch LIST
#
# Slurm sends TERM to the task 300 s before the end of its time: the run finishes its step and saves, and the task is
# requeued. A crash is not. The batch shell gets no signal, and must not: it has yet to requeue.
#SBATCH --job-name=atp-{name}
#SBATCH --nodes=1
#SBATCH --ntasks=1
{resources}
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={logs}/%A_%a.out
set -euo pipefail
line="$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" -- "$1")"
member="$(basename -- "${{line%% *}}")"
cd -- {folder}
status=0
srun --ntasks=1 --kill-on-bad-exit=0 {python} -m atp_rl study {study} --out {out} --member "$member" || status=$?
if ((status == 75)); then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
  exit 0
fi
exit "$status"
"""
GPU = "#SBATCH --gpus-per-node=1\n#SBATCH --cpus-per-task=8"
CPU = "#SBATCH --cpus-per-task=1"
TINY = ("tiny", "tiny_tools")


def submit(plan: Plan, file: Path, *, whole: Plan, dry_run: bool) -> None:
    """Write the script and the lists into the study's directory and submit what is missing.

    Args:
        file: the study file, which the tasks read again.
        whole: the study, where `plan` is a part of it.
        dry_run: print them and the commands instead.

    Raises:
        InputError: there is no `sbatch` here, or it refuses; a run's directory holds something else.
    """
    check_directories(plan.jobs)
    folder = plan.folder.absolute() / "slurm"
    script, text = folder / "array.sbatch", script_text(plan, file)
    stages = [
        (name, [job for job in jobs if not job.complete])
        for name, jobs in (("alignments", plan.alignments), ("members", plan.members))
    ]
    lists = {name: (folder / f"{name}.txt", list_text(plan, jobs), len(jobs)) for name, jobs in stages if jobs}
    if dry_run:
        print(f"\n{script}:\n\n{text}")
        for path, lines, _ in lists.values():
            print(f"{path}:\n\n{lines}")
    elif shutil.which("sbatch") is None:
        raise InputError("--launcher slurm: there is no `sbatch` on this machine; submit from a login node")
    else:
        Record(whole).begin(plan.jobs)
        make_folder(folder)
        for path, content in [(script, text), *((path, lines) for path, lines, _ in lists.values())]:
            path.write_text(content)
    before: str | None = None
    for path, _, count in lists.values():
        depends = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
        command = ["sbatch", "--parsable", *depends, f"--array=1-{count}", str(script), str(path)]
        if dry_run:
            before = "ALIGNMENTS"
            print(shlex.join(command))
        else:
            before = _submitted(command)
            print(f"{path.stem}: {count} tasks of job {before}")
    if not lists:
        print("everything is complete; nothing to submit")


def script_text(plan: Plan, file: Path) -> str:
    """The script of both arrays."""
    gpu = any(job.recipe.model.name not in TINY for job in plan.jobs)
    return SCRIPT.format(
        name=plan.study.name,
        study=shlex.quote(str(file)),
        resources=GPU if gpu else CPU,
        logs=plan.folder.absolute() / "slurm",
        folder=shlex.quote(str(Path.cwd())),
        python=shlex.quote(sys.executable),
        out=shlex.quote(str(plan.folder)),
    )


def list_text(plan: Plan, jobs: Sequence[Job]) -> str:
    """A line for each run as `launch/slurm/study.sbatch` reads it too: its directory and its recipe."""
    if any(letter.isspace() for letter in str(plan.folder.absolute())):
        raise InputError(f"{plan.folder}: a list of runs knows no quoting; choose a folder without blanks with --out")
    return "".join(f"{job.folder.absolute()} {recipe_file(plan, job).absolute()}\n" for job in jobs)


def _submitted(command: Sequence[str]) -> str:
    """The number of the job; `--parsable` gives it with the cluster's name behind a semicolon."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise InputError(f"`{shlex.join(command)}` was refused: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
