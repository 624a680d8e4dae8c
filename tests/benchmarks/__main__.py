"""Time the ways of playing and write a table and a JSON file.

OMP_NUM_THREADS sets the threads. Machines are shared, so compare minima and ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.rollouts import measure
from tests.benchmarks.seats import memory

PACKAGES = ("atp_rl", "torch", "transformers", "peft", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3, help="times that everything is run (default 3)")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("loading") as status:
        rows = measure(arguments.repeats, lambda text: status.update(text))
        status.update("memory of eight seats")
        used = memory()
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "repeats": arguments.repeats,
        "rows": rows,
        "memory": used,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    console.print(_table(record))
    for row in used:
        console.print(
            f"{row['what']}: {row['way']}: {row['megabytes']:,.0f} MB, {row['times_one_seat']:.2f} x one seat"
        )
    console.print(f"Times are minima (medians) of {arguments.repeats} repeats; wrote {arguments.out}")


def _table(record: dict[str, Any]) -> Table:
    machine = record["machine"]
    table = Table(title=f"{machine['processor']}, {machine['device']}, {record['threads']} thread(s)")
    table.add_column("work")
    table.add_column("way")
    for heading in ("decisions", "tokens", "seconds", "times faster"):
        table.add_column(heading, justify="right")
    before = None
    for row in record["rows"]:
        first = row["work"] != before
        before = row["work"]
        if first and table.rows:
            table.add_section()
        table.add_row(
            row["work"] if first else "",
            row["way"],
            str(row["decisions"]),
            str(row["tokens"]),
            f"{row['seconds_min']:.3f} ({row['seconds_median']:.3f})",
            f"{row['times_faster']:.1f}",
        )
    return table


def _processor() -> str:
    """The processor's own name where Linux tells it."""
    file = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
