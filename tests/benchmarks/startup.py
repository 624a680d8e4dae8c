"""How long a person waits for `atp --help`, in fresh processes with warm files."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from tests.benchmarks.timing import Report, row

HELP = ("-m", "atp_rl", "--help")
REPEATS = 5


def measure(report: Report) -> list[dict[str, Any]]:
    ways = {
        "python that does nothing": ("-c", "pass"),
        "atp --help": HELP,
        "import torch, transformers, peft": ("-c", "import torch, transformers, peft"),
    }
    rows = []
    for way, arguments in ways.items():
        report(f"start-up: {way}")
        rows.append(row("start-up", way, [process_seconds(*arguments) for _ in range(REPEATS)]))
    imports = [import_seconds() for _ in range(REPEATS)]
    return [*rows, row("start-up", "imports of atp --help (-X importtime)", imports)]


def process_seconds(*arguments: str) -> float:
    """From the start of a Python to its end."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return time.perf_counter() - begun


def import_seconds() -> float:
    """What `-X importtime` says that importing `atp_rl.cli` and everything below it took."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", *HELP], capture_output=True, text=True, check=True
    ).stderr
    (line,) = [line for line in told.splitlines() if line.split("|")[-1].strip() == "atp_rl.cli"]
    return int(line.split("|")[1]) / 1e6
