"""Time the ways of playing and learning, and write a table and a JSON file.

OMP_NUM_THREADS sets the threads. Machines are shared, so compare minima and ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from tests.benchmarks.timing import Report

PACKAGES = ("atp_rl", "torch", "transformers", "peft", "trl", "numpy")
SECTIONS = ("rollouts", "step", "rounds", "seats", "propensity", "startup", "memory")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=3, help="times that everything is run (default 3)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="parts (default: all)")
    chosen = parser.parse_args(arguments)
    hush()
    console = Console(width=None if sys.stdout.isatty() else 120)
    record: dict[str, Any] = machine() | {"repeats": chosen.repeats, "rows": [], "growth": [], "memory": []}
    with console.status("loading") as status:
        for section in chosen.only:
            status.update(section)
            for part, found in run(section, chosen.repeats, lambda text: status.update(text)).items():
                record[part] += found
    chosen.out.write_text(json.dumps(record, indent=2) + "\n")
    if record["rows"]:
        console.print(_table(record))
    for fit in record["growth"]:
        console.print(
            f"time of {fit['way']} grows as {fit['of']}^{fit['exponent']:.2f} over {list(fit['sizes'])}; "
            f"in the last doubling ^{fit['last_doubling']:.2f}"
        )
    for row in record["memory"]:
        console.print(
            f"{row['what']}: {row['way']}: {row['megabytes']:,.0f} MB, {row['times_one_seat']:.2f} x one seat"
        )
    console.print(f"Times are minima (medians) of {chosen.repeats} repeats; wrote {chosen.out}")


def run(section: str, repeats: int, report: Report) -> dict[str, list[dict[str, Any]]]:
    """One part of the benchmarks: rows of the table, and what else it found. Each imports what it alone needs."""
    if section == "rollouts":
        from tests.benchmarks import rollouts

        return {"rows": rollouts.measure(repeats, report)}
    if section == "step":
        from tests.benchmarks import step

        return {"rows": step.measure(repeats, report)}
    if section in ("rounds", "seats"):
        from tests.benchmarks import growth

        measure = growth.measure_rounds if section == "rounds" else growth.measure_seats
        rows, fits = measure(repeats, report)
        return {"rows": rows, "growth": fits}
    if section == "propensity":
        from tests.benchmarks import propensity

        return {"rows": propensity.measure(repeats, report)}
    if section == "startup":
        from tests.benchmarks import startup

        return {"rows": startup.measure(report)}
    from tests.benchmarks import seats

    return {"memory": seats.memory()}


def hush() -> None:
    """Nothing of what libraries say about each other."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel that only 4-bit weights need


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


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
            str(row.get("decisions", "")),
            str(row.get("tokens", "")),
            f"{row['seconds_min']:.3f} ({row['seconds_median']:.3f})",
            f"{row['times_faster']:.1f}" if "times_faster" in row else "",
        )
    return table


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # the GPU benchmark needs neither TRL nor an installed atp_rl
        return None


def _processor() -> str:
    """The processor's own name where Linux tells it."""
    file = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
