"""Runs a study as job arrays of Slurm: the alignments first, then the members, each a task that requeues itself."""

from __future__ import annotations

import itertools
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from atp_rl.studies.members import Job, Plan, check_directories
from atp_rl.studies.record import Record, at_work, make_folder, only_runner, recipe_file
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
    """Write the script and the lists into the study's directory and submit what is missing and not at work.

    At work is what a process holds, and what waits or runs in Slurm's queue as a task that was submitted here. The
    queue is asked where there is a `squeue`.

    Args:
        file: the study file, which the tasks read again.
        whole: the study, where `plan` is a part of it.
        dry_run: print them and the commands instead.

    Raises:
        InputError: there is no `sbatch` here, or it or `squeue` refuses; a run's directory holds something else;
            another process runs or submits this study; an alignment is at work that no task can wait for.
    """
    check_directories(plan.jobs)
    if any(letter.isspace() for letter in str(plan.folder.absolute())):
        raise InputError(f"{plan.folder}: a list of runs knows no quoting; choose a folder without blanks with --out")
    if dry_run:
        _submit(plan, file, whole, dry_run=True)
    elif shutil.which("sbatch") is None:
        raise InputError("--launcher slurm: there is no `sbatch` on this machine; submit from a login node")
    else:
        with only_runner(plan.folder):
            _submit(plan, file, whole, dry_run=False)


def _submit(plan: Plan, file: Path, whole: Plan, *, dry_run: bool) -> None:
    record = Record(whole)
    queued = _queued(record.tasks())
    busy = [job for job in plan.jobs if not job.complete and (job.name in queued or at_work(job))]
    for job in busy:
        if job.aligns and job.name not in queued:
            raise InputError(f"{job.folder}: is at work, and not as a task in Slurm's queue; wait for it")
        print(f"{job.name} is at work" + (f", as task {queued[job.name]}" if job.name in queued else ""))
    folder = plan.folder.absolute() / "slurm"
    script, text = folder / "array.sbatch", script_text(plan, file)
    stages = [
        (name, [job for job in jobs if not job.complete and job not in busy])
        for name, jobs in (("alignments", plan.alignments), ("members", plan.members))
    ]
    arrays = [(name, _new_file(folder, name), jobs) for name, jobs in stages if jobs]
    if dry_run:
        print(f"\n{script}:\n\n{text}")
        for _, path, jobs in arrays:
            print(f"{path}:\n\n{list_text(plan, jobs)}")
    else:
        record.begin([job for _, _, jobs in arrays for job in jobs])
        make_folder(folder)
        script.write_text(text)
        for _, path, jobs in arrays:
            path.write_text(list_text(plan, jobs))
    before = [queued[job.name] for job in busy if job.aligns]
    for name, path, jobs in arrays:
        depends = [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"] if before else []
        command = ["sbatch", "--parsable", *depends, f"--array=1-{len(jobs)}", str(script), str(path)]
        if dry_run:
            before.append("ALIGNMENTS")
            print(shlex.join(command))
        else:
            before.append(number := _answer(command).partition(";")[0])  # the cluster's name is behind the semicolon
            record.submitted({job.name: f"{number}_{i}" for i, job in enumerate(jobs, 1)})
            print(f"{name}: {len(jobs)} tasks of job {number}")
    if not arrays:
        print(f"everything is {'complete or at work' if busy else 'complete'}; nothing to submit")


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
    return "".join(f"{job.folder.absolute()} {recipe_file(plan, job).absolute()}\n" for job in jobs)


def _new_file(folder: Path, name: str) -> Path:
    """For the list of one array: its tasks read it when they begin, so that it never changes afterwards."""
    names = itertools.chain([f"{name}.txt"], (f"{name}-{k}.txt" for k in itertools.count(2)))
    return next(path for each in names if not (path := folder / each).exists())


def _queued(tasks: Mapping[str, str]) -> dict[str, str]:
    """Those of these tasks that wait or run in Slurm's queue, by run."""
    if not tasks or shutil.which("squeue") is None:
        return {}
    listed = _answer(["squeue", "--me", "--noheader", "--array", "--format=%i"]).split()
    return {name: task for name, task in tasks.items() if task in listed}


def _answer(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise InputError(f"`{shlex.join(command)}` was refused: {done.stderr.strip()}")
    return done.stdout.strip()
