"""How long a person waits for `atp --help`, in fresh processes with warm files."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from tests.benchmarks.timing import Contest, Report, clocked, row

HELP = ("-m", "atp_rl", "--help")
REPEATS = 5


def measure(report: Report) -> list[dict[str, Any]]:
    ways = {
        "python that does nothing": clocked(lambda: _python("-c", "pass")),
        "atp --help": clocked(lambda: _python(*HELP)),
        "import torch, transformers, peft": clocked(lambda: _python("-c", "import torch, transformers, peft")),
    }
    contest = Contest("start-up", ways).run(REPEATS, report)
    imports = [import_seconds() for _ in range(REPEATS)]
    return [*contest.rows(), row("start-up", "imports of atp --help (importtime)", imports)]


def import_seconds() -> float:
    """What `-X importtime` says that importing `atp_rl.cli` and everything below it took."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", *HELP], capture_output=True, text=True, check=True
    ).stderr
    (line,) = [line for line in told.splitlines() if line.split("|")[-1].strip() == "atp_rl.cli"]
    return int(line.split("|")[1]) / 1e6


def _python(*arguments: str) -> dict[str, Any]:
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return {}
