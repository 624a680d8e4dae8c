"""Twenty kills at random moments, along three runs: each run resumes every time, and ends as if nothing had happened.

The first six are part of every test run (about a minute and a half on one core, most of it the starts of processes).
All twenty, each of them printed (three minutes of processor time):

    ATP_ALL_KILLS=1 pytest -s tests/faults/test_kills.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import small_model
from tests.faults.kills import Undisturbed, killed, results, undisturbed

ATP = [sys.executable, "-m", "atp_rl"]
STEPS = 24
ALL = pytest.mark.skipif(not os.environ.get("ATP_ALL_KILLS"), reason="long; ATP_ALL_KILLS=1 runs it")


def arguments(command: str, *overrides: str) -> list[str]:
    return [
        command,
        f"model.name={small_model.base()}",
        "model.lora.r=2",
        "model.lora.alpha=4",
        "scenarios.families=[ferry_pilot,archivist]",
        "scenarios.per_family=4",
        "scenarios.supervision.probability=0.2",
        f"evolve.steps={STEPS}",
        "evolve.scenarios_per_step=8",
        "evolve.learning_rate=1e-2",
        "evolve.max_new_tokens=10",
        "evaluate.every=1",
        "evaluate.per_family=2",
        "track.wandb=disabled",
        "defenses=[{name: kl_anchor, beta: 0.3}, {name: gate, max_rate: 0.6, alpha: 0.4}]",
        *overrides,
    ]


def evolution() -> list[str]:
    return arguments("evolve", f"evolve.start_from={small_model.aligned()}")


def whole_pipeline() -> list[str]:
    dpo = "align={method: dpo, per_family: 4, trl: {max_steps: 6, learning_rate: 1e-3, per_device_train_batch_size: 4}}"
    return arguments("run", dpo)


@pytest.fixture(scope="module")
def evolved(tmp_path_factory) -> tuple[Undisturbed, Path]:
    folder = tmp_path_factory.mktemp("evolved") / "run"
    return undisturbed(ATP, evolution(), folder), folder


@pytest.fixture(scope="module")
def aligned_and_evolved(tmp_path_factory) -> tuple[Undisturbed, Path]:
    folder = tmp_path_factory.mktemp("aligned_and_evolved") / "run"
    return undisturbed(ATP, whole_pipeline(), folder), folder


def assert_equal(run: Path, other: Path) -> None:
    """Bit for bit; says where they differ rather than how."""
    ours, theirs = results(run), results(other)
    assert [line["progress/step"] for line in ours["metrics.jsonl"]] == list(range(1, STEPS + 1))
    assert f"checkpoints/step_{STEPS:04d}/adapter_model.safetensors" in ours
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.parametrize(("seed", "kills"), [(1, 6), pytest.param(2, 8, marks=ALL)])
def test_an_evolution_that_is_killed_again_and_again_ends_as_if_it_were_not(seed, kills, evolved, tmp_path):
    like, whole = evolved
    done = killed(ATP, evolution(), tmp_path / "run", kills=kills, seed=seed, like=like)
    print("", *done, sep="\n")
    assert len(done) == kills
    assert_equal(tmp_path / "run", whole)


@ALL
def test_a_run_that_is_killed_six_times_in_alignment_and_evolution_ends_so_too(aligned_and_evolved, tmp_path):
    like, whole = aligned_and_evolved
    done = killed(ATP, whole_pipeline(), tmp_path / "run", kills=6, seed=3, like=like)
    print("", *done, sep="\n")
    assert len(done) == 6
    assert_equal(tmp_path / "run", whole)
