"""Compares arms: an arm is the runs that share name, model and testbed and differ in their seed; one line each.

Runs store rates and their n, not single decisions, so several seeds cannot be bootstrapped here. Their rates are pooled
(all violations over all decisions) and shown with the lowest and highest seed; one seed is shown with its own interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from atp_rl.tracking.read import CrossingFields, Evaluation, RateFields, RunRecord, SummaryRates
from atp_rl.types import InputError

ILLUSTRATION = "illustrates the protocol"
"""Said wherever the tiny model is shown in context."""
UNCLEAR = 0.1
"""Share of invalid decisions above which a reading gives the bounds of the violation rate too."""


class Pooled(RateFields):
    """The rate of an arm."""

    interval: Literal["95 %", "seeds"]
    """What low and high are: the interval of the only seed, or the lowest and the highest of several seeds."""


class Row(TypedDict):
    """One arm in numbers; lists are by seed."""

    arm: str
    model: str
    testbed: str
    learner: str
    split: str
    seeds: list[int]
    complete: bool
    aligned: Pooled
    final: Pooled
    invalid: Pooled
    """At the last checkpoint, as `final`."""
    bounds: tuple[float | None, float | None]
    """The final violation rate with invalid decisions counted as compliant, and as violating."""
    rounds: list[Pooled]
    """Violation by round at the last checkpoint."""
    steps: int
    tipped: int
    """Number of seeds."""
    tipping_steps: list[int | None]
    time_to_25: list[str]
    """First step whose lower bound passes 25 % violations; ">60" where none up to step 60 did, "–" without steps."""
    payoff_mean: list[float]
    """At the last checkpoint, as a share of the best payoff."""
    kl_to_aligned: list[float | None]
    """At the last checkpoint, in nats per reply."""
    wall_seconds: list[float]


def arms(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The runs of each arm by seed; arms in the order in which they were given."""
    grouped: dict[tuple[str, str, str], dict[int, RunRecord]] = {}
    for record in records:
        summary = record.summary
        seeds = grouped.setdefault((summary["name"], summary["model"], summary["testbed"]), {})
        if twin := seeds.get(summary["seed"]):
            raise InputError(f"{record.path} and {twin.path} are both {summary['name']} with seed {summary['seed']}")
        seeds[summary["seed"]] = record
    return [[seeds[seed] for seed in sorted(seeds)] for seeds in grouped.values()]


def rows(records: Sequence[RunRecord]) -> list[Row]:
    """One line of numbers per arm, ready for JSON."""
    return [row(arm) for arm in arms(records)]


def row(arm: Sequence[RunRecord]) -> Row:
    """The numbers of one arm."""
    summaries, last = [record.summary for record in arm], [record.curve[-1][1] for record in arm]
    bounds = [pool({**s["violation"], "value": s["violation_bounds"][i]} for s in last)["value"] for i in (0, 1)]
    rounds = min(len(s["by_round"]) for s in last)
    crossings = [s["time_to"]["0.25"] for s in summaries]
    return {
        "arm": summaries[0]["name"],
        "model": summaries[0]["model"],
        "testbed": summaries[0]["testbed"],
        "learner": arm[0].learner,
        "split": arm[0].split.replace("_", "-"),
        "seeds": [s["seed"] for s in summaries],
        "complete": all(s["complete"] for s in summaries),
        "aligned": pool(_violation(s["aligned"]) for s in summaries),
        "final": pool(_violation(s["final"]) for s in summaries),
        "invalid": pool(s["invalid"] for s in last),
        "bounds": (bounds[0], bounds[1]),
        "rounds": [pool(s["by_round"][k]["violation"] for s in last) for k in range(rounds)],
        "steps": max(s["steps"] for s in summaries),
        "tipped": sum(s["tipped"] for s in summaries),
        "tipping_steps": [s["tipping_step"] for s in summaries],
        "time_to_25": [crossing_text(c) if c["censored_at"] else "–" for c in crossings],
        "payoff_mean": [s["payoff_mean"] for s in last],
        "kl_to_aligned": [s["kl_to_aligned"] for s in last],
        "wall_seconds": [s["wall_seconds"] for s in summaries],
    }


def pool(rates: Iterable[RateFields]) -> Pooled:
    """The rate over the decisions of all seeds, one rate each; seeds without decisions do not count."""
    measured = [(r["value"], r) for r in rates if r["value"] is not None]
    n = sum(r["n"] for _, r in measured)
    if not measured:
        return {"value": None, "low": None, "high": None, "n": 0, "interval": "95 %"}
    if len(measured) == 1:
        return {**measured[0][1], "interval": "95 %"}
    values = [value for value, _ in measured]
    pooled = sum(value * r["n"] for value, r in measured) / n
    return {"value": pooled, "low": min(values), "high": max(values), "n": n, "interval": "seeds"}


def table(records: Sequence[RunRecord]) -> Table:
    """The comparison for a terminal, of 80 characters or more."""
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=Text(
            "Violation rates at the first and last checkpoint (in context: round), and the invalid rate, with n: of "
            "one seed with its 95 % interval [low–high], of several pooled with their lowest and highest (seeds "
            "low–high). Tipping step and time to 25 % violations (.25) are by seed; payoff (share of the best) and KL "
            "(nats per reply) are means over seeds, seconds their sum."
        ),
    )
    shown.add_column("arm", overflow="fold")
    for heading in ("start", "end", "invalid"):
        shown.add_column(heading, justify="right", min_width=11)
    for heading in ("tipped", "at the end"):
        shown.add_column(heading, justify="right")
    for r in rows(records):
        arm = Text(r["arm"]).append(f"\n{seeds_text(r)}\n{r['model']}, {r['testbed']}", style="dim")
        if not r["complete"]:
            arm.append("\nincomplete", style="yellow")
        labels = [[], [], []]
        if r["learner"] == "in_context":
            arm.append(f"\n{ILLUSTRATION if illustrates(r) else 'in context'}", style="dim")
            labels = [["round 1"], [f"round {len(r['rounds'])}"], []]
        cells = [
            *(
                "\n".join([percent(rate["value"]), *spread(rate), *end])
                for rate, end in zip((*ends(r), r["invalid"]), labels, strict=True)
            ),
            f"{tipped_text(r)}\nat {listed(r['tipping_steps'])}\n.25: {listed(r['time_to_25'])}",
            f"payoff {_mean(r['payoff_mean'])}\nKL {_mean(r['kl_to_aligned'])}\n{sum(r['wall_seconds']):.0f} s",
        ]
        shown.add_row(arm, *map(Text, cells))
        shown.add_section()
    return shown


def ends(r: Row) -> tuple[Pooled, Pooled]:
    """The violation rate at the first and the last checkpoint; in context, in the first and the last round."""
    return (r["rounds"][0], r["rounds"][-1]) if r["learner"] == "in_context" else (r["aligned"], r["final"])


def illustrates(r: Row) -> bool:
    """Whether an arm only illustrates the protocol: the tiny model was trained on transcripts of such histories."""
    return r["learner"] == "in_context" and r["model"] == "tiny"


def evaluation_table(evaluations: Sequence[Evaluation]) -> Table:
    """For a terminal: every split of every checkpoint, from lines as `evaluations.jsonl` holds them."""
    shown = Table(
        box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption="Rates with their 95 % interval and n."
    )
    for heading in ("step", "split", "violation", "invalid", "propensity", "payoff", "KL"):
        shown.add_column(heading, justify="left" if heading == "split" else "right")
    for evaluation in evaluations:
        for name, split in evaluation["splits"].items():
            rates = (rate_text(pool([split[key]])) for key in ("violation", "invalid"))
            means = (_mean([split[key]]) for key in ("propensity", "payoff_mean", "kl_to_aligned"))
            shown.add_row(str(evaluation["step"]), name.replace("_", "-"), *map(Text, (*rates, *means)))
    return shown


def reading(r: Row) -> str:
    """One sentence that says what became of an arm."""
    seeds = len(r["seeds"])
    who = "the only seed" if seeds == 1 else f"{seeds} seeds"
    if r["learner"] == "in_context":
        first, last = r["rounds"][0], r["rounds"][-1]
        span = f" in round 1 and {rate_text(last)} in round {len(r['rounds'])}" if len(r["rounds"]) > 1 else ""
        story = f"Without any update of its weights, the violation rate was {rate_text(first)}{span} ({who})"
    else:
        steps = [s for s in r["tipping_steps"] if s is not None]
        at = f" (step {listed(steps)})" if steps else ""
        tipped = (
            f"tipped in {r['tipped']} of {who}{at}"
            if seeds > 1
            else f"{who} {'tipped' if r['tipped'] else 'did not tip'}{at}"
        )
        story = (f"The violation rate {_movement(r['aligned'], r['final'])} {rate_text(r['aligned'])} to "
                 f"{rate_text(r['final'])} in {r['steps']} steps; {tipped}")  # fmt: skip
    decisions = "decisions" if r["learner"] == "in_context" else "last decisions"
    story += f"; {rate_text(r['invalid'])} of the {decisions} were invalid"
    if (r["invalid"]["value"] or 0) > UNCLEAR:
        story += f", so the final violation rate lies between {percent(r['bounds'][0])} and {percent(r['bounds'][1])}"
    return story + "."


def rate_text(rate: Pooled) -> str:
    """E.g. "4.2 % [2.0–7.8], n = 200", or "4.2 % (seeds 3.5–5.0), n = 600"."""
    *interval, n = spread(rate)
    return f"{' '.join([percent(rate['value']), *interval])}, {n}"


def spread(rate: Pooled) -> list[str]:
    """Interval and n of a rate; only n where nothing was measured."""
    if rate["low"] is None or rate["high"] is None:
        return [f"n = {rate['n']}"]
    span = f"{100 * rate['low']:.1f}–{100 * rate['high']:.1f}"
    return [f"[{span}]" if rate["interval"] == "95 %" else f"(seeds {span})", f"n = {rate['n']}"]


def percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"


def mean_text(values: Sequence[float | None]) -> str:
    """The mean over seeds, with the lowest and highest of several; "–" where nothing was measured."""
    measured = [v for v in values if v is not None]
    if len(measured) < 2:
        return _mean(measured)
    return f"{_mean(measured)} (seeds {min(measured):.2f}–{max(measured):.2f})"


def _mean(values: Sequence[float | None]) -> str:
    measured = [v for v in values if v is not None]
    return f"{sum(measured) / len(measured):.2f}" if measured else "–"


def seeds_text(r: Row) -> str:
    return f"seed {r['seeds'][0]}" if len(r["seeds"]) == 1 else f"{len(r['seeds'])} seeds: {listed(r['seeds'])}"


def tipped_text(r: Row) -> str:
    """E.g. "1 of 3"; "–" without steps, along which a tipping point is looked for."""
    return f"{r['tipped']} of {len(r['seeds'])}" if r["steps"] else "–"


def listed(values: Iterable[Any]) -> str:
    return ", ".join("–" if v is None else str(v) for v in values)


def crossing_text(crossing: CrossingFields) -> str:
    """The step of a crossing; ">60" where it is censored at step 60, "–" where no step was taken."""
    if crossing["step"] is not None:
        return str(crossing["step"])
    return f">{crossing['censored_at']}" if crossing["censored_at"] else "–"


def _violation(rates: SummaryRates) -> RateFields:
    return {"value": rates["violation_rate"], "low": rates["ci_low"], "high": rates["ci_high"], "n": rates["n"]}


def _movement(before: Pooled, after: Pooled) -> str:
    """How the rate moved, said only where the two intervals (or ranges of seeds) do not touch."""
    if before["low"] is None or before["high"] is None or after["low"] is None or after["high"] is None:
        return "went from"
    if before["high"] < after["low"]:
        return "rose from"
    if after["high"] < before["low"]:
        return "fell from"
    return "did not clearly move: from" if after["interval"] == "95 %" else "went from"
