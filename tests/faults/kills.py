"""Kills a run at random moments until it has had enough, and resumes it each time. Not a test itself."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.small_model import reproducible

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1)


class Undisturbed(NamedTuple):
    """How long a run takes that nothing interrupts; the moments of the kills are drawn by it."""

    start: float
    """Seconds until it has made its directory."""
    work: float
    """Seconds from then to its end."""


class Kill(NamedTuple):
    signal: str
    seconds: float
    """After the start of the process."""
    code: int
    """The exit code; a negative one is that of a signal."""
    left: str
    """What the process left: `nothing`, `no checkpoint`, or the name of the last one."""


def undisturbed(command: Sequence[str], start: Sequence[str], folder: Path, *, timeout: float = 180.0) -> Undisturbed:
    """Run to the end in `folder`; the arguments are those of `killed`."""
    begun = time.monotonic()
    process = _process([*command, *start, f"run.dir={folder}"], folder.parent)
    while not (folder / "recipe.yaml").exists() and process.poll() is None and time.monotonic() < begun + timeout:
        time.sleep(0.01)
    made = time.monotonic()
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors
    return Undisturbed(made - begun, time.monotonic() - made)


def killed(
    command: Sequence[str],
    start: Sequence[str],
    folder: Path,
    *,
    kills: int,
    seed: int,
    like: Undisturbed,
    interrupted: Collection[int] = (75,),
    timeout: float = 180.0,
) -> list[Kill]:
    """Start a run in `folder`, kill it so many times, resume it each time, and let it finish after the last one.

    One process in four is killed at a moment of its start; the others after their first write, within a time that lets
    all kills together see about half of the run.

    Args:
        command: what comes before the arguments of `atp`: `[python, "-m", "atp_rl"]`, or `torchrun` with its options.
            The signal goes to the process and all that descend from it, as a scheduler's does.
        start: the arguments that start the run, without `run.dir`.
        interrupted: exit codes after SIGTERM and SIGUSR1, once the run has its handlers.

    Returns:
        The kills that hit a process at work, in order.

    Raises:
        AssertionError: a process ended in another way than it was told to, or a resume failed.
    """
    draw, done = random.Random(seed), list[Kill]()
    for number in range(kills):
        begun, before = time.monotonic(), _last_write(folder)
        process = _process(_arguments(command, start, folder), folder.parent)
        if draw.random() < 0.25:
            moment = begun + draw.uniform(0, like.start)
        else:
            while _last_write(folder) == before and process.poll() is None and time.monotonic() < begun + timeout:
                time.sleep(0.005)
            moment = time.monotonic() + draw.uniform(0, 1.5 * like.work / kills)
        time.sleep(max(0.0, moment - time.monotonic()))
        if process.poll() is not None:
            break
        number_of_signal = SIGNALS[number % len(SIGNALS)]
        descendants = psutil.Process(process.pid).children(recursive=True)
        for each in (psutil.Process(process.pid), *descendants):
            try:
                each.send_signal(number_of_signal)
            except psutil.NoSuchProcess:
                continue
        seconds = round(time.monotonic() - begun, 2)
        _, errors = process.communicate(timeout=timeout)
        _, alive = psutil.wait_procs(descendants, timeout=timeout)
        assert not alive
        done.append(Kill(number_of_signal.name, seconds, process.returncode, _left(folder)))
        # before the run has its handlers, every signal ends a process at once
        expected = {-number_of_signal, *(interrupted if number_of_signal != signal.SIGKILL else ())}
        assert process.returncode in expected, f"{done}\n{errors}"
    process = _process(_arguments(command, start, folder), folder.parent)
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, f"after {done}: exit code {process.returncode}\n{errors}"
    assert (folder / "summary.json").exists()
    return done


def results(folder: Path) -> dict[str, Any]:
    """What two runs that are the same share: their records without clocks, and the bytes of episodes and adapters."""
    logs = ("metrics.jsonl", "evaluations.jsonl", "alerts.jsonl")
    found: dict[str, Any] = {name: [reproducible(record) for record in _records(folder / name)] for name in logs}
    for part in ("aligned", "episodes", "checkpoints"):
        for file in sorted((folder / part).rglob("*")):
            if file.suffix == ".gz" or file.name.startswith("adapter_"):
                found[file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


def _arguments(command: Sequence[str], start: Sequence[str], folder: Path) -> list[str]:
    if (folder / "recipe.yaml").exists():
        return [*command, "resume", str(folder)]
    return [*command, *start, f"run.dir={folder}"]


def _process(command: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _last_write(folder: Path) -> int:
    """Changes with every file that appears, is replaced or grows in a run directory."""
    newest = 0
    for path in (folder, *folder.glob("*.jsonl"), folder / "checkpoints", folder / "episodes"):
        try:
            newest = max(newest, path.stat().st_mtime_ns)
        except FileNotFoundError:
            continue
    return newest


def _left(folder: Path) -> str:
    if not (folder / "recipe.yaml").exists():
        return "nothing"
    steps = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    return steps[-1] if steps else "no checkpoint"


def _records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
