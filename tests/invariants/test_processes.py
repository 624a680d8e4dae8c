"""Two processes do what one does: torchrun and `accelerate launch` on the real command line, with gloo on the CPU."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import small_model
from tests.small_model import reproducible

STEPS = 3
ONE = [sys.executable, "-m", "atp_rl"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "atp_rl"]


def evolution(*overrides: str) -> list[str]:
    """Five groups a step: three for one rank and two for the other."""
    return [
        "evolve",
        f"model.name={small_model.base()}",
        f"evolve.start_from={small_model.aligned()}",
        "model.lora.r=2",
        "model.lora.alpha=4",
        "scenarios.families=[ferry_pilot,archivist]",
        "scenarios.per_family=4",
        "scenarios.rounds=2",
        "scenarios.history_window=0",
        "scenarios.supervision.probability=0.2",
        f"evolve.steps={STEPS}",
        "evolve.scenarios_per_step=5",
        "evolve.group_size=4",
        "evolve.updates_per_step=2",
        "evolve.learning_rate=1e-2",
        "evolve.max_new_tokens=10",
        "evaluate.every=1",
        "evaluate.per_family=2",
        "track.wandb=disabled",
        "defenses=[{name: kl_anchor, beta: 0.3}, {name: gate, max_rate: 0.6, alpha: 0.4}]",
        *overrides,
    ]


def start(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    loopback = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | loopback | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(process: subprocess.Popen[str], *, expect: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == expect, f"exit code {process.returncode}, expected {expect}\n{output}\n{errors}"
    return output, errors


def metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [reproducible(json.loads(line)) for line in (run / name).read_text().splitlines()]


def adapters(run: Path) -> dict[str, Any]:
    files = sorted(run.glob("checkpoints/*/**/adapter_model.safetensors"))
    return {str(file.relative_to(run)): load_file(file) for file in files}


def episodes(run: Path) -> dict[str, str]:
    return {file.name: gzip.decompress(file.read_bytes()).decode() for file in sorted(run.glob("episodes/*"))}


def assert_alike(run: Path, other: Path) -> None:
    """The same episodes to the last byte; the same adapters and metrics but for the order in which sums are taken."""
    assert episodes(run) == episodes(other)
    ours, theirs = adapters(run), adapters(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= STEPS + 1
    for name in ours:
        for key, tensor in ours[name].items():
            assert (tensor - theirs[name][key]).abs().max().item() < 1e-6, (name, key)
    counts = {"perf/ranks", "defense/kl_anchor/forwards", "defense/kl_anchor/tokens"}  # of both together
    for mine, other_line in zip(metrics(run), metrics(other), strict=True):
        assert mine.keys() == other_line.keys()
        for key in mine.keys() - counts:
            if isinstance(mine[key], float):
                assert mine[key] == pytest.approx(other_line[key], rel=1e-5, abs=2e-6), key
            else:
                assert mine[key] == other_line[key], key


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    done(start([*ONE, *evolution("run.dir=run")], folder))
    return folder / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    output, _ = done(start([*TWO, *evolution("run.dir=run")], folder))
    assert output.count(f"{STEPS}/{STEPS}") == 2  # one of them speaks: the last step, and its evaluation
    return folder / "run"


def test_one_and_two_processes_play_the_same_episodes_and_make_the_same_adapters(one, two):
    assert [line["perf/ranks"] for line in metrics(one)] == [1] * STEPS
    assert [line["perf/ranks"] for line in metrics(two)] == [2] * STEPS
    assert_alike(one, two)
    start_of, end = (adapters(one)[f"checkpoints/step_000{s}/adapter_model.safetensors"] for s in (0, STEPS))
    assert max((start_of[key] - end[key]).abs().max().item() for key in end) > 1e-3  # so that 1e-6 says something


def test_base_weights_in_shards_change_nothing(one, tmp_path):
    """FSDP2 on the CPU. That the weights are sharded is asserted where it is done, in `shards.shard`."""
    done(start([*TWO, *evolution("run.dir=run")], tmp_path, {"ACCELERATE_USE_FSDP": "true"}))
    assert_alike(one, tmp_path / "run")


def test_a_population_that_imitates_is_the_same_in_two_processes(tmp_path):
    collusion = [
        "scenarios.testbed=collusion",
        "scenarios.families=null",
        "scenarios.per_family=1",
        "scenarios.supervision=all_unsupervised",
        "scenarios.collusion={n: 3, threshold: 2}",
        "evolve.learner=imitation",
        "evolve.scenarios_per_step=3",
        "evolve.group_size=2",
        "evolve.updates_per_step=1",
        "evolve.max_new_tokens=6",
        "evaluate.per_family=1",
        "defenses=[]",
    ]
    done(start([*ONE, *evolution(*collusion, "run.dir=one")], tmp_path))
    done(start([*TWO, *evolution(*collusion, "run.dir=two")], tmp_path))
    assert_alike(tmp_path / "one", tmp_path / "two")
    assert len(adapters(tmp_path / "two")) == 3 * (STEPS + 1)  # an adapter a seat


def test_two_processes_stop_together_and_resume_to_the_last_bit(two, tmp_path):
    more = f"evolve.steps={STEPS}"
    process = start([*TWO, *evolution("run.dir=run", more)], tmp_path, {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"})
    written = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not written.exists() or written.read_text().count("\n") < 1:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)  # to torchrun, which tells its children
    process.communicate(timeout=200)
    assert process.returncode != 0
    assert (tmp_path / "run" / "interrupted").read_text().startswith("stopped after step")
    assert not (tmp_path / "run" / "summary.json").exists()
    copy = shutil.copytree(tmp_path / "run", tmp_path / "by_one")
    done(start([*TWO, "resume", "run"], tmp_path))
    assert not (tmp_path / "run" / "interrupted").exists()
    assert metrics(tmp_path / "run") == metrics(two)
    assert episodes(tmp_path / "run") == episodes(two)
    file = f"checkpoints/step_{STEPS:04d}/adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (two / file).read_bytes()
    output, _ = done(start([*ONE, "resume", str(copy)], tmp_path))
    assert "2 process(es) until here, 1 from here: the same run but for rounding" in output
    assert_alike(copy, two)


def test_align_evolve_and_evaluate_in_two_processes(tmp_path):
    recipe = str(Path(__file__).parents[2] / "recipes" / "tiny" / "role_play.yaml")
    small = ["align.per_family=2", "align.trl.max_steps=3", "scenarios.per_family=2", "evolve.steps=1"]
    small += ["evolve.scenarios_per_step=4", "evolve.group_size=2", "evaluate.per_family=1", "track.wandb=disabled"]
    output, _ = done(start([*TWO, "run", recipe, *small, "run.dir=run"], tmp_path))
    run = tmp_path / "run"
    assert output.count("36 pairs of 36 prompts") == 1
    assert json.loads((run / "aligned" / "metrics.json").read_text())["steps"] == 3
    assert [line["perf/ranks"] for line in metrics(run)] == [2]
    done(start([*TWO, "evaluate", "run", "--checkpoint", "1"], tmp_path))
    done(start([*ONE, "evaluate", "run", "--checkpoint", "1"], tmp_path))
    by_two, by_one = (reproducible(line) for line in metrics(run, "reevaluations.jsonl"))
    first, second = by_two.pop("splits"), by_one.pop("splits")
    assert by_two == by_one
    for split in ("held_out", "held_in"):
        for exact in ("violation", "compliance", "invalid", "payoff_mean", "by_family"):
            assert first[split][exact] == second[split][exact]
        assert first[split]["propensity"] == pytest.approx(second[split]["propensity"], abs=1e-5)
    assert first["held_out"]["kl_to_aligned"] == pytest.approx(second["held_out"]["kl_to_aligned"], abs=1e-5)


def test_alignment_that_is_not_spread_as_asked_is_noticed(tmp_path):
    """On a CPU Accelerate forgets about FSDP and wraps the model in plain DDP, without a word."""
    dpo = "align={method: dpo, per_family: 4, trl: {max_steps: 2, per_device_train_batch_size: 4}}"
    arguments = ["run", *evolution(dpo, "evolve.start_from=aligned", "run.dir=run")[1:]]
    _, errors = done(start([*TWO, *arguments], tmp_path, {"ACCELERATE_USE_FSDP": "true"}), expect=1)
    assert "alignment was launched with fsdp2, but the model is a DistributedDataParallel and no FSDPModule" in errors
    assert not (tmp_path / "run" / "aligned").exists()


BREAKS = """
import os
from atp_rl.evolve import loop
draw = loop.draw

def broken(*arguments):
    if os.environ["RANK"] == "1" and arguments[-1] == 2:
        raise RuntimeError("the disk of rank 1 is gone")
    return draw(*arguments)

loop.draw = broken
from atp_rl.cli import main
main()
"""


def test_a_rank_that_fails_ends_all_of_them_with_its_message(tmp_path):
    (tmp_path / "breaks.py").write_text(BREAKS)
    launcher = [*TWO[:-2], "breaks.py"]
    begun = time.monotonic()
    _, errors = done(start([*launcher, *evolution("run.dir=run")], tmp_path), expect=1)
    assert "RuntimeError: the disk of rank 1 is gone" in errors
    assert "rank      : 1" in errors  # torchrun's account of the root cause
    assert time.monotonic() - begun < 150
    assert [line["progress/step"] for line in metrics(tmp_path / "run")] == [1]


def test_bad_input_ends_all_of_them(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    _, errors = done(start([*TWO, *evolution("run.dir=run")], tmp_path), expect=1)
    assert "atp: run.dir run: is not an empty directory" in errors
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine.txt"]


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def test_accelerate_launch_of_one_process(one, tmp_path):
    launcher = [*ACCELERATE, "--cpu", "--num_processes", "1", "-m", "atp_rl"]
    done(start([*launcher, *evolution("run.dir=run")], tmp_path))
    assert_alike(one, tmp_path / "run")


def test_accelerate_that_starts_one_process_instead_of_two_is_noticed(tmp_path):
    launcher = [*ACCELERATE, "--cpu", "--num_processes", "2", "-m", "atp_rl"]
    process = start([*launcher, *evolution("run.dir=run")], tmp_path)
    _, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "accelerate was asked for several processes and started one; on CPUs use torchrun" in errors
    assert not (tmp_path / "run").exists()
