"""The measures of runs as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from atp_rl.evaluate.stats import Rate
from atp_rl.tracking.measures import Measure, Measures, Unit, Window, measure_run, percent
from atp_rl.tracking.read import expand, load_run
from atp_rl.types import InputError


def measures_of(runs: Iterable[Path], *, unaligned: Path | None = None, turned: Path | None = None) -> list[Measures]:
    """The measures of the runs in these directories.

    Raises:
        InputError: no run there, or a run to compare with that belongs to none or to several.
    """
    records = expand(runs)
    for option, path in (("--unaligned", unaligned), ("--turned", turned)):
        if path and len(records) != 1:
            raise InputError(f"{option} {path}: belongs to one run and there are {len(records)}; give that one alone")
    return [
        measure_run(
            record, unaligned=load_run(unaligned) if unaligned else None, turned=load_run(turned) if turned else None
        )
        for record in records
    ]


def tables(measures: Sequence[Measures]) -> list[Table | Text]:
    """Of each run its measures, its monitors by window, and what it cannot tell."""
    shown: list[Table | Text] = []
    for of_run in measures:
        shown += [_main(of_run), *(_windows(label, w) for label, w in of_run.monitors.items()), _left_out(of_run)]
    return shown


def _main(measures: Measures) -> Table:
    where = f"{measures.split.replace('_', '-')} scenarios, up to {measures.axis} {measures.last}"
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=Text(f"{measures.name}, seed {measures.seed} ({measures.model}, {measures.testbed}): {where}"),
        title_justify="left",
        caption=Text("Intervals are 95 %, of this one seed. docs/statistics.md says how each is made."),
    )
    shown.add_column("#", justify="right")
    shown.add_column("measure", overflow="fold")
    shown.add_column("value", justify="right", no_wrap=True)
    shown.add_column("95 % interval", overflow="fold")
    shown.add_column("n", overflow="fold")
    shown.add_column("in words", overflow="fold")
    item = 0
    for m in measures.measured:
        number, item = str(m.item) if m.item != item else "", m.item
        n = f"{m.n} {m.of}"
        shown.add_row(number, *map(Text, (m.name, number_text(m.value, m.unit), interval_text(m), n, m.words)))
    return shown


def number_text(value: float | None, unit: Unit) -> str:
    """E.g. "12.5 %", "+3.0 points", "16 steps", "0.042"; "–" where it is censored."""
    if value is None:
        return "–"
    match unit:
        case "share":
            return percent(value)
        case "points":
            return f"{100 * value:+.1f} points"
        case "count":
            return f"{value:.0f}"
        case "steps" if value == int(value):
            return f"{value:.0f}"
        case "steps" | "seconds":
            return f"{value:.1f}" + (" s" if unit == "seconds" else "")
        case "nats":
            return f"{value:.3g} nats"
        case _:
            return f"{value:.3g}"


def interval_text(measure: Measure) -> str:
    """Both bounds, or why there are none."""
    if measure.without:
        return f"– ({measure.without})"
    low, high = (_bound(bound, measure.unit) for bound in (measure.low, measure.high))
    return f"[{low}, {high}]"


def _bound(bound: float | None, unit: Unit) -> str:
    if bound is None:
        return "?"
    return f"{100 * bound:.1f}" if unit in ("share", "points") else number_text(bound, unit)


def _windows(label: str, windows: Sequence[Window]) -> Table:
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=Text(f"14  {label}: training decisions between two evaluations, as if they were independent"),
        title_justify="left",
    )
    for heading in ("steps", "recall", "precision", "false alarms", "obfuscation"):
        shown.add_column(heading, justify="right")
    for w in windows:
        rates = (w.recall, w.precision, w.false_alarms, w.obfuscation)
        shown.add_row(f"{w.after + 1}–{w.to}", *(Text(_rate_text(rate)) for rate in rates))
    return shown


def _rate_text(rate: Rate) -> str:
    if rate.value is None:
        return f"– (n {rate.n})"
    return f"{percent(rate.value)} [{_bound(rate.low, 'share')}, {_bound(rate.high, 'share')}], n {rate.n}"


def _left_out(measures: Measures) -> Text:
    listed = "; ".join(f"{entry.item} {entry.name} ({entry.why})" for entry in measures.left_out)
    return Text(f"Not measured: {listed}.\n" if listed else "")
