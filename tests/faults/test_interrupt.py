"""Ctrl-C and SIGTERM on the real command line: exit code 75, and the resumed run equals the uninterrupted one."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests import small_model
from tests.command_line import atp, start
from tests.small_model import reproducible

STEPS = 12


def evolution(folder: str) -> list[str]:
    return [
        "evolve",
        f"model.name={small_model.base()}",
        f"evolve.start_from={small_model.aligned()}",
        "model.lora.r=2",
        "model.lora.alpha=4",
        "scenarios.families=[ferry_pilot,archivist]",
        "scenarios.per_family=4",
        "scenarios.supervision.probability=0.2",
        f"evolve.steps={STEPS}",
        "evolve.scenarios_per_step=8",
        "evolve.max_new_tokens=10",
        "evaluate.every=4",
        "evaluate.per_family=2",
        "track.wandb=disabled",
        "defenses=[{name: kl_anchor, beta: 0.3}, {name: gate, max_rate: 0.6, alpha: 0.4}]",
        f"run.dir={folder}",
    ]


def lines(file: Path) -> list[dict]:
    import json

    return [reproducible(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    atp(*evolution("run"), cwd=folder)
    return folder / "run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_evolution_resumes_to_the_same_run(number, whole, tmp_path):
    process = start(*evolution("run"), cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 2:  # in the middle of its third step or so
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert f"{number.name}: finishing this step, then stopping" in errors
    assert "`atp resume run` continues" in errors
    assert not (tmp_path / "run" / "summary.json").exists()
    stopped = len(lines(metrics))
    assert 2 <= stopped < STEPS

    atp("resume", "run", cwd=tmp_path)
    run = tmp_path / "run"
    for name in ("metrics.jsonl", "evaluations.jsonl", "alerts.jsonl"):
        assert lines(run / name) == lines(whole / name)
    for folder in (whole / "checkpoints").iterdir():
        for file in folder.iterdir():
            assert (run / "checkpoints" / folder.name / file.name).read_bytes() == file.read_bytes()


def test_alignment_stops_at_a_step_and_begins_again(tmp_path):
    alignment = [
        "align",
        f"model.name={small_model.base()}",
        "model.lora.r=2",
        "model.lora.alpha=4",
        "scenarios.families=[ferry_pilot,archivist]",
        "align={method: dpo, per_family: 4, trl: {max_steps: 20, learning_rate: 1e-3}}",
        "track.wandb=disabled",
    ]
    atp(*alignment, "run.dir=whole", cwd=tmp_path)
    process = start(*alignment, "run.dir=run", cwd=tmp_path)
    pairs = tmp_path / "run" / ".aligned.tmp" / "pairs.jsonl"  # they are there when training begins
    deadline = time.monotonic() + 120
    while not pairs.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "stopped within alignment; `atp resume run` begins it again" in errors
    assert not (tmp_path / "run" / "aligned").exists()
    atp("resume", "run", cwd=tmp_path)
    name = "aligned/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "run").glob(".*"))


def test_a_run_that_is_killed_outright_resumes_too(whole, tmp_path):
    process = start(*evolution("run"), cwd=tmp_path)
    second = tmp_path / "run" / "checkpoints" / "step_0004"
    deadline = time.monotonic() + 120
    while not second.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=60)
    atp("resume", "run", cwd=tmp_path)
    last = f"checkpoints/step_{STEPS:04d}/adapter_model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (whole / last).read_bytes()
    assert lines(tmp_path / "run" / "metrics.jsonl") == lines(whole / "metrics.jsonl")
