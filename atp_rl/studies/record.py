"""What became of a study: `study.json` lists its runs with their state, `summary.json` names the complete ones.

The runs' own files are the truth. Several processes may write here (the tasks of a job array), each for its own run.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from atp_rl.recipe import dump
from atp_rl.studies.members import Job, Member, Plan, fingerprint
from atp_rl.tracking.run import write_atomically
from atp_rl.types import InputError

State = Literal["waiting", "running", "interrupted", "failed", "complete"]


def recipe_file(plan: Plan, job: Job) -> Path:
    """The resolved recipe that a run of the study is started from."""
    return plan.folder / "recipes" / f"{job.name}.yaml"


def write_recipes(plan: Plan, jobs: Sequence[Job]) -> None:
    """What these runs are started from."""
    make_folder(plan.folder)
    make_folder(plan.folder / "recipes")
    for job in jobs:
        write_atomically(recipe_file(plan, job), dump(job.recipe))


def make_folder(folder: Path) -> None:
    """Raises InputError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error}); choose another folder with --out") from None


@contextmanager
def only_runner(folder: Path) -> Iterator[None]:
    """Nobody else runs this study from here meanwhile; the lock is gone with the process, however it ends.

    Raises:
        InputError: somebody does already.
    """
    make_folder(folder)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another `atp study` is at work here; wait for it or end it") from None
        yield


def at_work(job: Job) -> bool:
    """Whether a process runs this job now, e.g. one that outlived its `atp study`."""
    if not job.begun:
        return False
    with (job.folder / "recipe.yaml").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Record:
    """The study's own files in its directory."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.states: dict[str, State] = {}
        """By run, as this process knows them."""

    def begin(self, jobs: Sequence[Job]) -> None:
        """Write the recipes of these runs, which this process is about to start, and note where each is."""
        write_recipes(self._plan, jobs)
        self.update({job.name: "interrupted" if job.begun else "waiting" for job in jobs})

    def update(self, states: Mapping[str, State], error: str | None = None) -> None:
        """Note the new states of some runs; those whose files say so are complete whatever was noted.

        Args:
            error: why they failed.
        """
        self._note({name: {"state": state, "error": error} for name, state in states.items()})

    def submitted(self, tasks: Mapping[str, str]) -> None:
        """Note by which task of Slurm each of these runs will be run."""
        self._note({name: {"task": task} for name, task in tasks.items()})

    def tasks(self) -> dict[str, str]:
        """By run, the task of Slurm that it was last submitted as, whether that has ended or not."""
        return {entry["name"]: task for entry in _entries(self._plan.folder) if (task := entry.get("task"))}

    def _note(self, news: Mapping[str, Mapping[str, str | None]]) -> None:
        plan = self._plan
        with (plan.folder / ".record.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            noted = {entry["name"]: entry for entry in _entries(plan.folder)}
            lines: dict[str, list[dict[str, Any]]] = {"alignments": [], "members": []}
            for job in plan.jobs:
                entry = _description(job) | {
                    key: noted.get(job.name, {}).get(key, default)
                    for key, default in (("state", "waiting"), ("error", None), ("task", None))
                }
                entry |= news.get(job.name, {})
                if job.complete:
                    entry |= {"state": "complete", "error": None}
                self.states[job.name] = entry["state"]
                lines["members" if isinstance(job, Member) else "alignments"].append(entry)
            study = {"name": plan.study.name, "arms": list(plan.study.arms), "primary": plan.study.contrasts, **lines}
            write_atomically(plan.folder / "study.json", json.dumps(study, indent=2) + "\n")
            self._summarise()

    def _summarise(self) -> None:
        """`summary.json` as a multi-run directory has it, for `atp report`."""
        arms = [
            json.loads((member.folder / "summary.json").read_text()) | {"dir": member.name}
            for member in self._plan.members
            if member.complete
        ]
        if arms:
            summary = {"study": self._plan.study.name, "complete": len(arms) == len(self._plan.members), "arms": arms}
            write_atomically(self._plan.folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def _description(job: Job) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": job.name, "dir": job.folder.name, "recipe": fingerprint(job.recipe)}
    if isinstance(job, Member):
        axes = {"arm": job.arm, "testbed": job.testbed, "model": job.model, "knobs": dict(job.knobs), "seed": job.seed}
        entry |= {"group": job.recipe.run.name, **axes, "alignment": job.alignment, "differs": list(job.differs)}
    return entry


def _entries(folder: Path) -> list[dict[str, Any]]:
    file = folder / "study.json"
    study = json.loads(file.read_text()) if file.exists() else {"alignments": [], "members": []}
    return [*study["alignments"], *study["members"]]
