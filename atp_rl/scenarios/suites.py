"""Which scenarios are aligned on, trained on, gated on and reported: disjoint, and the same for every arm and seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from atp_rl.scenarios import load
from atp_rl.types import InputError, Scenario

FIRST_INDEX = {"train": 0, "align": 100_000, "gate": 200_000, "held_in": 300_000}
"""Scenarios of the training families by index range: the suites share families, never a scenario."""


@dataclass(frozen=True)
class Suites:
    align: list[Scenario]
    """Alignment's preference pairs and prompts come from these."""
    train: list[Scenario]
    """Evolution draws from these."""
    gate: list[Scenario]
    """What a gate sees after each step."""
    held_in: list[Scenario]
    """Reported: new scenarios of the training families."""
    held_out: list[Scenario]
    """Reported: families that were never trained on. The headline figures are theirs."""

    def changed(self, change: Callable[[Scenario], Scenario]) -> Suites:
        """The same suites with another form of every scenario."""
        return Suites(**{name: [change(scenario) for scenario in suite] for name, suite in vars(self).items()})


def make_suites(
    spec: Mapping[str, Any], *, train: int, align: int, gate: int, report: int, trained_on: bool = True
) -> Suites:
    """Divide up the scenarios that `spec` describes (as for `scenarios.load`, without split and counts).

    Shipped families have their split, and the counts are scenarios per family; of held-in scenarios there are about as
    many as of held-out ones. Scenarios from a file come as many as they are: every third family is held out (or those
    that the file marks so, if it marks some and not all), and in the others every fourth scenario is a gate one, every
    fourth a held-in one, and the rest are for alignment and training.

    Args:
        trained_on: whether anything learns from them. If not, all scenarios of a file are held out.

    Raises:
        InputError: a suite would be empty.
    """
    if spec.get("paper") or spec.get("file"):
        scenarios = load(spec)
        if not trained_on:
            return Suites([], [], [], [], scenarios)
        return _divide(scenarios, str(spec.get("paper") or spec.get("file")))

    def suite(name: str, per_family: int) -> list[Scenario]:
        return load({**spec, "split": "train", "per_family": per_family, "first_index": FIRST_INDEX[name]})

    held_out, trained = load({**spec, "split": "held_out", "per_family": report}), suite("train", train)
    families = len(trained) // train  # of every cell of a grid
    return Suites(
        align=suite("align", align),
        train=trained,
        gate=suite("gate", gate),
        held_in=suite("held_in", -(-len(held_out) // families)),
        held_out=held_out,
    )


def _divide(scenarios: list[Scenario], origin: str) -> Suites:
    families = list(dict.fromkeys(scenario.family for scenario in scenarios))
    marked = {scenario.family for scenario in scenarios if scenario.split == "held_out"}
    away = marked if 0 < len(marked) < len(families) else set(families[2::3])
    position: dict[str, int] = {}  # of a grid's cells each fourth one is shifted, or all of one suite had one threshold
    dealt: list[list[Scenario]] = [[], [], [], []]
    held_out = [scenario for scenario in scenarios if scenario.family in away]
    for scenario in scenarios:
        if scenario.family not in away:
            position[scenario.family] = position.get(scenario.family, -1) + 1
            place = position[scenario.family]
            dealt[(place + (place // 4 if "setting" in scenario.extra else 0)) % 4].append(scenario)
    train = dealt[0] + dealt[1]
    if not (train and dealt[2] and dealt[3] and held_out):
        raise InputError(
            f"{origin}: too few scenarios to divide into training, gate, held-in and held-out ones; "
            "give at least 3 families with 4 scenarios each"
        )
    return Suites(align=train, train=train, gate=dealt[2], held_in=dealt[3], held_out=held_out)
