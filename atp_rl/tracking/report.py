"""The report of one or several runs as one HTML file that needs nothing else: no network, no script, no other file.

The same runs give the same bytes: nothing in it depends on the clock, the machine or the place of the run directories.
What models wrote is escaped by the template, and a content security policy forbids scripts and requests on top.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.typing import RcKeyType
from PIL import Image

from atp_rl.tracking import compare
from atp_rl.tracking.compare import Pooled, Row
from atp_rl.tracking.read import EpisodeFields, RateFields, RunRecord, Split, TurnFields, Verdicts, expand
from atp_rl.tracking.spread_picture import spread_heatmap

COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4B8A", "#444444")
"""One per arm (Okabe and Ito): told apart with every kind of colour vision, and beside a label all the same."""
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e8ee"
MARKERS = "osD^vP"
DASHES = (("solid", "-"), ("dashed", (0, (4, 2))), ("dotted", (0, (1, 1.5))))
"""Names and line styles for what is drawn in one colour."""
STYLE: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a $ in an arm's name is a dollar
    "text.color": INK,
    "axes.edgecolor": "#b8c2cc",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud, and set in the page's font
    "svg.hashsalt": "atp_rl",
}
PNG_KEY = "violation rate, a line per seed, with its 95 % interval;  dashed: invalid rate;  ring: tipping point"
PNG_DEPLOYED = ";  dashed with marks: as deployed, with defenses"
SHOWN_SEATS = 2


@dataclass(frozen=True)
class Arm:
    """The runs of one arm by seed, its line of the comparison, and its colour in every chart."""

    records: list[RunRecord]
    row: Row
    color: str

    @property
    def in_context(self) -> bool:
        return self.row["learner"] == "in_context"

    @property
    def illustrates(self) -> bool:
        return compare.illustrates(self.row)

    @property
    def title(self) -> str:
        """Names it apart from every other arm."""
        return f"{self.row['arm']} ({self.row['model']}, {self.row['testbed']})"

    @property
    def deployed(self) -> bool:
        """Whether defenses go with its policy."""
        return self.row["deployed"]["n"] > 0

    @property
    def outcome(self) -> str:
        """What stands above the arm's curve."""
        seeds = "single seed" if len(self.records) == 1 else f"{len(self.records)} seeds"
        if self.in_context:
            return f"{seeds}, {compare.ILLUSTRATION}" if self.illustrates else seeds
        if not self.row["tipped"]:
            return f"{seeds}, no tipping point"
        how_many = "tipped" if len(self.records) == 1 else f"{self.row['tipped']} tipped"
        return f"{seeds}, {how_many} (step {compare.listed(self.row['tipping_steps'])})"


def write_report(paths: Iterable[str | Path], out: Path) -> Path:
    """Write the report of these run directories (or multi-run directories) to `out`."""
    arms = _arms(paths)
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    evolved = [arm for arm in arms if not arm.in_context]
    breakdowns = [("family", _breakdown(arms, "by_family")), ("supervision", _breakdown(arms, "by_supervision"))]
    with_rounds = [arm for arm in arms if arm.in_context or len(arm.row["rounds"]) > 1]
    page = environment.get_template("report.html.jinja").render(
        arms=arms,
        compare=compare,
        illustration=compare.ILLUSTRATION,
        curves=_panels(evolved, draw_decay, _decay_title),
        rounds=_panels(with_rounds, _draw_rounds, _rounds_title),
        facts=[(arm, found) for arm in arms if (found := compare.facts(arm.records)).names],
        fact_panels=_fact_panels(arms),
        grids=[(arm, cells) for arm in arms if (cells := compare.grid(arm.records))],
        spreads=[(arm, found) for arm in arms if (found := _spreads(arm))],
        spread_hint=compare.SPREAD_HINT,
        breakdowns=[(name, parts) for name, parts in breakdowns if len(parts) > 1],
        learning=_learning_svg(evolved) if any(r.metrics for arm in evolved for r in arm.records) else None,
        transcripts=[(arm, _transcripts(arm)) for arm in arms],
        outcome=_outcome,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, "utf-8")
    return out


def write_curve_png(paths: Iterable[str | Path], out: Path) -> Path:
    """Write one compact figure for a README: a panel per arm, by step (by round for arms in context)."""
    arms = _arms(paths)
    lines = math.ceil(len(arms) / 4)
    columns = math.ceil(len(arms) / lines)
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * columns + 0.3, 2.4 * lines + 0.3), layout="constrained")
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
        for arm, ax in zip(arms, panels, strict=False):
            (_draw_rounds if arm.in_context else draw_decay)(ax, arm)
            ax.set_title(arm.row["arm"], loc="left", fontweight="bold", fontsize=10, pad=16)
            ax.text(0, 1.03, arm.outcome, transform=ax.transAxes, color=MUTED, fontsize=8)
        for ax in panels:
            ax.set_axis_off()
        key = PNG_KEY + (PNG_DEPLOYED if any(arm.deployed for arm in arms) else "")
        figure.supxlabel(key, fontsize=8, color=MUTED)
        figure.savefig(buffer, dpi=144, format="png")
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(128).save(out, optimize=True)  # a third of the bytes
    return out


def _arms(paths: Iterable[str | Path]) -> list[Arm]:
    return [Arm(runs, compare.row(runs), color) for runs, color in zip(compare.arms(expand(paths)), cycle(COLORS))]


# Charts. Their SVG holds no text from outside this file except for its escaped title.


def svg(width: float, height: float, title: str, draw: Callable[[Figure], None]) -> Markup:
    """What `draw` draws on a figure of this size (inches) as inline SVG, its ids made unique by its title."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "none", "axes.facecolor": "none"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = re.sub(r'font-family: [^;"]*;? ?', "", drawing[drawing.index('<g id="figure_1">') :])
    key = hashlib.sha256(title.encode()).hexdigest()[:8]
    drawing = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>c{key}-", drawing)
    opening = Markup('<svg viewBox="0 0 {} {}" role="img"><title>{}</title>').format(72 * width, 72 * height, title)
    return opening + Markup(drawing)


def _panels(
    arms: Sequence[Arm], draw: Callable[[Axes, Arm], None], title: Callable[[Arm], str]
) -> list[tuple[Arm, Markup]]:
    """A chart per arm; of one or two they are larger."""
    size = (5.8, 2.8) if len(arms) < 3 else (3.8, 2.4)
    return [(arm, svg(*size, title(arm), lambda figure, arm=arm: draw(figure.subplots(), arm))) for arm in arms]


def _decay_title(arm: Arm) -> str:
    ends = [f"seed {r.summary['seed']}, {_at(r.curve[0])} and {_at(r.curve[-1])}" for r in arm.records]
    return f"Violation rate of {arm.title} by step: {'; '.join(ends)}"


def _at(point: tuple[int, Split]) -> str:
    return f"{compare.percent(point[1]['violation']['value'])} at step {point[0]}"


def _rounds_title(arm: Arm) -> str:
    values = ", ".join(compare.percent(rate["value"]) for rate in arm.row["rounds"])
    return f"Violation rate of {arm.title} by round at the last checkpoint: {values}"


def draw_decay(ax: Axes, arm: Arm) -> None:
    for record, marker in zip(arm.records, cycle(MARKERS)):
        steps = [step for step, _ in record.curve]
        _line(ax, steps, [s["violation"] for _, s in record.curve], arm.color, marker)
        if record.deployed:
            x, deployed = zip(*record.deployed, strict=True)
            _line(ax, x, [s["violation"] for s in deployed], arm.color, marker, DASHES[1][1])
        ax.plot(steps, _values([s["invalid"] for _, s in record.curve])[:, 0], color=MUTED, lw=0.9, ls=(0, (4, 2)))
        if (tip := record.summary["tipping_step"]) is not None:
            ax.axvline(tip, color=arm.color, lw=0.9, ls=(0, (1, 1.5)), zorder=1)
            at = _values([s["violation"] for step, s in record.curve if step == tip])[:, 0]
            ax.plot([tip] * len(at), at, "o", ms=10, mfc="none", mec=arm.color, mew=1.2)
    percent_axes(ax, "step")


def _draw_rounds(ax: Axes, arm: Arm) -> None:
    for record, marker in zip(arm.records, cycle(MARKERS)):
        (_, aligned), (_, last) = record.curve[0], record.curve[-1]
        for split, color in ((aligned, MUTED), (last, arm.color)) if len(record.curve) > 1 else ((last, arm.color),):
            _line(ax, range(1, len(split["by_round"]) + 1), [v["violation"] for v in split["by_round"]], color, marker)
        for _, split in record.deployed[-1:]:
            rates = [v["violation"] for v in split["by_round"]]
            _line(ax, range(1, len(rates) + 1), rates, arm.color, marker, DASHES[1][1])
    percent_axes(ax, "round")


def _line(ax: Axes, x: Sequence[int], rates: Sequence[RateFields], color: str, marker: str, ls: Any = "-") -> None:
    """A rate with its interval as a band."""
    value, low, high = _values(rates).T
    ax.fill_between(x, low, high, color=color, alpha=0.13, lw=0)
    ax.plot(x, value, color=color, lw=1.6, ls=ls, marker=marker, ms=3.6, mec="white", mew=0.5)


def _fact_panels(arms: Sequence[Arm]) -> list[tuple[Arm, str, Markup]]:
    """(arm, note, chart) of every fact by step and by round, where there are several; facts of one name and several
    kinds, like `correct/easy` and `correct/hard`, share a chart."""
    plans: list[tuple[Arm, list[str], str]] = []
    for arm in arms:
        found = compare.facts(arm.records)
        axes = [axis for axis, points in (("step", found.checkpoints), ("round", found.rounds)) if len(points) > 1]
        groups = dict.fromkeys(name.partition("/")[0] for name in found.names)
        of_group = [[name for name in found.names if name.partition("/")[0] == group] for group in groups]
        plans += [(arm, names, axis) for names in of_group for axis in axes]
    size, panels = (5.8, 2.8) if len(plans) < 3 else (3.8, 2.4), []
    for arm, names, axis in plans:
        what = f"{names[0].partition('/')[0].replace('_', ' ')} by {axis}"
        kinds = [f"{name.partition('/')[2]} {style}" for name, (style, _) in zip(names, cycle(DASHES))]
        note = f"{what}: {', '.join(kinds)}" if len(names) > 1 else what
        chart = svg(*size, f"{what}, {arm.title}", lambda figure, plan=(arm, names, axis): _draw_facts(figure, *plan))
        panels.append((arm, note, chart))
    return panels


def _draw_facts(figure: Figure, arm: Arm, names: Sequence[str], axis: str) -> None:
    ax = figure.subplots()
    for record, marker in zip(arm.records, cycle(MARKERS)):
        seen = [(step, split.get("facts", {})) for step, split in record.curve]
        for name, (_, dashes) in zip(names, cycle(DASHES)):
            curve = [(step, facts[name]) for step, facts in seen if name in facts]
            points = [(step, fact.rate) for step, fact in curve]
            if axis == "round":
                points = list(enumerate(curve[-1][1].by_round if curve else [], 1))
            _line(ax, [x for x, _ in points], [rate for _, rate in points], arm.color, marker, dashes)
    percent_axes(ax, axis)


def _values(rates: Sequence[RateFields]) -> np.ndarray:
    """[rate, 3] of value, low and high; NaN where not measured."""
    return np.array([[rate["value"], rate["low"], rate["high"]] for rate in rates], dtype=float).reshape(-1, 3)


def percent_axes(ax: Axes, xlabel: str) -> None:
    ax.set(ylim=(-0.03, 1.03), yticks=[0, 0.25, 0.5, 0.75, 1])
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    _count_axis(ax, xlabel)


def _count_axis(ax: Axes, xlabel: str) -> None:
    ax.set_xlabel(xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    ax.grid(visible=False, axis="x")
    ax.tick_params(length=0)


def _learning_svg(arms: Sequence[Arm]) -> Markup:
    """What the learner was paid, step by step, and how far it moved, by checkpoint; every seed a line."""

    def draw(figure: Figure) -> None:
        payoff, kl = figure.subplots(1, 2)
        payoff.set_title("mean payoff in training, share of the best", loc="left", fontsize=9, color=MUTED)
        kl.set_title("KL to the aligned policy at checkpoints, nats per reply", loc="left", fontsize=9, color=MUTED)
        for color, record in [(arm.color, record) for arm in arms for record in arm.records]:
            paid = [(m.get("progress/step"), m.get("evolve/payoff_mean")) for m in record.metrics]
            moved = [(step, split["kl_to_aligned"]) for step, split in record.curve]
            for ax, points in ((payoff, paid), (kl, moved)):
                ax.plot(*np.array(points, dtype=float).T, color=color, lw=1.2, alpha=0.85)
        for ax in (payoff, kl):
            _count_axis(ax, "step")

    return svg(12, 2.9, "Payoff in training and distance from the aligned policy by step", draw)


def _spreads(arm: Arm) -> list[tuple[RunRecord, Markup | None, list[compare.Measure]]]:
    """Of every seed with several seats, its heat map (where there are several checkpoints) and its measures."""
    found = []
    for record in arm.records:
        if measures := compare.measures(record):
            seats, steps = record.seats, [step for step, _ in record.curve]
            rows = [split.get("by_seat", {}) for _, split in record.curve]
            rates = [[_rate(row[seat]) if seat in row else math.nan for seat in seats] for row in rows]
            picture = spread_heatmap(rates, steps, seats, deviants=record.deviants) if len(steps) > 1 else None
            found.append((record, picture, measures))
    return found


def _rate(verdicts: Verdicts) -> float:
    """The violation rate; NaN where nothing was measured."""
    value = verdicts["violation"]["value"]
    return math.nan if value is None else value


# Tables and transcripts.


def _breakdown(arms: list[Arm], by: Literal["by_family", "by_supervision"]) -> dict[str, list[dict[str, Pooled]]]:
    """Violation and invalid rate at the last checkpoint: part -> one per arm, with n = 0 where it has no such part."""
    last = [[record.curve[-1][1][by] for record in arm.records] for arm in arms]
    parts = sorted({part for seeds in last for seed in seeds for part in seed})

    def pooled(seeds: list[dict[str, Verdicts]], part: str) -> dict[str, Pooled]:
        present = [seed[part] for seed in seeds if part in seed]
        return {key: compare.pool(verdicts[key] for verdicts in present) for key in ("violation", "invalid")}

    return {part: [pooled(seeds, part) for seeds in last] for part in parts}


def _transcripts(arm: Arm) -> list[dict[str, Any]]:
    """Two episodes each of the first seed's first stored step, the one nearest to its tipping step, and the last."""
    record = arm.records[0]
    steps, tip = record.episode_steps(), record.summary["tipping_step"]
    if not steps:
        return []
    occasions = [("first", steps[0]), ("last", steps[-1])]
    if tip is not None:
        occasions.insert(1, ("around the tipping point", min(steps, key=lambda step: abs(step - tip))))
    return [
        {
            "step": step,
            "occasions": [name for name, at in occasions if at == step],
            "episodes": [_conversation(episode) for episode in _two(record.episodes(step))],
        }
        for step in sorted({step for _, step in occasions})
    ]


def _two(episodes: Sequence[EpisodeFields]) -> list[EpisodeFields]:
    """The first episode and the first one after it that went differently, or else the second: no other selection."""
    verdicts = [[turn["verdict"] for turn in episode["turns"]] for episode in episodes]
    other = next((i for i, v in enumerate(verdicts) if v != verdicts[0]), 1)
    return [*episodes[:1], *episodes[other : other + 1]]


def _conversation(episode: EpisodeFields) -> dict[str, Any]:
    """Its messages by seat: who speaks, what, and of a reply the turn that scored it (the last replies are those of the
    last turns). What follows a call of a tool is the tool's output, whatever the role it is told in."""
    seats = []
    for seat, messages in list(episode["messages"].items())[:SHOWN_SEATS]:
        turns = iter([turn for turn in reversed(episode["turns"]) if turn["seat"] == seat])
        paired = [(m, next(turns, None) if m["role"] == "assistant" else None) for m in reversed(messages)]
        shown, called = [], False
        for message, turn in reversed(paired):
            role = "tool" if called and message["role"] != "assistant" else message["role"]
            shown.append((role, message["content"], turn))
            called = turn is not None and turn["verdict"] is None
        seats.append((seat, shown))
    return {"episode": episode, "seats": seats, "more_seats": len(episode["messages"]) - len(seats)}


def _outcome(turn: TurnFields) -> str:
    """What came of a reply, after its verdict."""
    said = [", detected" if turn["detected"] else "", "" if turn.get("ruled", True) else ", nothing was demanded"]
    parts = [f"chose {turn['choice']}"] if turn["choice"] else []
    parts += [f"payoff {turn['payoff']:g}"]
    parts += [] if turn["supervised"] is None else ["told supervised" if turn["supervised"] else "told unsupervised"]
    parts += [f"{name.replace('_', ' ')}: {_word(value)}" for name, value in turn.get("facts", {}).items()]
    return " · ".join(["".join(said), *parts])


def _word(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
