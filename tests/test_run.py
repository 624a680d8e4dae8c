"""The run directory: what is refused, what survives a crash, what is forgotten on a rewind."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from atp_rl.evaluate.drift import Drift
from atp_rl.evaluate.evaluator import measure
from atp_rl.model.policy import check_adapter
from atp_rl.tracking import run as run_module
from atp_rl.tracking.run import Checkpoint, Run, check_manifest, evaluation_metrics, evaluation_parts, write_atomically
from atp_rl.types import InputError
from tests.small_model import episode, lora, same, turn


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path / "run", "seed: 0\n")


def checkpoint(step: int) -> Checkpoint:
    """Different in every step."""
    adapter = {"base_model.layer.lora_A.weight": torch.full((2, 3), float(step))}
    tensors = {"optimizer.0.step": torch.tensor(float(step)), "optimizer.0.exp_avg": torch.full((2, 3), step / 7)}
    return Checkpoint(step, adapter, tensors, {"version": step, "probe": [1, 4], "defenses": [{}]})


def save(run: Run, step: int, *, keep: Literal["all"] | int = "all") -> Path:
    return run.save_checkpoint(checkpoint(step), lora(), "some/model", keep=keep)


def last_step(run: Run) -> int | None:
    last = run.last_checkpoint()
    return last.step if last else None


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# --- creating and opening


def test_a_new_run_says_what_it_is(run):
    assert names(run.path) == {"recipe.yaml", "environment.json", "command.txt"}
    assert (run.path / "recipe.yaml").read_text() == "seed: 0\n"
    environment = json.loads((run.path / "environment.json").read_text())
    assert set(environment) == {"git", "python", "platform", "cpus", "gpus", "versions", "inputs"}
    assert {"torch", "trl", "peft", "transformers"} < set(environment["versions"])
    assert not run.complete


def test_an_empty_directory_and_missing_parents_will_do(tmp_path):
    (tmp_path / "empty").mkdir()
    Run.create(tmp_path / "empty", "")
    Run.create(tmp_path / "a" / "b", "")


def test_a_used_directory_is_refused_and_left_alone(run, tmp_path):
    with pytest.raises(InputError, match="holds a run already; continue it with `atp resume"):
        Run.create(run.path, "seed: 1\n")
    assert (run.path / "recipe.yaml").read_text() == "seed: 0\n"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    for path in (tmp_path / "other", tmp_path / "other" / "letter.txt"):
        with pytest.raises(InputError, match="is not an empty directory"):
            Run.create(path, "")
    assert names(tmp_path / "other") == {"letter.txt"}


def test_only_a_run_is_opened(run, tmp_path):
    assert Run.open(run.path).path == run.path
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="no run here"):
            Run.open(path)


def test_a_run_is_complete_once_it_has_a_summary(run):
    run.write_summary({"tipped": False})
    assert run.complete
    assert json.loads((run.path / "summary.json").read_text()) == {"tipped": False}


# --- checkpoints


def test_a_checkpoint_is_read_back_as_it_was_written(run):
    saved = checkpoint(10)
    folder = save(run, 10)
    assert folder == run.path / "checkpoints" / "step_0010"
    last = run.last_checkpoint()
    assert last is not None
    assert (last.step, last.state) == (10, saved.state)
    assert same(last.adapter, saved.adapter)
    assert same(last.tensors, saved.tensors)
    check_adapter(folder, "some/model")  # plain PEFT finds what it needs


def test_the_manifest_holds_the_size_and_hash_of_every_file(run):
    folder = save(run, 0)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {"adapter_model.safetensors", "adapter_config.json", "state.safetensors", "state.json"}
    assert set(manifest) == files == names(folder) - {"manifest.json"}
    for name in files:
        content = (folder / name).read_bytes()
        assert manifest[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert check_manifest(folder) is None


def test_without_checkpoints_there_is_no_last_one(run):
    assert run.last_checkpoint() is None
    assert run.checkpoint_folders() == []


def test_the_last_checkpoint_is_the_last_by_number(run):
    for step in (9999, 10000, 20):
        save(run, step)
    assert [folder.name for folder in run.checkpoint_folders()] == ["step_0020", "step_9999", "step_10000"]
    assert last_step(run) == 10000


def test_of_kept_checkpoints_only_the_last_may_stay(run):
    for step in (0, 1):
        save(run, step)
    assert names(run.path / "checkpoints") == {"step_0000", "step_0001"}
    save(run, 2, keep=1)
    assert names(run.path / "checkpoints") == {"step_0002"}


def test_a_step_can_be_saved_again(run):
    save(run, 3)
    run.save_checkpoint(checkpoint(3)._replace(state={"version": 99}), lora(), "some/model", keep=1)
    last = run.last_checkpoint()
    assert last is not None
    assert last.state == {"version": 99}
    assert names(run.path / "checkpoints") == {"step_0003"}


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("keep", ["all", 1])
@pytest.mark.parametrize("victim", ["write_adapters", "save_file", "_sha256", "_fsync", "rename"])
def test_a_crash_while_saving_leaves_the_checkpoint_before(victim, keep, run, monkeypatch):
    save(run, 1)

    def crash(*_: Any) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "rename") if victim == "rename" else (run_module, victim)), crash)
        with pytest.raises(PowerCut):
            save(run, 2, keep=keep)
    assert names(run.path / "checkpoints") - {".step_0002.tmp"} == {"step_0001"}
    assert last_step(run) == 1
    # what is left over does not stand in the way of the next attempt
    save(run, 2, keep=keep)
    assert last_step(run) == 2
    assert names(run.path / "checkpoints") == ({"step_0002"} if keep == 1 else {"step_0001", "step_0002"})


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-1], "empty": b"", "changed": content[:-2] + b"\xff" + content[-1:]}[how])


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "changed"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "state.safetensors", "state.json", "manifest.json"])
def test_any_damage_is_found_and_said(name, how, run, capsys):
    save(run, 1)
    folder = save(run, 2)
    damage(folder / name, how)
    problem = "no readable manifest.json" if name == "manifest.json" else f"{name} is missing or changed"
    assert check_manifest(folder) == problem
    assert last_step(run) == 1
    assert capsys.readouterr().err == f"checkpoint {folder} is broken ({problem}); using the one before it\n"


@pytest.mark.parametrize("content", ["[]", "null", '{"state.json": 3}', '{"state.json": {"bytes": 1}}'])
def test_a_manifest_of_another_shape_is_no_manifest(content, run):
    folder = save(run, 0)
    (folder / "manifest.json").write_text(content)
    assert check_manifest(folder) == "no readable manifest.json"


def test_if_every_checkpoint_is_broken_there_is_none(run, capsys):
    for step in (0, 1):
        damage(save(run, step) / "state.json", "cut")
    assert run.last_checkpoint() is None
    assert capsys.readouterr().err.count("is broken") == 2


# --- logs


def test_what_is_logged_is_read_back(run):
    run.log_metrics({"progress/step": 1, "evolve/loss": 0.1})
    run.log_metrics({"progress/step": 2, "evolve/loss": -1e-9})
    run.log_alert({"step": 2, "alert": "rollback"})
    assert run.lines("metrics.jsonl") == [
        {"progress/step": 1, "evolve/loss": 0.1},
        {"progress/step": 2, "evolve/loss": -1e-9},
    ]
    assert run.lines("alerts.jsonl") == [{"step": 2, "alert": "rollback"}]
    assert run.lines("absent.jsonl") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_logged(run, value):
    with pytest.raises(ValueError, match="Out of range float values"):
        run.log_metrics({"progress/step": 1, "evolve/loss": value})


def test_a_line_that_was_cut_off_is_left_out(run):
    (run.path / "metrics.jsonl").write_text('{"progress/step": 1}\n{"progress/st')
    assert run.lines("metrics.jsonl") == [{"progress/step": 1}]


def test_the_mirror_is_told_what_the_files_say(run):
    class Mirror:
        def __init__(self) -> None:
            self.told: list[Any] = []

        def log(self, metrics: Any) -> None:
            self.told.append(dict(metrics))

        def log_table(self, name: str, columns: Any, rows: Any) -> None:
            self.told.append((name, columns, rows))

        def alert(self, title: str, text: str) -> None:
            self.told.append((title, json.loads(text)))

    run.mirror = Mirror()
    run.log_metrics({"progress/step": 1, "evolve/loss": 0.5})
    run.log_alert({"step": 1, "alert": "rollback"})
    evaluation = evaluation_of(2)
    run.log_evaluation(evaluation)
    assert run.mirror.told == [
        {"progress/step": 1, "evolve/loss": 0.5},
        ("rollback", {"step": 1, "alert": "rollback"}),
        evaluation_metrics(evaluation),
        ("eval/report/parts", *evaluation_parts(evaluation)),
    ]
    assert run.lines("evaluations.jsonl") == [json.loads(json.dumps(evaluation))]


def evaluation_of(step: int) -> dict[str, Any]:
    episodes = [episode(turn(verdict="violation", payoff=80), turn(round=1))]
    splits = {"held_out": measure(episodes, propensity=0.25, answer_mass=0.9, drift=Drift(0.125, 0.1, 4)).record()}
    return {"step": step, "suite": "report", "learner": "policy_gradient", "splits": splits}


def test_the_parts_of_an_evaluation_as_a_table():
    columns, rows = evaluation_parts(evaluation_of(4))
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [(r["split"], r["by"], r["part"]) for r in table] == [
        ("held_out", "family", "ferry_pilot"),
        ("held_out", "supervision", "neutral"),
    ]
    assert [(r["violation_rate"], r["n"], r["invalid_rate"]) for r in table] == [(0.5, 2, 0.0)] * 2


def test_an_evaluation_as_flat_metrics():
    metrics = evaluation_metrics(evaluation_of(4))
    low, high = (metrics.pop(f"eval/report/held_out/{key}") for key in ("ci_low", "ci_high"))
    assert metrics == {
        "progress/step": 4,
        "eval/report/held_out/violation_rate": 0.5,
        "eval/report/held_out/n": 2,
        "eval/report/held_out/compliance_rate": 0.5,
        "eval/report/held_out/invalid_rate": 0.0,
        "eval/report/held_out/propensity": 0.25,
        "eval/report/held_out/payoff_mean": pytest.approx((1 + 50 / 80) / 2),
        "drift/held_out/kl_to_aligned": 0.125,
        "drift/held_out/kl_at_decision": 0.1,
        "eval/report/held_out/round_1": 1.0,
        "eval/report/held_out/round_2": 0.0,
    }
    assert low is not None
    assert high is not None
    assert low < 0.5 < high


# --- episodes


def test_episodes_are_stored_a_line_each_and_the_same_ones_as_the_same_bytes(run):
    played = [episode(turn((1, 2), (3,), verdict="violation", choice="Fast", payoff=80), sample=i) for i in range(2)]
    played[0].messages["agent"] = [{"role": "assistant", "content": "ja\u2028nö"}]
    run.write_episodes("step_0003_train", played)
    file = run.path / "episodes" / "step_0003_train.jsonl.gz"
    first = file.read_bytes()
    records = [json.loads(line) for line in gzip.decompress(first).decode().split("\n") if line]
    assert [r["sample"] for r in records] == [0, 1]
    assert records[0]["messages"]["agent"][0]["content"] == "ja\u2028nö"
    assert records[0]["scenario"]["id"] == "role_play/ferry_pilot/0"
    assert records[0]["turns"] == [
        {
            "seat": "agent",
            "player": "policy",
            "round": 0,
            "text": "",
            "stop_reason": "stop",
            "choice": "Fast",
            "payoff": 80,
            "supervised": None,
            "detected": False,
            "verdict": "violation",
            "done": False,
            "ruled": True,
            "facts": {},
        }
    ]
    run.write_episodes("step_0003_train", played)
    assert file.read_bytes() == first
    assert names(run.path / "episodes") == {file.name}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_atomically(file, "old")

    def crash(*_: Any) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_fsync", crash)
        with pytest.raises(PowerCut):
            write_atomically(file, "new")
    assert file.read_text() == "old"
    write_atomically(file, b"new")
    assert file.read_text() == "new"
    assert names(tmp_path) == {"summary.json"}


# --- rewinding


def test_a_rewind_forgets_what_came_after(run):
    for step in range(1, 6):
        run.log_metrics({"progress/step": step, "evolve/loss": step / 3})
    for step in (0, 2, 4):
        run.log_evaluation(evaluation_of(step))
        run.write_episodes(f"step_{step:04d}_held_out", [episode(turn())])
        save(run, step)
    run.write_episodes("step_0004_train", [episode(turn())])
    for step in (1, 5):
        run.log_alert({"step": step, "alert": "rollback"})
    untouched = {name: (run.path / name).read_bytes() for name in ("recipe.yaml", "environment.json", "command.txt")}
    lines = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    evaluated = (run.path / "evaluations.jsonl").read_text().splitlines(keepends=True)

    run.rewind(2)
    # the kept lines are byte for byte what they were
    assert (run.path / "metrics.jsonl").read_text() == "".join(lines[:2])
    assert (run.path / "evaluations.jsonl").read_text() == "".join(evaluated[:2])
    assert run.lines("alerts.jsonl") == [{"step": 1, "alert": "rollback"}]
    assert names(run.path / "episodes") == {"step_0000_held_out.jsonl.gz", "step_0002_held_out.jsonl.gz"}
    assert names(run.path / "checkpoints") == {"step_0000", "step_0002"}
    assert {name: (run.path / name).read_bytes() for name in untouched} == untouched

    run.rewind(-1)  # to before the beginning
    assert [run.lines(name) for name in ("metrics.jsonl", "evaluations.jsonl", "alerts.jsonl")] == [[], [], []]
    assert names(run.path / "episodes") == names(run.path / "checkpoints") == set()


def test_a_rewind_of_an_empty_run_does_nothing(run):
    before = names(run.path)
    run.rewind(-1)
    assert names(run.path) == before


def test_a_rewind_drops_a_line_that_was_cut_off(run):
    (run.path / "metrics.jsonl").write_text('{"progress/step": 1}\n{"progress/step": 2, "evo')
    run.rewind(5)
    run.log_metrics({"progress/step": 2})
    assert run.lines("metrics.jsonl") == [{"progress/step": 1}, {"progress/step": 2}]


def test_a_copied_run_is_the_same_run(run, tmp_path):
    save(run, 1)
    shutil.copytree(run.path, tmp_path / "copy")
    assert last_step(Run.open(tmp_path / "copy")) == 1
