"""`--launch`: a stage after the other under `accelerate launch`, signals passed on, bad files refused at once."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from atp_rl import launch
from atp_rl.recipe import load
from atp_rl.types import InputError
from tests.command_line import ROLE_PLAY, atp, start
from tests.invariants.test_processes import evolution

LAUNCH = Path(__file__).parents[1] / "launch" / "accelerate"
ONE_CPU = """
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
num_machines: 1
num_processes: 1
use_cpu: true
mixed_precision: 'no'
"""


@pytest.fixture
def one_cpu(tmp_path) -> Path:
    (tmp_path / "one.yaml").write_text(ONE_CPU)
    return tmp_path / "one.yaml"


def recipe(*overrides: str):
    return load(["evolve.steps=1", "evolve.learner=policy_gradient", "evolve.start_from=base", *overrides])


def test_every_stage_is_launched_and_the_run_is_the_same_as_without(one_cpu, tmp_path):
    small = ["align={method: dpo, per_family: 4, trl: {max_steps: 2, per_device_train_batch_size: 4}}"]
    small += ["evolve.start_from=aligned", "evolve.steps=1", "evolve.scenarios_per_step=2"]
    arguments = ["run", *evolution(*small)[1:]]
    output, _ = atp(*arguments, "run.dir=launched", "--launch", one_cpu, cwd=tmp_path)
    assert "DPOTrainer 2/2" in output
    atp(*arguments, "run.dir=plain", cwd=tmp_path)
    file = "checkpoints/step_0001/adapter_model.safetensors"
    assert (tmp_path / "launched" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert json.loads((tmp_path / "launched" / "summary.json").read_text())["complete"] is True


def test_a_signal_reaches_the_stage_and_the_run_can_go_on(one_cpu, tmp_path):
    process = start(
        *evolution("evolve.steps=60", "evaluate.every=60", "run.dir=run"), "--launch", one_cpu, cwd=tmp_path
    )
    run = tmp_path / "run"
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 75, errors
    assert "atp: stopped after step" in errors
    reached = len((run / "metrics.jsonl").read_text().splitlines())
    assert 0 < reached < 60
    assert (run / "checkpoints" / f"step_{reached:04d}" / "manifest.json").exists()
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("steps: 60", f"steps: {reached + 1}"))
    atp("resume", run, "--launch", one_cpu, cwd=tmp_path)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == reached + 1


def test_a_stage_that_fails_says_so_and_keeps_its_exit_code(one_cpu, tmp_path, monkeypatch, capfd):
    run = launch.Run.create(tmp_path / "run", "nonsense: 1")
    (tmp_path / "run" / "interrupted").write_text("an earlier stop")  # which is no news
    monkeypatch.setattr(launch.pipeline, "start", lambda _: (run, None))
    with pytest.raises(SystemExit) as ended:
        launch.run(recipe(), one_cpu)
    assert ended.value.code not in (0, None)
    errors = capfd.readouterr().err
    assert "unknown key `nonsense`" in errors
    assert "the stage evolve of" in errors


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp.yaml", (8, "ddp")),
        ("fsdp2.yaml", (8, "fsdp2")),
        ("zero2.yaml", (8, "zero2")),
        ("single_gpu.yaml", (1, "none")),
    ],
)
def test_what_the_shipped_files_promise(name, expected, monkeypatch):
    monkeypatch.chdir(LAUNCH.parents[1])
    assert launch.promise(LAUNCH / name, recipe()) == expected


def test_sharded_optimizers_of_deepspeeds_third_stage_are_for_alignment_alone(monkeypatch):
    monkeypatch.chdir(LAUNCH.parents[1])
    with pytest.raises(InputError, match=r"ZeRO-3 does not allow; use launch/accelerate/fsdp2\.yaml"):
        launch.promise(LAUNCH / "zero3.yaml", recipe())
    assert launch.promise(LAUNCH / "zero3.yaml", load(["align.method=dpo"])) == (8, "zero3")


@pytest.mark.parametrize(
    ("gpus", "expected"), [(0, "0 GPUs are visible; on CPUs use launch/cpu_2proc.sh"), (4, "4 GPUs .*make them equal")]
)
def test_more_processes_than_gpus_are_refused(gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=f"`num_processes` is 8, but {expected}"):
        launch._check_gpus(LAUNCH / "ddp.yaml")


@pytest.mark.parametrize("content", ["just text", "[1, 2]", "num_processes: many\ndistributed_type: MULTI_GPU", None])
def test_a_file_that_is_no_launch_file_is_refused_before_anything_is_made(content, tmp_path):
    file = tmp_path / "launch.yaml"
    if content is not None:
        file.write_text(content)
    _, errors = atp(*evolution("run.dir=run"), "--launch", file, cwd=tmp_path, expect=2)
    assert f"atp: --launch {file}: not a configuration of `accelerate launch`" in errors
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_processes_of_the_launch_file(tmp_path):
    def update(*options: str) -> float:
        output, _ = atp("run", ROLE_PLAY, "track.wandb=disabled", "--dry-run", *options, cwd=tmp_path)
        (line,) = [line for line in output.splitlines() if line.startswith("activations")]
        return float(line.split()[-1])

    assert update("--launch", str(LAUNCH / "fsdp2.yaml")) == pytest.approx(update() / 8, abs=0.01)
