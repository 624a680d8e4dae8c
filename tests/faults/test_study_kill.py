"""kill -9, three times along a study: the same command finishes it, with the table of one that nothing disturbed."""

from __future__ import annotations

import csv
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from tests import small_model
from tests.command_line import atp, start
from tests.small_model import reproducible

ARMS, SEEDS = ("undefended", "kl_3", "kl_1"), (0, 1)
MEMBERS = [f"{arm}-seed{seed}" for arm in ARMS for seed in SEEDS]


def write_study(folder: Path) -> None:
    """Six runs of two steps, and their alignment."""
    anchor = ["recipes/defenses/kl_anchor.yaml"]
    study = {
        "name": "killed",
        "recipes": ["recipes/tiny/role_play.yaml"],
        "set": [
            f"model.name={small_model.base()}", "model.lora.r=2", "model.lora.alpha=4",
            "align={method: dpo, per_family: 4, trl: {max_steps: 2, per_device_train_batch_size: 4}}",
            "scenarios.families=[ferry_pilot,archivist]", "scenarios.per_family=4",
            "evolve.steps=2", "evolve.scenarios_per_step=4", "evolve.group_size=4", "evolve.learning_rate=1e-2",
            "evolve.max_new_tokens=10", "evaluate.every=1", "evaluate.per_family=2", "track.wandb=disabled",
        ],
        "arms": {"undefended": [], "kl_3": anchor, "kl_1": [*anchor, "defenses[0].beta=1.0"]},
        "seeds": list(SEEDS),
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


def run_study(folder: Path) -> str:
    """To its end; its output. On a machine with other work seven processes may take minutes."""
    process = start("study", "study.yaml", cwd=folder)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return output


def table(folder: Path) -> list[dict[str, str]]:
    """The league table in numbers, without what the clock measures; then the contrasts."""
    atp("compare", "runs/killed", "--csv", "table.csv", cwd=folder)
    clocks = ("wall_seconds", "extra_seconds")
    files = [folder / "table.csv", folder / "table-contrasts.csv"]
    return [{k: v for k, v in row.items() if k not in clocks} for f in files for row in csv.DictReader(f.open())]


def metrics(folder: Path, member: str) -> list[dict]:
    lines = (folder / "runs" / "killed" / member / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in reproducible(json.loads(line)).items() if "seconds" not in k} for line in lines]


def killed(folder: Path, when: Callable[[list[str]], bool], *, members: bool) -> list[str]:
    """Start the study and kill it with SIGKILL as soon as `when` says so of the runs that are complete.

    Args:
        members: kill the whole process tree; else the runner alone, and what it started lives on.
    """
    process = start("study", "study.yaml", cwd=folder)
    deadline = time.monotonic() + 600
    while True:
        complete = [m for m in MEMBERS if (folder / "runs" / "killed" / m / "summary.json").exists()]
        at_work = [p for p in psutil.Process(process.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
        if when(complete) and at_work:
            break
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    targets = [psutil.Process(process.pid), *(psutil.Process(process.pid).children(recursive=True) if members else [])]
    for target in targets:
        target.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    if process.stdout and process.stderr:
        process.stdout.close()
        process.stderr.close()
    return complete


@pytest.mark.slow
def test_a_study_that_is_killed_finishes_after_the_same_command(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        write_study(folder)
    run_study(whole)

    align = broken / "runs" / "killed" / "align"
    killed(broken, lambda _: (align / "recipe.yaml").exists(), members=True)
    assert not (align / "aligned").exists()
    first = killed(broken, lambda complete: len(complete) >= 1, members=True)
    assert 1 <= len(first) < 5
    states = {m["name"]: m["state"] for m in json.loads((broken / "runs/killed/study.json").read_text())["members"]}
    assert "running" in states.values()
    second = killed(broken, lambda complete: len(complete) > len(first), members=False)
    assert len(first) < len(second) < 6
    kept = {m: (broken / "runs" / "killed" / m / "summary.json").stat().st_mtime_ns for m in second}
    output = run_study(broken)
    assert output.splitlines()[-2:] == ["runs/killed", "next: atp compare study.yaml"]

    assert table(broken) == table(whole)
    for member in MEMBERS:
        assert metrics(broken, member) == metrics(whole, member)
    for member, written in kept.items():  # what was complete was not run again
        assert (broken / "runs" / "killed" / member / "summary.json").stat().st_mtime_ns == written
    states = {m["name"]: m["state"] for m in json.loads((broken / "runs/killed/study.json").read_text())["members"]}
    assert states == dict.fromkeys(MEMBERS, "complete")
