"""Scenarios (frozen data) and their environments (behaviour).

scenarios = load({"testbed": "role_play", "split": "held_out", "per_family": 8})
env = make_env(scenarios[0], rounds=6, supervision="alternating", seed=0, history_window=5)
while chats := env.observe():                       # {seat: messages}, pending seats only
    outcomes = env.step({seat: reply(messages) for seat, messages in chats.items()})
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from atp_rl.scenarios import files, role_play
from atp_rl.scenarios.env import Env, random_stream
from atp_rl.scenarios.role_play import RolePlay, Supervision, Told, check_supervision
from atp_rl.types import InputError, Key, Scenario

__all__ = ["Env", "Supervision", "Told", "check_supervision", "load", "make_env", "random_stream"]

ENVIRONMENTS = {"role_play": RolePlay}
SPEC_KEYS = ("testbed", "split", "families", "per_family", "first_index", "allowed", "seed", "paper", "file")


def load(spec: Mapping[str, Any] | str | Path) -> list[Scenario]:
    """The scenarios that `spec` describes, in a fixed order.

    Args:
        spec: a path of a JSONL file of scenarios (the same as `{"file": path}`), or a mapping with

            - `paper`: path of a role-play file of the paper, or `file`: path of a JSONL file; or else
            - `testbed`: "role_play" (default), whose shipped families are sampled:
            - `split`: "train" or "held_out"; both when left out,
            - `families`: names of families; all when left out,
            - `per_family`: scenarios per family (default 8),
            - `first_index`: index of the first one (default 0); disjoint ranges give disjoint scenarios,
            - `seed`: of the amounts, names and orders (default 0);
            - `allowed`: true for the over-compliance control, where the rule allows either option.

    Raises:
        InputError: unknown key, testbed, split or family; unreadable, malformed or empty file.
    """
    if isinstance(spec, str | Path):
        spec = {"file": spec}
    if unknown := set(spec) - set(SPEC_KEYS):
        raise InputError(f"scenarios: unknown key {_with_hint(min(unknown), SPEC_KEYS)}")
    allowed = bool(spec.get("allowed", False))
    if spec.get("paper") or spec.get("file"):
        scenarios = files.read_paper(Path(spec["paper"])) if spec.get("paper") else files.read_jsonl(Path(spec["file"]))
        for scenario in scenarios:
            _check_testbed(scenario, f"{spec.get('paper') or spec['file']}: ")
        return [role_play.allow(s) if allowed else s for s in scenarios]
    testbed = spec.get("testbed", "role_play")
    if testbed not in ENVIRONMENTS:
        raise InputError(f"scenarios: unknown testbed {_with_hint(testbed, ENVIRONMENTS)}")
    split = spec.get("split")
    if split not in (None, "train", "held_out"):
        raise InputError(f"scenarios: unknown split {_with_hint(split, ('train', 'held_out'))}")
    shipped = {family["family"]: family for family in role_play.families()}
    names = spec.get("families") or list(shipped)
    for name in names:
        if name not in shipped:
            raise InputError(f"scenarios: unknown family {_with_hint(name, shipped)}")
    chosen = [shipped[name] for name in names if split in (None, shipped[name]["split"])]
    if not chosen:
        raise InputError(f"scenarios: none of the families {', '.join(names)} is in the split {split!r}")
    first, count, seed = spec.get("first_index", 0), spec.get("per_family", 8), spec.get("seed", 0)
    return [
        role_play.generate(family=family, index=index, seed=seed, allowed=allowed)
        for family in chosen
        for index in range(first, first + count)
    ]


def make_env(
    scenario: Scenario,
    *,
    rounds: int,
    supervision: Supervision,
    seed: int | Key,
    history_window: int,
    told: Told | None = None,
    group_seed: Key | None = None,
) -> Env:
    """An environment that plays `scenario` once.

    Args:
        rounds: decisions per seat, >= 1.
        supervision: a pattern's name, or `{"probability": q, "fine": F}`.
        seed: everything random in it comes from here.
        history_window: how many past rounds stay in the conversation, >= 0.
        group_seed: what the agent is told under `random` supervision comes from here: one for all episodes of a group,
            which must start from the same prompt; `seed` where left out.
        told: an instruction to comply or to take the best-paid option; None in every evaluation.

    Raises:
        InputError: unknown testbed or supervision pattern.
    """
    _check_testbed(scenario)
    seed = (seed,) if isinstance(seed, int) else seed
    return ENVIRONMENTS[scenario.testbed](
        scenario,
        rounds=rounds,
        supervision=supervision,
        seed=seed,
        history_window=history_window,
        told=told,
        group_seed=group_seed,
    )


def _check_testbed(scenario: Scenario, where: str = "") -> None:
    if scenario.testbed not in ENVIRONMENTS:
        hint = _with_hint(scenario.testbed, ENVIRONMENTS)
        raise InputError(f"{where}scenario {scenario.id!r}: unknown testbed {hint}")


def _with_hint(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"{name!r}; {hint}"
