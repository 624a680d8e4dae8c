"""Every defense in a run: the anchor stays where it is, and a resumed run is the undisturbed one to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from atp_rl.defenses import DEFENSES
from atp_rl.recipe import Recipe
from atp_rl.tracking.run import Interrupted, Run
from tests.small_model import checkpoint_files, reproducible, run_of, small_recipe, stop_before
from tests.small_pairs import aligned_with_pairs

OPTIONS: dict[str, str] = {
    "early_stop": "budget: 0.001",  # it stops in the second step
    "interleave": "rho: 0.5",
}
"""What a defense is given here, in YAML; the others have their defaults."""
GAME = (
    "scenarios.testbed=collusion",
    "scenarios.families=[bay_fishers,taxi_rank]",
    "scenarios.collusion={n: 3, threshold: 2}",
)
OF_GAMES = ("dissenters", "peer_hiding")
"""The others play role play."""
BEFORE: dict[str, str] = {"kl_anchor of the rule stream": "{name: interleave, rho: 0.5}"}
"""What it stands behind in the list."""
VARIANTS: dict[str, str] = {
    "gate, cusum": "name: gate, test: cusum, p0: 0.01, h: 1, cooldown: 1",
    "gate, e_process": "name: gate, test: e_process, count_invalid: true",
    "kl_anchor, reward": "name: kl_anchor, estimator: reward, target_kl: 0.1",
    "kl_anchor of the rule stream": "name: kl_anchor, estimator: bias_corrected, streams: rule, target_kl: 0.01",
    "monitor, screening": "name: monitor, mode: screening, kind: text, false_alarm: 0.3",
    "random_routing, screening": "name: random_routing, mode: screening",
}
CASES = [*DEFENSES, *VARIANTS]


def recipe_of(case: str, folder: Path) -> Recipe:
    default = ", ".join(part for part in (f"name: {case}", OPTIONS.get(case)) if part)
    listed = [part for part in (BEFORE.get(case), f"{{{VARIANTS.get(case, default)}}}") if part]
    settings = (f"evolve.start_from={aligned_with_pairs()}", "evaluate.every=1", "evolve.updates_per_step=2")
    world = GAME if case in OF_GAMES else ()
    return small_recipe(folder, f"defenses=[{', '.join(listed)}]", *settings, *world, steps=2, rounds=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], Run]:
    """Two steps with a defense that nothing interrupted."""
    return cache(lambda case: run_of(recipe_of(case, tmp_path_factory.mktemp("whole") / "run")))


@pytest.mark.parametrize("case", CASES)
def test_a_defense_runs_and_says_what_it_cost(case: str, whole: Callable[[str], Run]):
    run = whole(case)
    metrics = run.lines("metrics.jsonl")
    assert len(metrics) == 2
    assert len({m["drift/anchor_sha"] for m in metrics}) == 1
    name = case if case in DEFENSES else case.replace(",", " ").split()[0]
    for m in metrics:
        assert all(isinstance(value, str) or value == value for value in m.values())  # no nan
        assert {f"defense/{name}/{part}" for part in ("tokens", "forwards", "seconds")} <= m.keys()


@pytest.mark.parametrize("case", CASES)
def test_resuming_after_the_first_step_ends_with_the_same_bytes(case: str, whole: Callable[[str], Run], tmp_path):
    recipe = recipe_of(case, tmp_path / "run")
    with pytest.raises(Interrupted, match="stopped after step 1 of 2"):
        run_of(recipe, stop=stop_before(2))
    resumed, undisturbed = run_of(recipe), whole(case)

    def records(run: Run) -> list[list[dict[str, Any]]]:
        return [[reproducible(line) for line in run.lines(f"{name}.jsonl")] for name in ("metrics", "evaluations")]

    assert records(resumed) == records(undisturbed)
    for step in (0, 1, 2):
        assert checkpoint_files(resumed, step) == checkpoint_files(undisturbed, step)
