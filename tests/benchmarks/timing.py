"""What every table is made of: ways of doing one work, timed in turn, against the first of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

Report = Callable[[str], None]
Seconds = float
Timed = Callable[[], tuple[Seconds, Mapping[str, Any]]]
"""Does the work once: the seconds that count, and what else is known of it (decisions, tokens, ...)."""


@dataclass
class Contest:
    """One work and the ways of doing it; the first is the reference."""

    work: str
    ways: Mapping[str, Timed]
    seconds: dict[str, list[Seconds]] = field(default_factory=dict)
    known: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """In the last repeat."""

    def run(self, repeats: int, report: Report) -> Contest:
        """Every way once per repeat, in turn, so that what else the machine does meets all of them."""
        for repeat in range(repeats):
            for way, timed in self.ways.items():
                report(f"repeat {repeat + 1} of {repeats}: {self.work}, {way}")
                seconds, self.known[way] = timed()
                self.seconds.setdefault(way, []).append(seconds)
        return self

    def rows(self) -> list[dict[str, Any]]:
        reference = min(next(iter(self.seconds.values())))
        return [
            row(self.work, way, seconds, times_faster=reference / min(seconds), **self.known[way])
            for way, seconds in self.seconds.items()
        ]


def row(work: str, way: str, seconds: Sequence[Seconds], **more: Any) -> dict[str, Any]:
    """A line of the table and of the JSON file."""
    return {
        "work": work,
        "way": way,
        "seconds_min": min(seconds),
        "seconds_median": median(seconds),
        "seconds": list(seconds),
        **more,
    }


def clocked(run: Callable[[], Mapping[str, Any]]) -> Timed:
    """The seconds of the whole call."""

    def timed() -> tuple[Seconds, Mapping[str, Any]]:
        begun = time.perf_counter()
        known = run()
        return time.perf_counter() - begun, known

    return timed
