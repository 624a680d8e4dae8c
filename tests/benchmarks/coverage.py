"""How often the intervals hold a truth that is known, and tests cry wolf: `python -m tests.benchmarks.coverage`.

Each row draws data from a population whose truth is calculated (or averaged over a very large sample), many times, and
counts how often the 95 % interval holds it. Rates vary between scenarios and, where it says so, between seeds; in a
*tipping* population each seed tips (rate .8) or does not (.03), by chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.special import expit, logit

from atp_rl.evaluate import stats
from atp_rl.evaluate.changes import gap, retention_interval
from atp_rl.evaluate.contrasts import Contrast, mcnemar, paired_permutation, probability_of_improvement, two_level
from atp_rl.evaluate.early_warning import slowing_down
from atp_rl.evaluate.monitor_health import monitor_health
from atp_rl.evaluate.pareto import payoff_at, payoff_at_interval
from atp_rl.evaluate.stats import Crossing, Rate

Generator = np.random.Generator


@dataclass(frozen=True)
class Case:
    measure: str
    population: str
    truth: float
    draw: Callable[[Generator], Rate | Contrast]
    slow: bool = False
    """Bootstraps with scipy: some seconds per hundred repetitions."""


@dataclass(frozen=True)
class Row:
    measure: str
    population: str
    truth: float
    coverage: float
    """Share of repetitions whose interval holds the truth; an interval that is unknown does not count."""
    unknown: float
    """Share of repetitions that gave no interval."""
    width: float
    """Mean width."""
    rejections: float | None
    """Share of p-values below .05, where there is one."""


def run(case: Case, repetitions: int) -> Row:
    rng = np.random.default_rng(0)
    results = [case.draw(rng) for _ in range(repetitions)]
    known = [(r.low, r.high) for r in results if r.low is not None and r.high is not None]
    held = [low - 1e-9 <= case.truth <= high + 1e-9 for low, high in known]
    p_values = [r.p_value for r in results if isinstance(r, Contrast) and r.p_value is not None]
    return Row(
        case.measure,
        case.population,
        case.truth,
        float(np.mean(held)),
        1 - len(known) / repetitions,
        float(np.mean([high - low for low, high in known])),
        float(np.mean([p < 0.05 for p in p_values])) if p_values else None,
    )


def cases() -> Iterator[Case]:
    """All rows, those of one measure together."""
    for p, n in ((0.3, 64), (0.05, 64), (0.02, 200)):
        yield Case(
            "rate, 1 seed x 1 sample",
            f"{n} scenarios, rate {p}",
            p,
            lambda rng, p=p, n=n: stats.cluster_rate([rng.random((n, 1)) < p]),
        )
    yield from rates()
    yield from paired_scenarios()
    yield from paired_seeds()
    yield from survival()
    yield from seed_statistics()
    yield from monitor()


def _propensity(rng: Generator, seeds: int, scenarios: int, level: float, seed_spread: float) -> np.ndarray:
    """Rates [seed, scenario]: log-odds that vary by 1 between scenarios, and by `seed_spread` between seeds."""
    return expit(level + seed_spread * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, scenarios)))


def _tipping(rng: Generator, seeds: int, scenarios: int, chance: float) -> np.ndarray:
    """Rates [seed, scenario] of seeds that have tipped, with this chance, or not."""
    level = np.where(rng.random((seeds, 1)) < chance, logit(0.8), logit(0.03))
    return expit(level + 0.7 * rng.normal(size=(1, scenarios)))


def _played(rng: Generator, propensity: np.ndarray) -> list[np.ndarray]:
    return list(rng.random((*propensity.shape, 4)) < propensity[..., None])


def rates() -> Iterator[Case]:
    big = np.random.default_rng(1)
    populations: list[tuple[str, int, Callable[[Generator, int], np.ndarray]]] = [
        ("rate, 1 seed x 4 samples", 64, lambda rng, seeds: _propensity(rng, seeds, 64, -1, 0)),
        ("rate, 1 seed x 4 samples", 64, lambda rng, seeds: _propensity(rng, seeds, 64, -3, 0)),
    ]
    for name, scenarios, draw in populations:
        truth = float(np.mean([draw(big, 1).mean() for _ in range(20_000)]))
        yield Case(
            name,
            f"{scenarios} scenarios, rate {truth:.2f}",
            truth,
            lambda rng, draw=draw: stats.cluster_rate(_played(rng, draw(rng, 1))),
            slow=True,
        )
    many: list[tuple[str, Callable[[Generator, int], np.ndarray]]] = [
        ("seeds alike", lambda rng, seeds: _propensity(rng, seeds, 40, -1, 0)),
        ("seeds vary by .5", lambda rng, seeds: _propensity(rng, seeds, 40, -3, 0.5)),
        ("seeds vary by 1", lambda rng, seeds: _propensity(rng, seeds, 40, -1, 1)),
        ("40 % of seeds tip", lambda rng, seeds: _tipping(rng, seeds, 40, 0.4)),
    ]
    for name, draw in many:
        truth = float(np.mean([draw(big, 1000).mean() for _ in range(200)]))
        for seeds in (2, 3, 5, 10):
            yield Case(
                f"rate, {seeds} seeds x 4 samples",
                f"40 scenarios, {name}, rate {truth:.2f}",
                truth,
                lambda rng, draw=draw, seeds=seeds: stats.cluster_rate(_played(rng, draw(rng, seeds))),
            )


def paired_scenarios() -> Iterator[Case]:
    """One run against itself at another checkpoint, or against another run."""

    def pair(rng: Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        p = rng.beta(1, 9, n)
        return rng.binomial(4, p + 0.4 * (1 - p)) / 4, rng.binomial(4, p) / 4

    def discordant(rng: Generator, n: int, a: float, b: float) -> Contrast:
        kind = rng.choice(3, n, p=[a, b, 1 - a - b])
        return mcnemar(kind == 0, kind == 1)

    def sets(rng: Generator) -> Rate:
        held_out, held_in = ({i: [x] for i, x in enumerate(rng.random(40) < p)} for p in (0.3, 0.1))
        apart = {f"out {i}": x for i, x in held_out.items()}, {f"in {i}": x for i, x in held_in.items()}
        return gap(*apart).difference

    yield Case("decay", "64 scenarios x 4 samples", 0.36, lambda rng: stats.decay(*pair(rng, 64)), slow=True)
    yield Case("retention", "64 scenarios x 4 samples", 0.6, lambda rng: retention_interval(*pair(rng, 64)), slow=True)
    yield Case("gap, unpaired", "40 and 40 scenarios, .3 and .1", 0.2, sets)
    for n, a, b in ((64, 0.15, 0.05), (168, 0.15, 0.05), (408, 0.3, 0.2), (100, 0.1, 0.1)):
        yield Case(
            "McNemar",
            f"{n} pairs, discordant {a} and {b}",
            a - b,
            lambda rng, n=n, a=a, b=b: discordant(rng, n, a, b),
        )


def paired_seeds() -> Iterator[Case]:
    def tipped(rng: Generator, seeds: int, chance: float) -> np.ndarray:
        """RMST as a share of the horizon."""
        return np.where(rng.random(seeds) < chance, np.clip(rng.normal(0.4, 0.1, seeds), 0, 1), 1.0)

    for seeds in (3, 5, 10):
        yield Case(
            "difference over seeds",
            f"{seeds} pairs, normal",
            0.3,
            lambda rng, n=seeds: paired_permutation(0.3 + rng.normal(0, 0.4, n), np.zeros(n)),
        )
        yield Case(
            "difference over seeds",
            f"{seeds} pairs, normal, no difference",
            0.0,
            lambda rng, n=seeds: paired_permutation(rng.normal(0, 0.4, n), np.zeros(n)),
        )
        yield Case(
            "difference over seeds",
            f"{seeds} pairs, 20 % against 70 % tip",
            0.3,
            lambda rng, n=seeds: paired_permutation(tipped(rng, n, 0.2), tipped(rng, n, 0.7)),
        )
    for seeds in (3, 5, 10):
        for difference, spread in ((0.0, 0.1), (0.0, 0.0), (0.1, 0.1)):

            def cells(rng: Generator, seeds: int = seeds, d: float = difference, spread: float = spread) -> Contrast:
                own = 0.1 * rng.normal(size=(1, 40)) + spread * rng.normal(size=(seeds, 1))
                base = np.full((seeds, 40), 0.5)
                return two_level(rng.random((seeds, 40)) < base + d + own, rng.random((seeds, 40)) < base)

            name = f"{seeds} seeds x 40 scenarios, seeds vary by {spread}"
            yield Case("difference over both", name, difference, cells)


def survival() -> Iterator[Case]:
    big = np.random.default_rng(1)
    populations: list[tuple[str, Callable[[Generator, int], np.ndarray]]] = [
        ("exponential, mean 150", lambda rng, n: rng.exponential(150, n)),
        ("exponential, mean 600", lambda rng, n: rng.exponential(600, n)),
        ("40 % tip near 80", lambda rng, n: np.where(rng.random(n) < 0.4, rng.normal(80, 20, n), np.inf)),
        ("70 % tip near 80", lambda rng, n: np.where(rng.random(n) < 0.7, rng.normal(80, 20, n), np.inf)),
    ]

    def crossings(times: np.ndarray) -> list[Crossing]:
        seen = np.ceil(np.maximum(times, 1) / 10) * 10  # a checkpoint every 10 steps, 200 in all
        return [Crossing(int(t) if t <= 200 else None, 200) for t in seen]

    for name, draw in populations:
        truth = float(np.mean([200 if c.step is None else c.step for c in crossings(draw(big, 200_000))]))
        for seeds in (3, 5, 10):
            yield Case(
                f"RMST to 200, {seeds} seeds",
                name,
                truth,
                lambda rng, draw=draw, n=seeds: stats.rmst_interval(crossings(draw(rng, n)), 200),
            )
            yield Case(
                f"the same, Student's interval, {seeds} seeds",
                name,
                truth,
                lambda rng, draw=draw, n=seeds: stats.seed_mean(
                    [200 if c.step is None else c.step for c in crossings(draw(rng, n))]
                ),
            )


def seed_statistics() -> Iterator[Case]:
    big = np.random.default_rng(1)
    populations: list[tuple[str, Callable[[Generator, int], np.ndarray]]] = [
        ("normal", lambda rng, n: rng.normal(0.4, 0.1, n)),
        ("exponential", lambda rng, n: rng.exponential(0.1, n)),
        ("40 % of seeds tip", lambda rng, n: np.where(rng.random(n) < 0.4, 0.8, 0.1) + rng.normal(0, 0.05, n)),
    ]
    for name, draw in populations:
        for testbeds, seeds in ((1, 3), (1, 5), (1, 10), (3, 3), (3, 5), (3, 10)):

            def strata(rng: Generator, n: int, draw: Callable[..., np.ndarray] = draw, of: int = testbeds) -> list:
                return [draw(rng, n) + 0.15 * i for i in range(of)]

            yield Case(
                f"IQM, {testbeds} testbed(s) x {seeds} seeds",
                name,
                stats.interquartile_mean(np.concatenate(strata(big, 200_000))),
                lambda rng, strata=strata, n=seeds: stats.iqm_interval(strata(rng, n)),
            )
    for n in (5, 10):
        for shift, truth in ((0.0, 0.5), (1.0, 0.76025), (3.0, 0.98305)):  # Phi(shift / sqrt 2)
            yield Case(
                f"P(improvement), {n} against {n} seeds",
                f"normal, {shift:.0f} standard deviations apart",
                truth,
                lambda rng, n=n, d=shift: probability_of_improvement(rng.normal(d, 1, n), rng.normal(0, 1, n)),
            )

    def checkpoints(rng: Generator) -> list[tuple[float, float]]:
        """One run: violation and payoff rise together, and both are measured with noise."""
        level = np.linspace(-4, 1, 11) + rng.normal()
        violation, payoff = rng.binomial(200, expit(level)) / 200, expit(level + 1) + rng.normal(0, 0.02, 11)
        return list(zip([0.0, *violation], [0.0, *payoff], strict=True))

    best = [payoff_at(checkpoints(big)) for _ in range(20_000)]
    truth = float(np.mean([value for value in best if value is not None]))
    for seeds in (3, 5, 10):
        yield Case(
            f"payoff at violation <= 5 %, {seeds} seeds",
            "11 checkpoints",
            truth,
            lambda rng, n=seeds: payoff_at_interval([checkpoints(rng) for _ in range(n)]).payoff,
        )


def monitor() -> Iterator[Case]:
    def health(rng: Generator, later: float) -> Rate:
        violations = [rng.random((100, 1)) < p for p in (0.3, 0.5)]
        flags = [
            rng.random((100, 1)) < np.where(v, recall, 0.02) for v, recall in zip(violations, (0.9, later), strict=True)
        ]
        return monitor_health(flags, violations)[1].obfuscation

    for later in (0.9, 0.45):
        yield Case(
            "obfuscation",
            f"100 decisions, recall .9 to {later}",
            1 - later / 0.9,
            lambda rng, later=later: health(rng, later),
        )


def slowing_found(checkpoints: int, window: int, curves: int = 100) -> tuple[float, float]:
    """Share of curves whose memory grows from 0 to .98 that the trends of `early_warning.slowing_down` find, by
    autocorrelation and by variance: those above what 95 % of curves without memory stay below."""

    def trends(rng: Generator, memory: np.ndarray) -> tuple[float, float]:
        level, levels = 0.0, []
        for kept in memory:
            level = kept * level + 0.3 * rng.normal()
            levels.append(level)
        k = rng.binomial(1000, expit(np.array(levels) - 2))
        found = slowing_down(np.arange(checkpoints), k, np.full(checkpoints, 1000), window)
        return found.autocorrelation_trend or 0.0, found.variance_trend or 0.0

    slow, steady = (
        np.array([trends(np.random.default_rng(i), memory) for i in range(curves)])
        for memory in (np.linspace(0, 0.98, checkpoints), np.zeros(checkpoints))
    )
    by_autocorrelation, by_variance = (slow > np.quantile(steady, 0.95, axis=0)).mean(axis=0)
    return float(by_autocorrelation), float(by_variance)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| measure | population | truth | coverage | width | p < .05 |", "|---|---|---|---|---|---|"]
    for row in rows:
        unknown = f" ({row.unknown:.0%} unknown)" if row.unknown > 0.0005 else ""
        rejected = "" if row.rejections is None else f"{row.rejections:.3f}"
        lines.append(
            f"| {row.measure} | {row.population} | {row.truth:.3g} | {row.coverage:.3f}{unknown} | {row.width:.3g} "
            f"| {rejected} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.coverage", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--repetitions", type=int, default=1000, help="of each row (default 1000)")
    chosen = parser.parse_args()
    console, rows = Console(), []
    for case in cases():
        rows.append(run(case, chosen.repetitions))
        console.print(f"{rows[-1].measure}: {rows[-1].population}: {rows[-1].coverage:.3f}")
    text = table(rows) + "\n| checkpoints | window | slowing down found by autocorrelation | by variance |\n"
    text += "|---|---|---|---|\n"
    for checkpoints, window in ((20, 10), (50, 25), (100, 50), (300, 100)):
        by_autocorrelation, by_variance = slowing_found(checkpoints, window)
        text += f"| {checkpoints} | {window} | {by_autocorrelation:.2f} | {by_variance:.2f} |\n"
    chosen.out.write_text(text)
    console.print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
