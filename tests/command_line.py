"""Runs `atp` as a user does. Not a test itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import atp_rl

RECIPES = Path(atp_rl.__file__).parent.parent / "recipes"
ROLE_PLAY = str(RECIPES / "tiny" / "role_play.yaml")
SMALL = [
    "track.wandb=disabled",
    "align.per_family=2",
    "align.trl.max_steps=4",
    "scenarios.per_family=2",
    "evolve.steps=2",
    "evolve.scenarios_per_step=4",
    "evolve.group_size=2",
    "evaluate.every=1",
    "evaluate.per_family=1",
    "evaluate.gate_per_family=1",
]
"""Turns a tiny recipe into one of seconds."""


def start(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """`atp` in a process of its own, without a terminal."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "atp_rl", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def atp(*arguments: str | Path, cwd: Path, expect: int = 0) -> tuple[str, str]:
    """Run it to its end; its output and its errors."""
    process = start(*arguments, cwd=cwd)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit code {process.returncode}, expected {expect}\n{output}\n{errors}"
    return output, errors
