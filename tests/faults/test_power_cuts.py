"""A run directory whose writer ends between any two of its file operations still holds a whole checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atp_rl.tracking.run import Checkpoint, Run, check_manifest, rename_durably, write_atomically
from tests.small_model import lora

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
"""Audit events of what changes a folder; `open` is another one where it is for writing."""

Keep = Literal["all"] | int


class PowerCut(BaseException):
    """No handler of errors sees it, as none would run."""


class Power:
    """Counts this process's file operations, and after so many lets none happen."""

    left: int | None = None

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if self.left is None or not writes:
            return
        if self.left == 0:
            raise PowerCut(event, arguments)
        self.left -= 1

    def lasts(self, operations: int, action: Callable[[], object]) -> bool:
        """Do `action` with so many file operations; whether they were enough."""
        self.left = operations
        try:
            action()
        except PowerCut:
            return False
        finally:
            self.left = None
        return True


POWER = Power()
sys.addaudithook(POWER.hook)  # hooks stay for good; without a number this one does nothing


class Cut(NamedTuple):
    run: Run
    complete: bool
    """Nothing was cut short; the last one."""


def cuts(template: Path, folder: Path, action: Callable[[Run], object]) -> Iterator[Cut]:
    """Copies of a run in which `action` was cut short after 0, 1, 2, ... file operations."""
    for operations in range(200):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        run = Run(folder)
        complete = POWER.lasts(operations, lambda run=run: action(run))
        yield Cut(run, complete)
        if complete:
            assert operations > 2  # or nothing was counted
            return
    raise AssertionError("it never ends")


def save(run: Run, step: int, *, keep: Keep = "all", value: float = 0.0) -> None:
    adapter = {"base_model.layer.lora_A.weight": torch.full((2, 3), float(step))}
    checkpoint = Checkpoint(step, adapter, {"moment": torch.tensor(value)}, {"value": value})
    run.save_checkpoint(checkpoint, lora(), "some/model", keep=keep)


def last(run: Run) -> tuple[int, float]:
    checkpoint = run.last_checkpoint()
    assert checkpoint is not None
    return checkpoint.step, checkpoint.state["value"]


def steps_of(run: Run) -> list[int]:
    """Of the checkpoints under their names; every one of them must be whole."""
    assert [check_manifest(folder) for folder in run.checkpoint_folders()] == [None] * len(run.checkpoint_folders())
    return [int(folder.name[5:]) for folder in run.checkpoint_folders()]


def recovered(run: Run) -> Run:
    """As the next process finds it."""
    again = Run.open(run.path)
    with again.locked():
        assert list(run.path.rglob(".*")) == []
    return again


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A run with checkpoints 1, 2 and 3. To be copied."""
    run = Run.create(tmp_path_factory.mktemp("three") / "run", "seed: 0\n")
    for step in (1, 2, 3):
        save(run, step)
    return run.path


@pytest.mark.parametrize("keep", ["all", 1, 2])
@pytest.mark.parametrize("step", [3, 4])  # one that is there already, and the next one
def test_a_save_that_is_cut_short_leaves_the_last_checkpoint_or_the_new_one(step, keep, three, tmp_path):
    found = set()
    for cut in cuts(three, tmp_path / "run", lambda run: save(run, step, keep=keep, value=7.0)):
        run = recovered(cut.run)
        found.add(last(run))
        assert set(steps_of(run)) <= {1, 2, 3, step}
        save(run, step, keep=keep, value=7.0)  # the resumed run gets there again
        assert last(run) == (step, 7.0)
        assert steps_of(run) == sorted({1, 2, 3, step})[-(99 if keep == "all" else keep) :]
    assert found == {(3, 0.0), (step, 7.0)}


def test_the_first_save_is_all_or_nothing(tmp_path):
    empty = Run.create(tmp_path / "empty", "seed: 0\n").path
    found = set()
    for cut in cuts(empty, tmp_path / "run", lambda run: save(run, 0)):
        found.add(tuple(steps_of(recovered(cut.run))))
    assert found == {(), (0,)}


def test_a_recovery_may_be_cut_short_too(three, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    found = set()
    for cut in cuts(three, once, lambda run: save(run, 3, keep=1, value=7.0)):
        for operations in range(200):
            shutil.rmtree(twice, ignore_errors=True)
            shutil.copytree(cut.run.path, twice)
            complete = POWER.lasts(operations, Run(twice).recover)
            found.add(last(recovered(Run(twice))))
            if complete:
                break
        assert complete
    assert found == {(3, 0.0), (3, 7.0)}


def test_a_rewind_that_is_cut_short_is_done_again(three, tmp_path):
    run = Run(three)
    for step in (1, 2, 3):
        run.log_metrics({"progress/step": step})
    seen = set()
    for cut in cuts(three, tmp_path / "run", lambda run: run.rewind(1)):
        again = recovered(cut.run)
        seen.add(tuple(steps_of(again)))
        assert [line["progress/step"] for line in again.lines("metrics.jsonl")][:1] == [1]
        again.rewind(1)
        assert steps_of(again) == [1]
        assert again.lines("metrics.jsonl") == [{"progress/step": 1}]
    assert seen == {(1, 2, 3), (1, 3), (1,)}


def test_a_run_directory_whose_making_is_cut_short_can_be_made_again(tmp_path):
    for operations in range(200):
        folder = tmp_path / str(operations)
        complete = POWER.lasts(operations, lambda folder=folder: Run.create(folder, "seed: 0\n"))
        if complete or (folder / "recipe.yaml").exists():
            assert (recovered(Run(folder)).path / "recipe.yaml").read_text() == "seed: 0\n"
        else:
            assert Run.create(folder, "seed: 1\n").path == folder
        if complete:
            break
    assert operations > 2
    assert complete


def test_an_atomic_write_leaves_the_old_content_or_the_new(tmp_path):
    found, file = set(), tmp_path / "file"
    for operations in range(200):
        file.write_text("old")
        complete = POWER.lasts(operations, lambda: write_atomically(file, "new"))
        found.add(file.read_text())
        if complete:
            break
    assert found == {"old", "new"}


def test_what_must_survive_a_power_cut_is_synchronised_before_and_after_its_name_changes(tmp_path, monkeypatch):
    events: list[str] = []
    monkeypatch.setattr("atp_rl.tracking.run._fsync", lambda path: events.append(path.name))
    rename = Path.rename

    def noted(self: Path, target: Path) -> Path:
        events.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("content")
    rename_durably(tmp_path / "new", tmp_path / "old")
    assert events == ["file", "new", "new -> old", tmp_path.name]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    keep=st.sampled_from(["all", 1, 2, 3]),
    actions=st.lists(st.tuples(st.sampled_from(["next", "again", "jump", "rewind"]), st.integers(0, 3)), max_size=8),
)
def test_after_any_saves_and_rewinds_the_right_checkpoints_are_there(keep, actions, tmp_path_factory):
    run = Run.create(tmp_path_factory.mktemp("property") / "run", "seed: 0\n")
    expected: list[int] = []
    for number, (action, size) in enumerate(actions):
        newest = expected[-1] if expected else 0
        if action == "rewind":
            expected = [step for step in expected if step <= newest - size]
            run.rewind(newest - size)
        else:
            step = newest + {"next": 1, "again": 0, "jump": 2 + size}[action]
            expected = [*(s for s in expected if s != step), step]
            expected = expected if keep == "all" else expected[-keep:]
            save(run, step, keep=keep, value=float(number))
            assert last(run) == (step, float(number))
        assert steps_of(run) == expected
        assert list(run.path.rglob(".*")) == []
