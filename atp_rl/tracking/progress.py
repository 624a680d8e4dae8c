"""How far a stage has come: a bar on a terminal, and otherwise plain lines that a log can keep."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from atp_rl import ranks

LINE_SECONDS = 10.0
"""Shortest time between two plain lines, important ones aside."""


class Report(Protocol):
    def __call__(self, step: int, text: str, *, important: bool = False) -> None:
        """Say what `step` brought; important news (an evaluation) always gets a line of its own."""
        ...


def silent(step: int, text: str, *, important: bool = False) -> None:
    """A report that says nothing."""


@contextmanager
def progress(total: int, label: str) -> Iterator[Report]:
    """Follow `total` steps; a resumed run simply reports its later steps.

    Example: `with progress(100, "evolve") as report: report(step, "violation 0.25")`.
    """
    if not ranks.is_first():
        yield silent
        return
    console = Console()
    left = _TimeLeft(total)
    if console.is_interactive and sys.stdout.isatty() and not os.environ.get("CI"):
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}", markup=False),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total, news="")

            def report(step: int, text: str, *, important: bool = False) -> None:
                bar.update(task, completed=step, news=f"{left.after(step)}  {text}")
                if important:
                    console.print(f"{label} {step}/{total}  {text}", markup=False, highlight=False, soft_wrap=True)

            yield report
    else:
        printed = -LINE_SECONDS

        def report(step: int, text: str, *, important: bool = False) -> None:
            nonlocal printed
            time_left, now = left.after(step), monotonic()
            if important or step == total or now - printed >= LINE_SECONDS:
                printed = now
                print(f"{label} {step}/{total}  {time_left}  {text}", flush=True)

        yield report


class _TimeLeft:
    """The time that remains, at the pace since the first report: what came before it was another process."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> str:
        now = monotonic()
        first, began = self._first = self._first or (step, now)
        seconds = (now - began) / (step - first) * (self._total - step) if step > first else None
        return "ETA ?" if seconds is None else f"ETA {timedelta(seconds=round(seconds))}"
