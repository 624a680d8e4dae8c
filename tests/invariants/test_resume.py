"""A run that was interrupted, however, ends with the same bytes as one that was not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atp_rl.defenses import DEFENSES as DEFENSES_BY_NAME
from atp_rl.defenses import Defense, Probe
from atp_rl.pipeline import resume
from atp_rl.recipe import Recipe
from atp_rl.tracking.run import Interrupted, Run, check_manifest, stop_at_step_border
from tests.small_model import checkpoint_files, reproducible, run_of, small_recipe, stop_before

STEPS = 4
DEFENSES = "defenses=[{name: kl_anchor, beta: 0.3}, {name: gate, max_rate: 0.9, alpha: 0.4}, {name: refuse}]"


class Refuse(Defense):
    """Turns down the second and third step that it sees, so that what is resumed has been or will be rolled back."""

    seen = 0

    def accept(self, before: Probe, after: Probe) -> bool:
        self.seen += 1
        return self.seen not in (2, 3)

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@pytest.fixture(scope="module", autouse=True)
def _refuse() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEFENSES_BY_NAME, "refuse", Refuse)
        yield


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    # without history an episode of two rounds is two rows; with a warm-up the learner's own counter matters
    settings = ("scenarios.history_window=0", "evolve.warmup_steps=4", "evolve.updates_per_step=2")
    return small_recipe(folder, DEFENSES, *settings, *overrides, steps=STEPS, rounds=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """The run that nothing interrupted."""
    return run_of(recipe_in(tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was stopped before its last step: checkpoints 0, 2 and 3. To be copied, not continued."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted, match="stopped after step 3 of 4"):
        run_of(recipe_in(folder), stop=stop_before(4))
    return folder


def episode_files(run: Run) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run.path / "episodes").iterdir()}


def evaluations(run: Run) -> list[dict[str, Any]]:
    return [reproducible(e) for e in run.lines("evaluations.jsonl")]


def metrics(run: Run) -> list[dict[str, Any]]:
    return [reproducible(m) for m in run.lines("metrics.jsonl")]


def assert_same(run: Run, other: Run) -> None:
    """All that a run writes, clocks aside."""
    assert metrics(run) == metrics(other)
    assert evaluations(run) == evaluations(other)
    assert episode_files(run) == episode_files(other)
    assert run.lines("alerts.jsonl") == other.lines("alerts.jsonl")
    for step in (0, 2, 4):  # adapter, optimizer, state and their hashes
        assert checkpoint_files(run, step) == checkpoint_files(other, step)


def test_the_whole_run_is_worth_comparing_with(whole):
    steps = metrics(whole)
    assert [m["progress/step"] for m in steps] == [1, 2, 3, 4]
    assert [e["step"] for e in evaluations(whole)] == [0, 2, 4]
    assert [a["step"] for a in whole.lines("alerts.jsonl")] == [2, 3]
    names = {f"step_000{s}_{split}.jsonl.gz" for s in (0, 2, 4) for split in ("held_out", "held_in", "train")}
    assert set(episode_files(whole)) == names - {"step_0000_train.jsonl.gz"}
    assert len({checkpoint_files(whole, s)["adapter_model.safetensors"] for s in (0, 2, 4)}) == 3


def test_the_same_seed_twice_is_the_same_run(whole, tmp_path):
    assert_same(run_of(recipe_in(tmp_path / "again")), whole)


def test_another_seed_is_another_run(whole, tmp_path):
    other = run_of(recipe_in(tmp_path / "other", "seed=4", "evolve.steps=2"))
    assert metrics(other)[0] != metrics(whole)[0]
    # both start from the same adapter
    start = [checkpoint_files(run, 0)["adapter_model.safetensors"] for run in (other, whole)]
    assert start[0] == start[1]


@pytest.mark.parametrize("before", [2, 3])  # between two evaluations; right after one
def test_a_run_stopped_at_a_step_border_continues_to_the_last_bit(before, whole, tmp_path):
    recipe = recipe_in(tmp_path / "run")
    with pytest.raises(Interrupted, match=f"stopped after step {before - 1} of 4"):
        run_of(recipe, stop=stop_before(before))
    saved = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == f"step_{before - 1:04d}"
    assert_same(run_of(recipe), whole)


def test_a_run_stopped_again_and_again_arrives(whole, tmp_path):
    recipe, stops = recipe_in(tmp_path / "run"), 0
    while True:
        try:
            run = run_of(recipe, stop=stop_before(2))  # one step at a time
            break
        except Interrupted:
            stops += 1
    assert stops == STEPS - 1
    assert_same(run, whole)


class Crash(Exception):
    pass


@pytest.mark.parametrize(
    ("at", "of_evaluation", "logged"),
    [
        (1, False, [1]),  # its metrics are written, a checkpoint is not
        (2, True, [1, 2]),  # its evaluation, episodes and alert are written too
    ],
)
def test_what_was_logged_after_the_last_checkpoint_is_written_again(at, of_evaluation, logged, whole, tmp_path):
    def report(step: int, text: str, *, important: bool = False) -> None:
        if step == at and important == of_evaluation:
            raise Crash

    recipe = recipe_in(tmp_path / "run")
    with pytest.raises(Crash):
        run_of(recipe, report=report)
    broken = Run.open(tmp_path / "run")
    assert [m["progress/step"] for m in metrics(broken)] == logged
    assert [e["step"] for e in evaluations(broken)] == ([0, 2] if of_evaluation else [0])
    with (broken.path / "metrics.jsonl").open("a") as file:
        file.write('{"progress/step": 3, "evolve/lo')  # and the power went out within a line
    assert_same(run_of(recipe), whole)


def test_a_crash_before_the_first_checkpoint_starts_over(whole, tmp_path):
    def report(step: int, text: str, *, important: bool = False) -> None:
        raise Crash

    recipe = recipe_in(tmp_path / "run")
    with pytest.raises(Crash):
        run_of(recipe, report=report)
    assert evaluations(Run.open(tmp_path / "run"))
    assert_same(run_of(recipe), whole)


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def change_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, change_a_byte])
def test_a_broken_checkpoint_is_passed_over(damage, whole, stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step_0003"
    damage(last)
    assert check_manifest(last) is not None
    run = run_of(recipe_in(tmp_path / "run"))
    message = capsys.readouterr().err
    assert f"checkpoint {last} is broken (" in message
    assert "using the one before it" in message
    assert_same(run, whole)


def test_sigterm_stops_the_run_at_the_next_border(whole, tmp_path):
    def report(step: int, text: str, *, important: bool = False) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # within the step

    recipe = recipe_in(tmp_path / "run")
    with stop_at_step_border() as flag, pytest.raises(Interrupted, match="stopped after step 3 of 4"):
        run_of(recipe, report=report, stop=lambda: bool(flag))
    assert flag.signal == "SIGTERM"
    assert Run.open(tmp_path / "run").checkpoint_folders()[-1].name == "step_0003"
    assert_same(run_of(recipe), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number, capsys):
    handler = signal.getsignal(number)
    with stop_at_step_border() as flag:
        assert not flag
        os.kill(os.getpid(), number)
        assert flag
        assert flag.signal == signal.Signals(number).name
    assert signal.getsignal(number) == handler
    said = f"{signal.Signals(number).name}: finishing this step, then stopping"
    assert said in capsys.readouterr().err


def test_a_second_interrupt_stops_at_once():
    with stop_at_step_border() as flag:
        os.kill(os.getpid(), signal.SIGINT)
        assert flag
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_resume_continues_by_the_recipe_in_the_directory_and_leaves_a_complete_run_alone(whole, stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    assert resume(folder) == folder
    run = Run.open(folder)
    assert_same(run, whole)
    assert run.complete
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    resume(folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_population_that_imitates_resumes_with_every_seats_adapter(tmp_path):
    game = ("scenarios.testbed=collusion", "scenarios.families=[bay_fishers,taxi_rank]", "scenarios.collusion.n=3")
    rules = ("scenarios.collusion.threshold=2", "evolve.learner=imitation", "evolve.group_size=2")
    model = ("model.name=tiny", "evolve.start_from=base", "evolve.max_new_tokens=16")  # which can play

    def population(folder: Path) -> Recipe:
        return small_recipe(folder, *game, *rules, *model, steps=4)

    undisturbed = run_of(population(tmp_path / "undisturbed"))
    with pytest.raises(Interrupted, match="stopped after step 3 of 4"):
        run_of(population(tmp_path / "stopped"), stop=stop_before(4))
    resumed = run_of(population(tmp_path / "stopped"))
    assert_same(resumed, undisturbed)
    last = checkpoint_files(resumed, 4)
    adapters = [last[f"seat_{i}/adapter_model.safetensors"] for i in (1, 2, 3)]
    assert len(set(adapters)) == 3
    assert "adapter_model.safetensors" not in last
    assert any(m["evolve/imitation_loss"] > 0 for m in metrics(resumed))
