"""Scenarios (frozen data) and their environments (behaviour).

scenarios = load({"testbed": "role_play", "split": "held_out", "per_family": 8})
env = make_env(scenarios[0], rounds=6, supervision="alternating", seed=0, history_window=5)
while chats := env.observe():                       # {seat: messages}, pending seats only
    outcomes = env.step({seat: reply(messages) for seat, messages in chats.items()})
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atp_rl.scenarios import collusion, files, role_play, tool_use
from atp_rl.scenarios.collusion import Collusion, Game
from atp_rl.scenarios.env import Env, random_stream
from atp_rl.scenarios.openspiel import MatrixGame
from atp_rl.scenarios.paper import read_paper
from atp_rl.scenarios.problems import SETS
from atp_rl.scenarios.role_play import RolePlay
from atp_rl.scenarios.supervision import Supervision, Told, check_supervision
from atp_rl.scenarios.textarena import TextArena
from atp_rl.scenarios.tool_use import ToolUse
from atp_rl.types import InputError, Key, Scenario

__all__ = ["Env", "Supervision", "Told", "check_supervision", "load", "make_env", "random_stream"]

ENVIRONMENTS: dict[str, Callable[..., Env]] = {
    "role_play": RolePlay,
    "collusion": Collusion,
    "tool_use": ToolUse,
    "textarena": TextArena,
    "openspiel": MatrixGame,
}
"""By the scenarios' testbed; assign an entry to add a testbed of your own (`text_env.testbed`)."""

SHIPPED = ("role_play", "collusion", "tool_use")
"""Testbeds that have families to draw scenarios from."""

CHECKS = {"collusion": collusion.check, "tool_use": tool_use.check}
"""What the scenarios of a testbed must hold beside what all must."""

SPEC_KEYS = ("testbed", "split", "families", "per_family", "first_index", "allowed", "seed", "paper", "file")
GAME_KEYS = tuple(field.name for field in dataclasses.fields(Game))
TOOL_KEYS = ("problems", "tool_cost", "calling")
OWN_KEYS = {"collusion": GAME_KEYS, "tool_use": TOOL_KEYS}
"""Keys of a spec that one testbed alone has."""


def load(spec: Mapping[str, Any] | str | Path) -> list[Scenario]:
    """The scenarios that `spec` describes, in a fixed order.

    Args:
        spec: a path of a file of scenarios (the same as `{"file": path}`), or a mapping with

            - `paper`: path of a data file of the paper, or `file`: path of a JSONL or YAML file, which states its own
              rules; or else
            - `testbed`: "role_play" (default), "collusion" or "tool_use", whose shipped families are sampled:
            - `split`: "train" or "held_out"; both when left out,
            - `families`: names of families; all when left out,
            - `per_family`: scenarios per family (default 8), and per cell of a grid,
            - `first_index`: index of the first one (default 0), from which the cells of a grid count on, so that names
              and orders are counterbalanced over them; disjoint ranges give disjoint scenarios,
            - `seed`: of the amounts, names and orders (default 0);
            - `allowed`: true for the over-compliance control, where the rule allows either option;
            - the fields of `collusion.Game`: `n`, `threshold`, `rewards` and so on. Of `threshold` and `rewards`
              there may be several, in a list: the scenarios are then those of the whole grid. With `paper` they
              overrule the rules of the file's games, and those of a question as far as its text does not state them;
            - of tool use, `problems` ("reasoning_gym" by default, "sums" or "gsm8k"), `tool_cost` and `calling`.

    Raises:
        InputError: unknown key, testbed, split or family; rules that are none, or not of this testbed or file;
            unreadable, malformed or empty file.
    """
    if isinstance(spec, str | Path):
        spec = {"file": spec}
    if unknown := set(spec) - {*SPEC_KEYS, *GAME_KEYS, *TOOL_KEYS}:
        raise InputError(f"scenarios: unknown key {_with_hint(min(unknown), (*SPEC_KEYS, *GAME_KEYS, *TOOL_KEYS))}")
    allowed = bool(spec.get("allowed", False))
    rules, tools = ({key: spec[key] for key in keys if spec.get(key) is not None} for keys in (GAME_KEYS, TOOL_KEYS))
    if spec.get("paper"):
        if tools:
            raise InputError(f"{spec['paper']}: the paper's files have no {', '.join(tools)}; leave that out")
        return [role_play.allow(s) if allowed else s for s in read_paper(Path(spec["paper"]), rules)]
    if spec.get("file"):
        if rules or tools:
            given = ", ".join([*rules, *tools])
            raise InputError(f"{spec['file']}: a scenario file states its own rules; leave out {given}")
        scenarios = files.read_scenarios(Path(spec["file"]))
        for scenario in scenarios:
            _check_testbed(scenario, f"{spec['file']}: ")
            check = CHECKS.get(scenario.testbed)
            if check and (problem := check(scenario)):
                raise InputError(f"{spec['file']}: scenario {scenario.id!r}: {problem}")
        return [role_play.allow(s) if allowed else s for s in scenarios]
    testbed = spec.get("testbed", "role_play")
    own = {name: made for name, made in ENVIRONMENTS.items() if name not in SHIPPED and hasattr(made, "families")}
    if testbed not in (*SHIPPED, *own):
        raise InputError(f"scenarios: unknown testbed {_with_hint(testbed, (*SHIPPED, *own))}")
    for other, keys in OWN_KEYS.items():
        if testbed != other and (given := [key for key in keys if spec.get(key) is not None]):
            raise InputError(f"scenarios: the testbed {testbed} has no {', '.join(given)}; only {other} has")
    split = spec.get("split")
    if split not in (None, "train", "held_out"):
        raise InputError(f"scenarios: unknown split {_with_hint(split, ('train', 'held_out'))}")
    source: Any = own.get(testbed, role_play)
    families = source.families() if testbed in own else _families(testbed, tools.pop("problems", None))
    shipped: dict[str, Any] = {family["family"]: family for family in families}
    names = spec.get("families") or list(shipped)
    for name in names:
        if name not in shipped:
            raise InputError(f"scenarios: unknown family {_with_hint(name, shipped)}")
    chosen = [shipped[name] for name in names if split in (None, shipped[name]["split"])]
    if not chosen:
        raise InputError(f"scenarios: none of the families {', '.join(names)} is in the split {split!r}")
    first, count, seed = spec.get("first_index", 0), spec.get("per_family", 8), spec.get("seed", 0)
    indices = range(first, first + count)
    if testbed == "collusion":
        return [
            collusion.generate(family=family, index=index + cell * count, seed=seed, game=game, allowed=allowed)
            for cell, game in enumerate(collusion.grid(rules, "scenarios.collusion"))
            for family in chosen
            for index in indices
        ]
    if testbed == "tool_use":
        return [
            tool_use.generate(family=family, index=index, seed=seed, allowed=allowed, **tools)
            for family in chosen
            for index in indices
        ]
    return [
        source.generate(family=family, index=index, seed=seed, allowed=allowed)
        for family in chosen
        for index in indices
    ]


def _families(testbed: str, problems: str | None) -> Sequence[Mapping[str, Any]]:
    if testbed == "tool_use":
        if problems not in (None, *SETS):
            raise InputError(f"scenarios: unknown set of problems {_with_hint(problems, SETS)}")
        return tool_use.families(problems or "reasoning_gym")
    return collusion.families() if testbed == "collusion" else role_play.families()


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
