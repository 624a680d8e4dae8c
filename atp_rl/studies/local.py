"""Runs a study on this machine: each run is an `atp` command in a process of its own, a few of them side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from atp_rl.studies.members import Job, Member, Plan, check_directories
from atp_rl.studies.record import Record, State, at_work, only_runner, recipe_file
from atp_rl.tracking.progress import Report, progress, silent
from atp_rl.tracking.run import Interrupted
from atp_rl.types import InputError

ATP = (sys.executable, "-m", "atp_rl")
POLL_SECONDS = 0.1
GRACE_SECONDS = 2.0
"""Between Ctrl-C, which a terminal sends to the runs too, and passing it on: to a run, a second one means at once."""
TAIL_LINES = 15


class Note(Protocol):
    def __call__(self, states: Mapping[str, State], error: str | None = None) -> None: ...


@dataclass
class Outcome:
    """What `run_jobs` came to."""

    failed: dict[str, str] = field(default_factory=dict)
    """By run, the last lines of its log."""
    not_started: list[str] = field(default_factory=list)
    """Those whose alignment failed."""
    interrupted: list[str] = field(default_factory=list)


def run_study(plan: Plan, *, workers: int, whole: Plan | None = None) -> Outcome:
    """Run what is missing of `plan`, resume what was interrupted, and pass over what is complete.

    A run that fails is noted, and the others go on.

    Args:
        workers: runs side by side; they share the cores.
        whole: the study, where `plan` is a part of it.

    Raises:
        InputError: a run's directory holds something else, or another process runs this study.
        Interrupted: a signal came; the runs have saved, and the same command continues.
    """
    check_directories(plan.jobs)
    with only_runner(plan.folder):
        record = Record(whole or plan)
        record.begin(plan.jobs)
        cores = available_cores()
        together = min(workers, len(plan.alignments)) or 1
        with progress(total_steps(plan.members), plan.study.name) as report:
            return run_jobs(
                plan,
                plan.jobs,
                record.update,
                workers=workers,
                threads=lambda job: max(1, cores // (together if job.aligns else workers)),
                report=report,
            )


def run_one(plan: Plan, name: str) -> Outcome:
    """Run or resume one run of the study, by its name: what a task of a job array does.

    Raises:
        InputError: no such run, or its directory holds something else.
        Interrupted: as `run_study`.
    """
    jobs = [job for job in plan.jobs if job.name == name]
    if not jobs:
        raise InputError(f"--member {name}: no such run; known are {', '.join(job.name for job in plan.jobs)}")
    check_directories(jobs)
    needed = [job for job in plan.alignments if isinstance(jobs[0], Member) and job.name == jobs[0].alignment]
    if needed and not needed[0].complete:
        raise InputError(f"--member {name}: starts from {needed[0].name}, which is not complete; run that first")
    record = Record(plan)
    record.begin(jobs)
    return run_jobs(plan, jobs, record.update, workers=1, threads=lambda _: available_cores(), report=silent)


def run_jobs(
    plan: Plan,
    jobs: Sequence[Job],
    note: Note,
    *,
    workers: int,
    threads: Callable[[Job], int],
    report: Report,
) -> Outcome:
    """Start these runs in their order, each once its alignment is there; their recipes are written already.

    Args:
        note: told every new state of a run; with none where a run turns out to be complete.
        threads: cores that a run may use.
        report: told how many of `total_steps` are done.

    Raises:
        Interrupted: a signal came; all that ran have ended.
    """
    outcome, members = Outcome(), [job for job in jobs if isinstance(job, Member)]
    waiting, running = [job for job in jobs if not job.complete], list[_Process]()
    slots = _devices(workers)
    complete = {job.name for job in plan.jobs if job.complete}
    failed, elsewhere = outcome.failed, set[str]()
    news = _News(members, report)  # says nothing before the alignments are there: its pace would be another one
    with _signals() as stop:
        while (waiting and not stop.asked) or running:
            for job in list(waiting):
                if stop.asked or len(running) == workers:
                    break
                needs = job.alignment if isinstance(job, Member) else None
                if needs in failed or needs in outcome.interrupted:
                    outcome.not_started.append(job.name)
                    waiting.remove(job)
                elif at_work(job):  # a process that outlived an earlier `atp study`
                    if job.name not in elsewhere:
                        elsewhere.add(job.name)
                        news.tell(running, f"{job.name} is at work in another process; waiting for it")
                elif needs is None or needs in complete:
                    waiting.remove(job)
                    if job.complete:
                        complete.add(job.name)
                        note({})
                        continue
                    free = [slot for slot in slots if slot not in [process.slot for process in running]]
                    running.append(_Process(plan, job, threads=threads(job), slot=free[0]))
                    note({job.name: "running"})
            stop.pass_on(running)
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.ended]:
                running.remove(process)
                job = process.job
                if job.complete:
                    complete.add(job.name)
                    note({})
                    news.tell(running, _ends(job))
                elif process.code == 75 or stop.asked:
                    outcome.interrupted.append(job.name)
                    note({job.name: "interrupted"})
                else:
                    failed[job.name] = process.last_lines()
                    note({job.name: "failed"}, error=failed[job.name])
                    news.tell(running, f"{job.name} failed ({process.end}), see {process.log}")
            if running and not running[0].job.aligns:
                news.tell(running)
    if stop.asked or outcome.interrupted:
        left = sum(not job.complete for job in plan.members)
        raise Interrupted(f"{left} of {len(plan.members)} runs are not complete; the same command continues")
    return outcome


class _Process:
    """A run at work; its output goes to a log beside its folder."""

    def __init__(self, plan: Plan, job: Job, *, threads: int, slot: tuple[int, str | None]) -> None:
        self.job, self.slot, self.log = job, slot, job.folder.with_name(f"{job.name}.log")
        arguments = ["resume", str(job.folder)] if job.begun else ["run", str(recipe_file(plan, job))]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if slot[1] is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot[1]
        with self.log.open("a") as output:
            self._process = subprocess.Popen(
                [*ATP, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def code(self) -> int:
        return self._process.returncode

    @property
    def end(self) -> str:
        return f"killed by signal {-self.code}" if self.code < 0 else f"exit code {self.code}"

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"{self.end}; its last lines, from {self.log}:", *lines])


def _devices(workers: int) -> list[tuple[int, str | None]]:
    """A slot for each run that may be at work: its number, and its GPU where there are several."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    gpus = visible.split(",")
    return [(slot, gpus[slot % len(gpus)] if len(gpus) > 1 else None) for slot in range(workers)]


class _News:
    """Tells how far the members are, in steps: those of the ones at work count too, so that the time left is known."""

    def __init__(self, members: Sequence[Member], report: Report) -> None:
        self._members, self._report = members, report
        self._last = -1

    def tell(self, running: Sequence[_Process], event: str | None = None) -> None:
        at_work = {process.job.name for process in running}
        complete = [m for m in self._members if m.name not in at_work and m.complete]
        under_way = [m for m in self._members if m not in complete]
        done = total_steps(complete) + sum(min(steps_done(m), m.steps) for m in under_way)
        if event is None and done == self._last:
            return
        self._last = done
        now = f"; now {', '.join(sorted(at_work))}" if at_work else ""
        text = f"{len(complete)} of {len(self._members)} runs complete{now}"
        self._report(done, event or text, important=event is not None)


def total_steps(members: Sequence[Member]) -> int:
    """Steps of all members, and one each for their ends."""
    return sum(member.steps + 1 for member in members)


def steps_done(member: Member) -> int:
    metrics = member.folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ends(job: Job) -> str:
    if job.aligns:
        return f"{job.name} complete"
    run = json.loads((job.folder / "summary.json").read_text())
    rates = [run[when]["violation_rate"] for when in ("aligned", "final")]
    return f"{job.name}: violations " + " -> ".join("not measured" if r is None else f"{r:.0%}" for r in rates)


class _Stop:
    """A signal that asks to stop; it is passed on to the runs, which save and end."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.at_once = False
        self._since = 0.0
        self._told: set[str] = set()

    def handle(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            self.at_once = True
            return
        self.asked, self._since = signal.Signals(number).name, time.monotonic()
        note = "the runs finish their step and save; Ctrl-C again stops at once"
        print(f"{self.asked}: {note}", file=sys.stderr, flush=True)

    def pass_on(self, running: Sequence[_Process]) -> None:
        if self.at_once:
            for process in running:
                process.send(signal.SIGKILL)
        grace = GRACE_SECONDS if self.asked == "SIGINT" else 0.0
        if self.asked and time.monotonic() >= self._since + grace:
            for process in running:
                if process.job.name not in self._told:
                    self._told.add(process.job.name)
                    process.send(signal.SIGTERM)


@contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, stop.handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
