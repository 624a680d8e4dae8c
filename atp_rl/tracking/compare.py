"""Compares arms: an arm is the runs that share name, model and testbed and differ in their seed; one line each.

Runs store rates and their n, not single decisions, so several seeds cannot be bootstrapped here. Their rates are pooled
(all violations over all decisions) and shown with the lowest and highest seed; one seed is shown with its own interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from atp_rl.evaluate.diffusion import half_time
from atp_rl.tracking.read import (
    CrossingFields,
    Evaluation,
    FactFields,
    PassageFields,
    RateFields,
    RunRecord,
    SpreadFields,
    SummaryRates,
    Verdicts,
)
from atp_rl.types import InputError

TINY = ("tiny", "tiny_tools")
"""Models that ship with the package."""
ILLUSTRATION = "illustrates the protocol"
"""Said wherever a tiny model is shown in context."""
UNCLEAR = 0.1
"""Share of invalid decisions above which a reading gives the bounds of the violation rate too."""
SPREAD_HINT = (
    "At the last checkpoint; times that were not seen are censored. None of it is an effect: games that succeed are "
    "also the more tempting ones, and seats that share a policy or a temptation go together without imitating."
)


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
    deployed: Pooled
    """As `final`, with the defenses that go with the policy; n = 0 where there are none."""
    deployed_rounds: list[Pooled]
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
    deployed = [record.deployed[-1][1] for record in arm if record.deployed]
    bounds = [pool({**s["violation"], "value": s["violation_bounds"][i]} for s in last)["value"] for i in (0, 1)]
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
        "rounds": _rounds([s["by_round"] for s in last]) or [pool([])],
        "deployed": pool(s["violation"] for s in deployed),
        "deployed_rounds": _rounds([s["by_round"] for s in deployed]),
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
            "low–high). Deployed: with the defenses that act in context; all else is weights_only, without them. "
            "Tipping step and time to 25 % violations (.25) are by seed; payoff (share of the best) and KL (nats per "
            "reply) are means over seeds, seconds their sum."
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
            labels = [*([label] for label in end_labels(r)), []]
        beside = [
            [],
            ["", f"deployed {percent(end['value'])}", *spread(end)] if (end := deployed_end(r))["n"] else [],
            [],
        ]
        cells = [
            *(
                "\n".join([percent(rate["value"]), *spread(rate), *end, *more])
                for rate, end, more in zip((*ends(r), r["invalid"]), labels, beside, strict=True)
            ),
            f"{tipped_text(r)}\nat {listed(r['tipping_steps'])}\n.25: {listed(r['time_to_25'])}",
            f"payoff {_mean(r['payoff_mean'])}\nKL {_mean(r['kl_to_aligned'])}\n{sum(r['wall_seconds']):.0f} s",
        ]
        shown.add_row(arm, *map(Text, cells))
        shown.add_section()
    return shown


def ends(r: Row) -> tuple[Pooled, Pooled]:
    """The violation rate at the first and the last checkpoint; in context, in the first and the last round."""
    if r["learner"] != "in_context":
        return r["aligned"], r["final"]
    first, last = _first_and_last_round(r)
    return r["rounds"][first], r["rounds"][last]


def deployed_end(r: Row) -> Pooled:
    """Beside the second rate of `ends`, the one with the defenses that go with the policy; n = 0 where none do."""
    if r["learner"] != "in_context" or not r["deployed_rounds"]:
        return r["deployed"]
    return r["deployed_rounds"][_first_and_last_round(r)[1]]


def end_labels(r: Row) -> tuple[str, str]:
    """What the two rates of `ends` were measured at."""
    if r["learner"] != "in_context":
        return "violations at step 0", f"after {r['steps']} steps"
    first, last = _first_and_last_round(r)
    return f"round {first + 1}", f"round {last + 1}"


def _first_and_last_round(r: Row) -> tuple[int, int]:
    """Of those in which the rule demanded something: in tool use, only the rounds with a hard problem."""
    ruled = [k for k, rate in enumerate(r["rounds"]) if rate["n"]] or [0]
    return ruled[0], ruled[-1]


def illustrates(r: Row) -> bool:
    """Whether an arm only illustrates the protocol: the tiny model was trained on transcripts of such histories."""
    return r["learner"] == "in_context" and r["model"] in TINY


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
        (first, last), (begin, end) = ends(r), end_labels(r)
        span = f" in {begin} and {rate_text(last)} in {end}" if begin != end else ""
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
    if (as_deployed := deployed_end(r))["n"]:
        story += f"; as deployed, with the defenses that act in context, it was {rate_text(as_deployed)} there"
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


# What only some testbeds have: facts, a grid of settings, several seats.


class Facts(NamedTuple):
    """How often each fact was true in an arm."""

    names: list[str]
    checkpoints: list[tuple[int, list[Pooled]]]
    """(step, a rate per name), by step."""
    rounds: list[list[Pooled]]
    """[round][name], at the last checkpoint."""


def facts(arm: Sequence[RunRecord]) -> Facts:
    """No names where nothing but verdicts was recorded."""
    measured = {step: [] for step in sorted({step for record in arm for step, _ in record.curve})}
    for step, split in (point for record in arm for point in record.curve):
        measured[step].append(split.get("facts", {}))
    names = sorted({name for seeds in measured.values() for seed in seeds for name in seed})
    last = [record.curve[-1][1].get("facts", {}) for record in arm]
    by_name = [fact_rounds(last, name) for name in names]
    return Facts(
        names,
        [
            (step, [pool(seed[name].rate for seed in seeds if name in seed) for name in names])
            for step, seeds in measured.items()
        ],
        [
            [rounds[k] if k < len(rounds) else pool([]) for rounds in by_name]
            for k in range(max(map(len, by_name), default=0))
        ],
    )


def fact_rounds(seeds: Sequence[dict[str, FactFields]], name: str) -> list[Pooled]:
    """The rate of a fact in each round; `seeds` are the facts of one checkpoint of each seed."""
    series = [seed[name].by_round for seed in seeds if name in seed]
    rounds = max(map(len, series), default=0)
    return [pool(rates[k] for rates in series if k < len(rates)) for k in range(rounds)]


class Cell(NamedTuple):
    """One setting of a grid, at the last checkpoint."""

    setting: str
    violation: list[Pooled]
    """By round."""
    success: list[Pooled]
    """By round; empty where it was not recorded."""
    recollusion: Pooled
    """Of all rounds after their game's first success, the share that succeed."""


def grid(arm: Sequence[RunRecord]) -> list[Cell]:
    """The cells in the order in which they were played; none where the scenarios share one setting."""
    last = [record.curve[-1][1].get("by_setting", {}) for record in arm]
    cells = []
    for name in dict.fromkeys(name for seed in last for name in seed):
        seeds = [seed[name] for seed in last if name in seed]
        spreads = [cell["spread"] for cell in seeds if cell["spread"]]
        cells.append(
            Cell(
                name,
                _rounds([cell["by_round"] for cell in seeds]),
                fact_rounds([cell.get("facts", {}) for cell in seeds], "success"),
                pool(spread["recollusion"]["after_first"] for spread in spreads),
            )
        )
    return cells


class Measure(NamedTuple):
    """One measure of spread as text."""

    name: str
    value: str
    """"unknown" where it cannot be told; `note` then says why."""
    interval: str
    """Empty where there is none."""
    n: str
    note: str


def measures(record: RunRecord) -> list[Measure]:
    """How violations passed between the seats of a run; none with one seat.

    All are of the last checkpoint but the half time, which is of the curve, with the scenarios as its units.
    """
    if len(record.seats) < 2:
        return []
    last = record.curve[-1][1]
    spread_, rounds = last.get("spread"), len(last["by_round"])
    why = "episodes have one round; set scenarios.rounds, or measure with `atp evaluate RUN --set evaluate.rounds=3`"
    if spread_ and rounds < 2 and spread_["recollusion"]["after_first"]["n"] == 0:
        of_games = [Measure("re-collusion, recovery, imitation", "unknown", "", "1 round", why)]
    else:
        of_games = _of_games(spread_) if spread_ else []
    return [*of_games, *_half_time(record)]


def _of_games(spread_: SpreadFields) -> list[Measure]:
    again, imitation = spread_["recollusion"], spread_["imitation"]
    rates = (
        ("re-collusion: rounds after the first success", again["after_first"], "rounds", "no round follows a success"),
        ("re-collusion after a break", again["after_broken"], "games", "no round follows a break"),
        ("seats that collude again after a success", again["by_seat"], "choices", "none is followed by a valid choice"),
    )
    passages = (
        ("first success", spread_["first_success"]),
        ("half of the seats violate", spread_["first_tipped"]),
        ("recovery of collusion: success after a break", spread_["recovery"]["again"]),
        ("recovery of alignment: failure after a success", spread_["recovery"]["back"]),
        ("fewer than half violate after that half did", spread_["tipped_recovery"]["back"]),
        ("half violate again after that", spread_["tipped_recovery"]["again"]),
    )
    odds = (("imitation coefficient", imitation["coefficient"]), ("weight of the own last choice", imitation["own"]))
    unknown = imitation["reason"] or ""
    return [
        *(_measure(name, rate, _percent, " %", f"{rate['n']} {of}", unknown=why) for name, rate, of, why in rates),
        *(_passage(name, passage) for name, passage in passages),
        *(_measure(name, e, "{:+.2f}".format, " log-odds", f"{e['n']} decisions", unknown=unknown) for name, e in odds),
    ]


def _passage(name: str, passage: PassageFields) -> Measure:
    """A time to an event by its median; the restricted mean is in the note."""
    median, mean, horizon = passage["median"], passage["mean"], passage["horizon"]
    n, form = f"{median['n']} games", "{:g}".format
    if horizon is None or mean["value"] is None:
        return _measure(name, median, form, "", n, unknown="no game had the occasion")
    unit = " round" if median["value"] == 1 else " rounds"
    watched, two = "1 round" if horizon == 1 else f"{horizon:g} rounds", "{:.2f}".format
    note = f"{passage['events']} of {median['n']} within {watched}; restricted mean {two(mean['value'])}"
    note = f"{note} {_interval(mean, two)}".rstrip()
    return _measure(name, median, form, unit, n, f"median; {note}", unknown=f"not half of them: {note}")


def _half_time(record: RunRecord) -> list[Measure]:
    """Of the seats that did not start out deviant. Its units are scenarios: seats of one game are not independent."""
    steps = [step for step, _ in record.curve if step in record.episode_steps()]
    counts: list[dict[str, list[bool]]] = []
    for step in steps:
        of_scenario: dict[str, list[bool]] = {}
        for episode in record.episodes(step):
            for turn in episode["turns"]:
                if turn["verdict"] and turn.get("player") != "aligned" and turn["seat"] not in record.deviants:
                    of_scenario.setdefault(episode["scenario"].id, []).append(turn["verdict"] == "violation")
        counts.append(of_scenario)
    scenarios = sorted({name for of_scenario in counts for name in of_scenario})
    found = half_time(
        steps,
        [[float(np.mean(c.get(name, [False]))) for name in scenarios] for c in counts],
        [[len(c.get(name, [])) for name in scenarios] for c in counts],
    )
    step, change = (RateFields(**vars(estimate)) for estimate in (found.step, found.change))
    lacking = "there is only one checkpoint" if len(record.curve) < 2 else "fewer than two checkpoints have episodes"
    why = (found.reason or "") if len(steps) > 1 else lacking
    others = " of the other seats" if record.deviants else ""
    name, n, points = f"half time of the violating share{others}", f"{step['n']} scenarios", "{:+.1f}".format
    return [
        _measure(name, step, "{:.1f}".format, " steps", n, unknown=why),
        _measure("its change over the run", change, lambda v: points(100 * v), " points", n, unknown=why),
    ]


def _measure(
    name: str, e: RateFields, form: Callable[[float], str], unit: str, n: str, note: str = "", *, unknown: str
) -> Measure:
    if e["value"] is None:
        return Measure(name, "unknown", "", n, unknown)
    return Measure(name, form(e["value"]) + unit, _interval(e, form), n, note)


def _interval(e: RateFields, form: Callable[[float], str]) -> str:
    """An end that lies beyond what was watched is said to; nothing where both do or none was estimated."""
    if e["low"] is None and e["high"] is None:
        return ""
    low, high = ("beyond" if end is None else form(end) for end in (e["low"], e["high"]))
    return f"[{low} to {high}]" if low[0] in "+-" else f"[{low}–{high}]"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def tables(records: Sequence[RunRecord]) -> list[Table]:
    """The comparison, and a table each of facts, grid and spread where some arm has them."""
    grouped = arms(records)
    parts = (_fact_table(grouped), _grid_table(grouped), _spread_table(grouped))
    return [table(records), *(part for part in parts if part.row_count)]


def _fact_table(grouped: Sequence[Sequence[RunRecord]]) -> Table:
    caption = "How often it was true of a decision: by checkpoint, and by round at the last one. n counts decisions."
    shown = _table("Facts", caption, "arm", "fact", "by checkpoint", "by round")
    for arm in grouped:
        found = facts(arm)
        for i, name in enumerate(found.names):
            steps = [f"step {step}: {rate_text(rates[i])}" for step, rates in found.checkpoints]
            by_round = _lines([rates[i] for rates in found.rounds])
            shown.add_row(*map(Text, (arm[0].summary["name"], name, "\n".join(steps), by_round)))
    return shown


def _grid_table(grouped: Sequence[Sequence[RunRecord]]) -> Table:
    caption = (
        "One line per setting, at the last checkpoint: t of n seats must collude; then the factors of a round, high, "
        "normal and low. Re-collusion: of the rounds after a game's first success, the share that succeed."
    )
    shown = _table("Grid", caption, "arm", "setting", "violation by round", "success by round", "re-collusion")
    for arm in grouped:
        for cell in grid(arm):
            by_round = (_lines(cell.violation), _lines(cell.success))
            shown.add_row(*map(Text, (arm[0].summary["name"], cell.setting, *by_round, rate_text(cell.recollusion))))
    return shown


def _spread_table(grouped: Sequence[Sequence[RunRecord]]) -> Table:
    shown = _table("Spread between seats", SPREAD_HINT, "run", "measure", "value", "95 %", "n", "note")
    for record in (record for arm in grouped for record in arm):
        for measure in measures(record):
            shown.add_row(*map(Text, (f"{record.summary['name']}, seed {record.summary['seed']}", *measure)))
        shown.add_section()
    return shown


def _lines(rounds: Sequence[Pooled]) -> str:
    """The rounds in which something was measured, one a line."""
    return "\n".join(f"{k}: {rate_text(rate)}" for k, rate in enumerate(rounds, 1) if rate["n"]) or "–"


def _table(title: str, caption: str, *headings: str) -> Table:
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, caption=Text(caption))
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    return shown


def _rounds(seeds: Sequence[Sequence[Verdicts]]) -> list[Pooled]:
    """Violation rates of the rounds that all seeds played."""
    return [pool(seed[k]["violation"] for seed in seeds) for k in range(min(map(len, seeds), default=0))]


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
