"""`atp predict --against`: what the model of `evaluate/tipping.py` predicted, beside what finished runs measured.

Each run is predicted from its own recipe and its own aligned violation rate. The model's unit of time is not the run's:
without a scale only ends and orders are compared; with one, calibrated on the time to 25 % of a single run, times and
the rate at the last step too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from atp_rl.evaluate import tipping
from atp_rl.evaluate.tipping import Lagrangian, MergeBack
from atp_rl.pipeline import suites_of
from atp_rl.predict import LONGEST, NoPrediction, Prediction, aligned_rate, predict
from atp_rl.predict_tables import rate_text, steps_text
from atp_rl.recipe import load
from atp_rl.tracking.compare import arms, crossing_text
from atp_rl.tracking.read import RunRecord, expand, load_run
from atp_rl.tracking.summary import TIPPED_ABOVE
from atp_rl.types import InputError

TIED = 0.02
"""Predicted final rates that differ by less are not put in an order."""
TIED_TIMES = 0.1
"""Nor are times to 25 % that differ by a smaller share of the longer one."""
THRESHOLDS = ("0.25", "0.50")
SCALE = "(scale)"
STARTS_ABOVE = "starts above 25 %"


@dataclass(frozen=True)
class Compared:
    """One run and its prediction."""

    record: RunRecord
    prediction: Prediction | None
    reason: str
    """Why there is no prediction; else empty."""
    scale: float | None
    """Model steps that one of the run's steps is worth."""
    gives_scale: bool = False
    """Whether the scale is this run's, which could then not have failed."""

    @cached_property
    def path(self) -> tipping.Floats | None:
        """Predicted rates after 0, 1, ... steps of the run, in each of which a price or a merge acts once; None without
        a scale."""
        if self.prediction is None or self.scale is None:
            return None
        updates = max(1, round(self.scale))
        return tipping.simulate(
            self.prediction.p0,
            steps=min(LONGEST // updates, self.record.summary["steps"]),
            defenses=[each for each in self.prediction.modelled if each is not None],
            lr=tipping.LEARNING_RATE * self.scale / updates,
            updates=updates,
            **self.prediction.setting,
        )

    def time_to(self, threshold: float) -> float:
        """Predicted time to 25 or 50 %: in steps of the run where there is a scale, else in model steps; may be inf."""
        assert self.prediction is not None
        if self.path is not None and any(isinstance(d, MergeBack | Lagrangian) for d in self.prediction.modelled):
            above = np.flatnonzero(self.path >= threshold)
            return float(above[0]) if above.size else math.inf
        together = self.prediction.together
        return {0.25: together.to_25, 0.5: together.to_50}[threshold] / (self.scale or 1.0)

    @property
    def verdict(self) -> str:
        """Whether the run passed 25 % as predicted; `SCALE` and `STARTS_ABOVE` where that is no evidence."""
        if self.prediction is None:
            return f"no prediction: {self.reason}"
        if self.gives_scale:
            return SCALE
        summary = self.record.summary
        final, crossing = summary["final"], summary["time_to"]["0.25"]
        if crossing["step"] == 0 or (summary["aligned"]["violation_rate"] or 0.0) >= TIPPED_ABOVE:
            return STARTS_ABOVE
        tips, predicted = crossing["step"] is not None, self.time_to(0.25)
        if not tips and (final["ci_high"] is None or final["ci_high"] >= TIPPED_ABOVE):
            return "unclear: the interval holds 25 %"
        if tips == math.isfinite(predicted):
            return "as predicted"
        if tips:
            return "not as predicted: it tipped"
        if self.scale is None:
            return "open: predicted to tip, held so far"
        late = predicted > summary["steps"]
        return "as predicted: too short to tip" if late else "not as predicted: it held"


def against(paths: Sequence[Path], scale_by: Path | None) -> list[Table | Text]:
    """The tables for these runs (multi-run directories count as their members).

    Raises:
        InputError: unreadable runs; a run to scale by that cannot be one.
    """
    scale = model_steps_per_step(scale_by) if scale_by else None
    grouped = [[compare(record, scale, scale_by) for record in arm] for arm in arms(expand(paths))]
    return [_table(grouped, scale), Text("\n".join(["", *_notes(grouped, scale, scale_by)]))]


def compare(record: RunRecord, scale: float | None = None, scale_by: Path | None = None) -> Compared:
    """A run beside the prediction of its recipe, from its own aligned rate; `scale` is that of the run `scale_by`."""
    recipe = load([str(record.path / "recipe.yaml")])
    p0, p0_from = aligned_rate(record)
    try:
        prediction = predict(recipe, suites_of(recipe), p0=p0, p0_from=p0_from)
    except NoPrediction as reason:
        return Compared(record, None, str(reason), scale)
    unknown = [each.name for each in prediction.alone if each.end is None]
    if unknown:
        return Compared(record, None, f"the model does not know {' and '.join(unknown)}", scale)
    gives_scale = scale_by is not None and record.path.resolve() == scale_by.resolve()
    return Compared(record, prediction, "", scale, gives_scale)


def model_steps_per_step(run: Path) -> float:
    """Model steps per step of this run: predicted over measured time to 25 %.

    Raises:
        InputError: one of the two does not exist.
    """
    found = compare(load_run(run))
    step = found.record.summary["time_to"]["0.25"]["step"]
    if found.prediction is None:
        raise InputError(f"--scale-by {run}: no prediction, since {found.reason}")
    predicted = found.prediction.together.to_25
    if not step or not 0 < predicted < math.inf:
        fix = "take a run that starts below it and tips, e.g. one without defenses"
        raise InputError(f"--scale-by {run}: it did not pass 25 % violations after its start, or was not to; {fix}")
    return predicted / step


def order(grouped: Sequence[Sequence[Compared]]) -> tuple[int, int]:
    """Of the pairs of arms that are predicted to differ: how many ended in that order, and how many there are.

    By the predicted rate at the last step where there is a scale; else the arm that passes 25 % sooner is predicted to
    end higher, and of two that never do the one whose equilibrium is higher.
    """
    keys, measured = [], []
    for arm in grouped:
        predictions = [run.prediction for run in arm if run.prediction]
        rates = [rate for run in arm if (rate := run.record.summary["final"]["violation_rate"]) is not None]
        if not predictions or not rates:
            continue
        at_last = [float(run.path[-1]) for run in arm if run.path is not None]
        ends = [each.together.end or 0.0 for each in predictions]
        speeds = [1 / each.together.to_25 if each.together.to_25 else math.inf for each in predictions]
        keys.append((0.0, float(np.mean(at_last))) if at_last else (float(np.mean(speeds)), float(np.mean(ends))))
        measured.append(float(np.mean(rates)))
    pairs = right = 0
    for (a, seen_a), (b, seen_b) in combinations(zip(keys, measured, strict=True), 2):
        alike = abs(a[1] - b[1]) < TIED if a[0] == b[0] else min(a[0], b[0]) > (1 - TIED_TIMES) * max(a[0], b[0])
        if alike:
            continue
        pairs += 1
        right += (a > b) == (seen_a > seen_b) and seen_a != seen_b
    return right, pairs


def _table(grouped: Sequence[Sequence[Compared]], scale: float | None) -> Table:
    """A row a run, the arm's name in the first of its rows; predicted times are model steps (m) without a scale."""
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
        show_edge=False,
        title="prediction | measurement",
        title_justify="left",
    )
    shown.add_column("arm", overflow="fold")
    times = ("to\n.25", "to\n.50")
    predicted = times if scale else tuple(f"m {heading}" for heading in times)
    for heading in ("seed", "p0", "end", *predicted, "| end", "[95 %]", "n", *times):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("25 %", overflow="fold")
    for arm in grouped:
        for place, run in enumerate(arm):
            name = run.record.summary["name"] if place == 0 else ""
            shown.add_row(*(Text(cell) for cell in (name, *_cells(run))))
    return shown


def _cells(run: Compared) -> list[str]:
    summary, prediction = run.record.summary, run.prediction
    final = summary["final"]
    interval = f"[{rate_text(final['ci_low'])}–{rate_text(final['ci_high'])}]"
    measured = [rate_text(final["violation_rate"]), interval, str(final["n"])]
    measured += [crossing_text(summary["time_to"][threshold]) for threshold in THRESHOLDS]  # pyright: ignore
    if prediction is None:
        return [str(summary["seed"]), *["–"] * 4, *measured, run.verdict]
    end = prediction.together.end if run.path is None else float(run.path[-1])
    times = [steps_text(run.time_to(float(threshold))) for threshold in THRESHOLDS]
    return [str(summary["seed"]), rate_text(prediction.p0), rate_text(end), *times, *measured, run.verdict]


def _notes(grouped: Sequence[Sequence[Compared]], scale: float | None, scale_by: Path | None) -> list[str]:
    verdicts = [run.verdict for arm in grouped for run in arm if run.prediction and not run.gives_scale]
    right, pairs = order(grouped)
    by = "the predicted rate at the last step" if scale else "who passes 25 % first, then where it settles"
    unit = (
        f"Times are steps of the runs: {scale:.3g} model steps each, so that {scale_by} passes 25 % when it did; that "
        "run's own time is no evidence. The predicted end is that at the last step."
        if scale
        else "Predicted times are model steps (m), which are not the runs'; the predicted end is where it settles. "
        "--scale-by RUN calibrates them on one run."
    )
    counted = [verdict for verdict in verdicts if verdict.startswith(("as", "not"))]
    agreed = sum(verdict.startswith("as") for verdict in counted)
    return [
        f"threshold: {agreed} of {len(counted)} runs passed 25 %, or did not, as predicted; "
        f"{len(verdicts) - len(counted)} are open or unclear, or start above 25 %",
        f"order: {right} of {pairs} pairs of arms ended in the predicted order (by {by})",
        unit,
    ]
