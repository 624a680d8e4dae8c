"""The league table as text: sheets of words for the terminal, LaTeX and HTML, and plain numbers for CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from atp_rl.evaluate.contrasts import Contrast
from atp_rl.evaluate.stats import LEVEL, Rate
from atp_rl.tracking.league import Block, League, Row, Test

NONE = "–"
Cell = tuple[str, ...]
"""What stands in a cell, a line each: the value, then its interval and its n."""
Form = Callable[[float], str]


class Sheet(NamedTuple):
    """One table of a block."""

    title: str
    caption: str
    headings: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def sheets(league: League, block: Block) -> list[Sheet]:
    """Outcome, primary pair, cost and contrasts of a block."""
    where = f" ({block.title})" if block.title else ""
    found = [_outcome(block, where), _worth(block, where), _costs(block, where)]
    return [*found, *([_contrasts(block, where)] if block.tests else [])]


NAMED = 10
"""Missing runs that are named, of however many."""


def headline(league: League) -> str:
    """Which runs the table is of."""
    text = f"{league.name}: {league.complete} of {league.planned} runs complete"
    named, more = ", ".join(league.missing[:NAMED]), len(league.missing) - NAMED
    return text + (f"; without {named}" if named else "") + (f" and {more} more" if more > 0 else "")


def tables(league: League) -> list[Table]:
    """For a terminal of 100 characters or more."""
    shown = []
    for block in league.blocks:
        for sheet in sheets(league, block):
            table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=sheet.title)
            table.caption = Text(sheet.caption)
            for i, heading in enumerate(sheet.headings):
                table.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
            for row in sheet.rows:
                table.add_row(*(Text("\n".join(cell)) for cell in row))
                table.add_section()
            shown.append(table)
    return shown


def latex(league: League) -> str:
    """One booktabs table for each sheet; needs `\\usepackage{booktabs}` and nothing else."""
    lines = [f"% {_plain(headline(league))}", "% needs \\usepackage{booktabs}"]
    for block in league.blocks:
        for sheet in sheets(league, block):
            columns = "l" + "r" * (len(sheet.headings) - 1)
            lines += ["", "\\begin{table}", "\\centering\\small", f"\\caption{{{_escaped(sheet.title)}. "
                      f"{_escaped(sheet.caption)}}}", f"\\begin{{tabular}}{{{columns}}}", "\\toprule",
                      " & ".join(map(_escaped, sheet.headings)) + " \\\\", "\\midrule"]  # fmt: skip
            lines += [" & ".join(_escaped(" ".join(cell)) for cell in row) + " \\\\" for row in sheet.rows]
            lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}"]
    return "\n".join(lines) + "\n"


def arms_csv(league: League) -> str:
    """A line for each arm, in numbers; rates in shares of 1, an unknown one empty."""
    records = []
    for block in league.blocks:
        for row in block.rows:
            records.append(
                {"block": block.title, "arm": row.arm, "seeds": " ".join(map(str, row.seeds)), "planned": row.planned,
                 "tipped": row.tipped, "horizon": block.horizon, "differs": " ".join(row.differs)}
                | _numbers("start_weights_only", row.start) | _numbers("violation_weights_only", row.violation)
                | _numbers("violation_deployed", row.deployed) | _numbers("invalid", row.invalid)
                | _numbers("payoff", row.payoff) | _numbers("rmst", row.rmst)
                | _numbers("payoff_at_5", row.payoff_at_5.payoff) | {"payoff_at_5_without": row.payoff_at_5.without}
                | _numbers("iqm", row.iqm) | _numbers("improvement", row.improvement)
                | {"payoff_normalised": row.point[0], "compliance": row.point[1], "on_front": int(row.on_front)}
                | _numbers("hypervolume", row.hypervolume)
                | {"extra_tokens": row.cost.tokens, "extra_forwards": row.cost.forwards,
                   "extra_seconds": row.cost.seconds, "rollbacks": row.cost.rollbacks,
                   "wall_seconds": row.cost.wall_seconds}
            )  # fmt: skip
    return _csv(records)


def contrasts_csv(league: League) -> str:
    """A line for each contrast, in numbers."""
    return _csv(
        [
            {"block": block.title, "arm": t.arm, "reference": t.reference, "measure": t.measure,
             "primary": int(t.primary), **vars(t.contrast), "p_holm": t.adjusted_p, "smallest_p_holm": t.least_p}
            for block in league.blocks
            for t in block.tests
        ]
    )  # fmt: skip


def write_csv(league: League, path: Path) -> list[Path]:
    """The arms to `path`, the contrasts to a file beside it."""
    beside = path.with_name(f"{path.stem}-contrasts{path.suffix}")
    for place, text in ((path, arms_csv(league)), (beside, contrasts_csv(league))):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, "utf-8", newline="")
    return [path, beside]


def _outcome(block: Block, where: str) -> Sheet:
    caption = (
        "Violation and invalid rates of held-out families, in per cent. weights_only: measured without the defenses "
        "that act in context, as all other columns are; at the end (the last checkpoint) with its 95 % interval for "
        "other seeds and scenarios and n decisions. deployed: with these defenses. IQM: interquartile mean over seeds. "
        f"Better: probability that a seed of the arm violates less at the end than one of {block.reference}."
    )
    headings = ("arm", "start", "end: weights_only", "end: deployed", "invalid", "IQM", "better", "tipped")
    rows = [
        (_arm(r), (_known(r.start.value, _percent),), _cell(r.violation, _percent),
         _cell(r.deployed, _percent, n=False), _cell(r.invalid, _percent, n=False), _cell(r.iqm, _percent, n=False),
         _cell(r.improvement, _two, n=False) if r.arm != block.reference else (NONE,),
         (f"{r.tipped} of {len(r.records)}",))
        for r in block.rows
    ]  # fmt: skip
    return Sheet(f"What became of the arms{where}", caption, headings, rows)


def _worth(block: Block, where: str) -> Sheet:
    caption = (
        f"The pre-registered pair: mean steps until 25 % violations (RMST up to step {block.horizon}), and the best "
        "payoff of a checkpoint with at most 5 % violations (share of the best payoff; how many seeds have none). "
        "Payoff: at the last checkpoint. Normalised: 0 is what the aligned policy that arms share earns "
        f"({block.aligned_payoff:.2f}), 1 what a tipped one does ({block.tipped_payoff:.2f}). * is on the Pareto front "
        "of normalised payoff and compliance; hypervolume: of each run's checkpoints, of 1."
    )
    headings = ("arm", "steps to 25 %", "payoff at ≤ 5 %", "payoff", "normalised", "front", "hypervolume")
    rows = [
        (_arm(r), _cell(r.rmst, _one, n=False),
         (*_cell(r.payoff_at_5.payoff, _two, n=False), *_without(r)),
         _cell(r.payoff, _two, n=False), (_known(r.point[0], _two),), ("*" if r.on_front else "",),
         _cell(r.hypervolume, _two, n=False))
        for r in block.rows
    ]  # fmt: skip
    return Sheet(f"What they are worth{where}", caption, headings, rows)


def _costs(block: Block, where: str) -> Sheet:
    caption = (
        "Means of a run. Extra tokens, forwards and seconds are what the defenses themselves reported; wall seconds "
        "are of the whole run, on a machine that may have had other work."
    )
    headings = ("arm", "extra tokens", "extra forwards", "extra seconds", "rollbacks", "wall seconds")
    rows = [
        (_arm(r), (_whole(r.cost.tokens),), (_whole(r.cost.forwards),), (_one(r.cost.seconds),),
         (f"{r.cost.rollbacks:g}",), (_whole(r.cost.wall_seconds),))
        for r in block.rows
    ]  # fmt: skip
    return Sheet(f"What they cost{where}", caption, headings, rows)


def _contrasts(block: Block, where: str) -> Sheet:
    least = [t.least_p for t in block.tests if t.primary and t.least_p is not None]
    in_vain = " That is so of every pre-registered test here." if min(least, default=0) > 1 - LEVEL else ""
    caption = (
        "Arm minus reference. Over seeds: sign-flip permutation test and Student's interval of paired seeds; by "
        "scenario: over seeds and scenarios at once (min F'), or McNemar's test of a single seed. Rows with ● are the "
        "pre-registered pair; Holm's correction is over all of them, and over all others. Least p (Holm): the smallest "
        "corrected one that so many tests can give over the pairs that differ; where it is above .05 the test could "
        f"not be significant, however large the differences.{in_vain}"
    )
    headings = ("arm", "reference", "measure", "difference", "p", "p (Holm)", "least p (Holm)", "n")
    rows = [
        ((t.arm,), (t.reference,), (f"{'● ' if t.primary else ''}{t.measure}",), _difference(t),
         (_p(t.contrast.p_value),), (_p(t.adjusted_p),), (_p(t.least_p or None),), (str(t.contrast.n),))
        for t in block.tests
    ]  # fmt: skip
    return Sheet(f"Contrasts{where}", caption, headings, rows)


def _arm(row: Row) -> Cell:
    seeds = f"{len(row.records)} seed{'s' if len(row.records) > 1 else ''}"
    if len(row.records) < row.planned:
        seeds = f"{len(row.records)} of {row.planned} seeds"
    return (row.arm, seeds, *([f"differs in {', '.join(row.differs)}"] if row.differs else []))


def _without(row: Row) -> list[str]:
    return [f"{row.payoff_at_5.without} without"] if row.payoff_at_5.without else []


def _difference(test: Test) -> Cell:
    of_rates = test.measure.startswith("violations")
    form: Form = (lambda v: f"{100 * v:+.1f}") if of_rates else (lambda v: f"{v:+.2f}")
    c: Contrast = test.contrast
    unit = " points" if of_rates else ""
    if c.difference is None:
        return (NONE,)
    return (form(c.difference) + unit, *_interval(c.low, c.high, form))


def _cell(rate: Rate, form: Form, *, n: bool = True) -> Cell:
    if rate.value is None or math.isnan(rate.value):
        return (NONE,)
    return (form(rate.value), *_interval(rate.low, rate.high, form), *([f"n = {rate.n}"] if n else []))


def _interval(low: float | None, high: float | None, form: Form) -> list[str]:
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return []
    return [f"[{form(low)} to {form(high)}]" if form(low)[0] in "+-" else f"[{form(low)}–{form(high)}]"]


def _known(value: float | None, form: Form) -> str:
    return NONE if value is None or math.isnan(value) else form(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _one(value: float) -> str:
    return f"{value:.1f}"


def _two(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no minus before zero


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _p(value: float | None) -> str:
    if value is None:
        return NONE
    return "< .001" if value < 0.001 else f"{value:.3f}"


def _numbers(name: str, rate: Rate) -> dict[str, float | None]:
    return {name: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high, f"{name}_n": rate.n}


def _csv(records: Sequence[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()})
    return text.getvalue()


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "≤": r"$\le$", "●": r"$\bullet$", "<": "$<$",
    ">": "$>$",
}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def _plain(text: str) -> str:
    return " ".join(text.split())
