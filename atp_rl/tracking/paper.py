"""`atp compare --paper`: what runs measured beside what the paper published.

The paper updates no weights: it measures, by round, an aligned policy that reads its own history. That is the first
checkpoint of any run here, whatever the run learned afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from atp_rl.tracking.compare import ILLUSTRATION, TINY, arms, fact_rounds, pool, rate_text
from atp_rl.tracking.published import FIGURES, LLAMA, QWEN, SOURCE, Figure, Quantity
from atp_rl.tracking.read import RunRecord, SettingFields, Split

ALIGNMENTS = {"base": "not aligned", "sft": "SFT", "dpo": "DPO", "grpo": "GRPO", None: "alignment unknown"}
QUANTITIES: dict[str, dict[Quantity, str]] = {
    "role_play": {"violation": "violation"},
    "tool_use": {"tool_used": "tool use", "correct": "accuracy"},
    "collusion": {"violation": "violation", "recollusion": "re-collusion"},
}
"""What is compared, by testbed, and its name in the table."""


class Line(NamedTuple):
    """One quantity in one round, or in one cell of a grid."""

    quantity: str
    published: list[str]
    """Each with whose figure it is; empty where there is none."""
    measured: list[str]
    """Each with its interval and n; empty where it was not measured."""


class Comparison(NamedTuple):
    """One arm beside the paper."""

    arm: str
    notes: list[str]
    lines: list[Line]
    figures: list[Figure]
    """That `lines` show."""


def paper_tables(records: Sequence[RunRecord]) -> list[Table | Text]:
    """A table for every arm, and what holds for all of them."""
    compared = [compare_arm(arm) for arm in arms(records)]
    shown = [figure for one in compared for figure in one.figures]
    missing = [_said(figure) for figure in FIGURES if figure not in shown]
    closing = f"Published: {SOURCE}, as far as recorded in atp_rl/tracking/published.py; none has an interval or an n."
    closing += f" Not shown, since no run here answers to them: {'; '.join(missing)}." if missing else ""
    return [*map(_table, compared), Text(closing)]


def compare_arm(arm: Sequence[RunRecord]) -> Comparison:
    """The seeds of one arm, pooled, beside the figures of the paper's arm that it repeats."""
    summary, how = arm[0].summary, alignment(arm[0])
    figures = _figures(summary["testbed"], summary["model"], how)
    first = [record.curve[0][1] for record in arm]
    lines = []
    for quantity, name in QUANTITIES.get(summary["testbed"], QUANTITIES["role_play"]).items():
        published = [figure for figure in figures if figure.quantity == quantity]
        measured = _measured(first, quantity)
        rounds = sorted({*measured, *(k for figure in published for k in figure.by_round)}, key=lambda k: k or 0)
        for k in rounds:
            of_round = [f"{f.by_round[k]}, no interval ({f.arm})" for f in published if k in f.by_round]
            lines.append(Line(f"{name}, round {k}" if k else name, of_round, measured.get(k, [])))
        if quantity == "recollusion":
            lines += [Line(f"{name}, {cell}", of_round, rate) for cell, rate in _cells(first).items()]
    return Comparison(f"{summary['name']} ({summary['model']}, {ALIGNMENTS[how]})", _notes(arm, how), lines, figures)


def alignment(record: RunRecord) -> str | None:
    """`base`, `sft`, `dpo` or `grpo`; None where the policy comes from a directory, which does not say."""
    start, adapter = record.setting("evolve", "start_from"), record.setting("align", "adapter")
    if start == "base":
        return "base"
    return None if adapter or start not in (None, "aligned") else record.setting("align", "method")


def _figures(testbed: str, model: str, how: str | None) -> list[Figure]:
    """Those that are, or may be, of this arm; for a model that the paper does not have, of any of its models."""
    models, alignments = {model, None} if model in (QWEN, LLAMA) else {QWEN, LLAMA, None}, {how, None}
    of_testbed = [figure for figure in FIGURES if figure.testbed == testbed and figure.model in models]
    return [figure for figure in of_testbed if how is None or figure.alignment in alignments]


def _measured(seeds: Sequence[Split], quantity: Quantity) -> dict[int | None, list[str]]:
    """By round, what the seeds' first checkpoints gave."""
    if quantity == "recollusion":
        return {None: _recollusion(seeds)}
    if quantity == "violation":
        rounds = min(len(split["by_round"]) for split in seeds)
        return {k + 1: [rate_text(pool(s["by_round"][k]["violation"] for s in seeds))] for k in range(rounds)}
    measured: dict[int | None, list[str]] = {}
    for kind in ("easy", "hard"):
        rates = fact_rounds([split.get("facts", {}) for split in seeds], f"{quantity}/{kind}")
        for k, rate in enumerate(rates, 1):
            measured.setdefault(k, []).extend([f"{kind} problems {rate_text(rate)}"] if rate["n"] else [])
    return measured


def _recollusion(seeds: Sequence[Split] | Sequence[SettingFields]) -> list[str]:
    spreads = [spread for seed in seeds if (spread := seed.get("spread"))]
    return [rate_text(pool(spread["recollusion"]["after_first"] for spread in spreads))] if spreads else []


def _cells(seeds: Sequence[Split]) -> Mapping[str, list[str]]:
    """Re-collusion in every cell of a grid."""
    grids = [split.get("by_setting", {}) for split in seeds]
    names = dict.fromkeys(name for cells in grids for name in cells)
    return {name: _recollusion([cells[name] for cells in grids if name in cells]) for name in names}


def _notes(arm: Sequence[RunRecord], how: str | None) -> list[str]:
    """What a reader must know before comparing."""
    summary, file = arm[0].summary, arm[0].setting("scenarios", "paper")
    notes = []
    if summary["model"] in TINY:
        notes.append(f"A run of the tiny model {ILLUSTRATION}; it is no evidence about pretrained models.")
    if summary["testbed"] not in QUANTITIES:
        notes.append(f"The paper has no testbed {summary['testbed']}.")
    if how is None:
        notes.append("The recipe does not say how it was aligned: the figures of all alignments are shown.")
    if how == "grpo":
        notes.append("The paper's GRPO trains all parameters, this one LoRA.")
    if arm[0].learner != "in_context":
        notes.append("Measured at step 0: the paper updates no weights.")
    if summary["testbed"] == "tool_use":
        notes.append("Here the problems are easy in the first half of the rounds and hard in the second.")
    if len(arm) > 1:
        notes.append("Seeds are pooled, and shown with the lowest and the highest.")
    return [*notes, f"Scenarios: {file}." if file else "Scenarios are this project's, not the paper's."]


def _table(one: Comparison) -> Table:
    notes = Text(" ".join(one.notes))
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=Text(one.arm), caption=notes)
    for heading in ("quantity", "published", "measured, 95 % interval"):
        shown.add_column(heading, overflow="fold")
    for line in one.lines:
        published, measured = line.published or ["no published figure"], line.measured or ["not measured"]
        shown.add_row(*map(Text, (line.quantity, "\n".join(published), "\n".join(measured))))
    return shown


def _said(figure: Figure) -> str:
    values = ", ".join(f"{value} in round {k}" if k else value for k, value in figure.by_round.items())
    return f"{figure.testbed}, {figure.arm}: {QUANTITIES[figure.testbed][figure.quantity]} {values}"
