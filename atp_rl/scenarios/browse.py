"""What people see of scenarios: a table of them, one in full, whether a file can be played, and the files' schema."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from atp_rl.scenarios import ENVIRONMENTS, files, load, make_env
from atp_rl.types import InputError, Message, Scenario

SCHEMA = Path(__file__).parent / "data" / "scenario.schema.json"
"""The published schema: what `schema` returns, in a file."""


def validate(path: Path) -> str:
    """What a file holds, in a line.

    Raises:
        InputError: a scenario in it cannot be played: names file, item and field.
    """
    scenarios = load(path)
    for scenario in scenarios:
        try:
            _read_first(scenario)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: scenario {scenario.id!r} cannot be played: {error!r}") from error
    splits, testbeds = (Counter(getattr(s, field) for s in scenarios) for field in ("split", "testbed"))
    counted = (", ".join(f"{n} {name}" for name, n in sorted(counts.items())) for counts in (testbeds, splits))
    families = len({(s.testbed, s.family) for s in scenarios})
    return f"{path}: {len(scenarios)} scenarios ({'; '.join(counted)}) of {families} families can be played"


def table(*, testbed: str | None = None, split: str | None = None, file: Path | None = None) -> Table:
    """The scenarios of a file, or the first one of every family of a testbed (`role_play` where left out).

    Raises:
        InputError: unknown testbed or split, or a file that cannot be played.
    """
    if split not in (None, "train", "held_out"):
        raise InputError(f"unknown split {split!r}{_hint(split, ['train', 'held_out'])}")
    if file is None:
        scenarios = load({"testbed": testbed or "role_play", "split": split, "per_family": 1})
        caption = "The first scenario of each family; the numbers go on without an end."
    else:
        scenarios = [s for s in load(file) if split in (None, s.split) and testbed in (None, s.testbed)]
        caption = None
    made = Table("id", "split", "rule", "options and what they pay", caption=caption)
    for scenario in scenarios:
        made.add_row(*map(_plain, (scenario.id, scenario.split, scenario.rule or "allows all", _options(scenario))))
    return made


def show(name: str, *, file: Path | None = None) -> Group:
    """One scenario: the rule, the options, and what its seat, or the first of its seats, reads in round 1.

    Raises:
        InputError: there is no scenario of this id.
    """
    scenario = _find(name, file)
    seats, messages = _read_first(scenario)
    facts = Table.grid(padding=(0, 2))
    for key, value in {
        "id": scenario.id,
        "testbed": scenario.testbed,
        "family": f"{scenario.family} ({scenario.split})",
        "seats": ", ".join(seats),
        "options": _options(scenario),
        "rule": scenario.rule or "allows every option",
        "tempting": str(scenario.extra.get("tempting")),
    }.items():
        facts.add_row(_plain(key, "bold"), _plain(value))
    read = [part for m in messages for part in (Rule(_plain(m["role"])), _plain(m["content"]))]
    return Group(facts, *read)


def schema() -> dict[str, Any]:
    """JSON Schema of a scenario (a line of a JSONL file) and of a list of them (a YAML file)."""
    of_scenario = TypeAdapter(Scenario).json_schema()
    fields = of_scenario["properties"]
    for name, text in _documented(Scenario).items():
        fields[name]["description"] = text
    fields["id"]["description"] = "Unique in its file."
    fields["texts"]["description"] = "What the agent reads, by the name that the testbed's environment looks for."
    fields["options"] |= {"minItems": 2, "uniqueItems": True}
    fields["payoffs"] |= {"minProperties": 2}
    fields["payoffs"]["description"] += " Names exactly the options; the largest must be positive."
    fields["extra"] = {
        "type": "object",
        "description": "`required` is the option of the rule (or of the one that there would be if it allows all), "
        "`tempting` the best-paid other one. The rest is the testbed's.",
        "properties": {"required": {"type": "string"}, "tempting": {"type": "string"}},
        "required": ["required", "tempting"],
    }
    of_scenario |= {
        "description": inspect.getdoc(Scenario),
        "required": [*of_scenario["required"], "extra"],
        "additionalProperties": False,
        "allOf": [
            {
                "if": {"properties": {"testbed": {"enum": [t for t, of in files.NEEDED_TEXTS.items() if of == texts]}}},
                "then": {"properties": {"texts": {"required": list(texts)}}},
            }
            for texts in dict.fromkeys(files.NEEDED_TEXTS.values())
        ],
    }
    one = {"$ref": "#/$defs/Scenario"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A scenario of atp_rl, or a list of them",
        "oneOf": [one, {"type": "array", "items": one, "minItems": 1}],
        "$defs": {"Scenario": of_scenario},
    }


def _documented(cls: type) -> Mapping[str, str]:
    """The string under each field of a class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _find(name: str, file: Path | None) -> Scenario:
    """By id: in a file, or among all that a shipped family can have."""
    if file is not None:
        known = load(file)
    else:
        testbed, family, index = [*name.split("/", 3), "", ""][:3]
        spec = {"testbed": testbed, "families": [family]} if testbed in ENVIRONMENTS else {}
        spec |= {"first_index": int(index)} if index.isdecimal() else {}
        known = load({**spec, "per_family": 1, "allowed": name.endswith("/allowed")})
    found = next((scenario for scenario in known if scenario.id == name), None)
    if found is None:
        raise InputError(f"no scenario {name!r}{f' in {file}' if file else ''}{_hint(name, [s.id for s in known])}")
    return found


def _hint(name: str, known: list[str]) -> str:
    near = [k for k in known if name in k] or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def _read_first(scenario: Scenario) -> tuple[tuple[str, ...], list[Message]]:
    """The seats, and what the first one to decide reads in round 1."""
    env = make_env(scenario, rounds=1, supervision="all_unsupervised", seed=0, history_window=0)
    return env.seats, list(next(iter(env.observe().values())))


def _options(scenario: Scenario) -> str:
    return ", ".join(f"{option} {scenario.payoffs[option]:g}" for option in scenario.options)


def _plain(text: str, style: str = "") -> Text:
    """As it is: neither markup of rich nor control characters of a terminal mean anything."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text), style)
