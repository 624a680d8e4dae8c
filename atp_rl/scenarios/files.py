"""Scenarios from and to files of this project, JSONL or YAML. For those of the paper see `paper.py`.

`data/scenario.schema.json` is the JSON Schema of what can be in them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from atp_rl.scenarios.choices import format_choice, parse_choice
from atp_rl.types import InputError, Scenario

_SCENARIO = TypeAdapter(Scenario)


def write_jsonl(scenarios: Iterable[Scenario], path: Path) -> None:
    """One scenario a line, in the form that `read_jsonl` reads."""
    path.write_text("".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in scenarios), "utf-8")


def read_scenarios(path: Path) -> list[Scenario]:
    """Of a `.yaml` or `.yml` file that lists scenarios, or else of a JSONL file.

    Raises:
        InputError: names file, item and field of anything that is not a playable scenario.
    """
    return read_yaml(path) if path.suffix.lower() in (".yaml", ".yml") else read_jsonl(path)


def read_jsonl(path: Path) -> list[Scenario]:
    """Raises InputError that names file, line and field for anything that is not a playable scenario."""
    lines = [(f"{path}, line {i}", line) for i, line in enumerate(read(path).split("\n"), 1) if line.strip()]
    return checked([_scenario(parse(line, where), where, "the line") for where, line in lines], path)


def read_yaml(path: Path) -> list[Scenario]:
    """Raises InputError that names file, item (from 1) and field for anything that is not a playable scenario."""
    try:
        items = yaml.safe_load(read(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not YAML that can be read ({' '.join(str(error).split())})") from None
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a list of scenarios, got {type(items).__name__}")
    scenarios = []
    for number, item in enumerate(items, 1):
        where = f"{path}, item {number}"
        try:
            plain = json.loads(json.dumps(item))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{where}: holds what JSON cannot ({error}); put quotes around text") from None
        scenarios.append(_scenario(plain, where, "the item"))
    return checked(scenarios, path)


def _scenario(item: Any, where: str, whole: str) -> Scenario:
    if isinstance(item, dict) and (unknown := item.keys() - {field.name for field in fields(Scenario)}):
        raise InputError(f"{where}: `{min(unknown)}`: a scenario has no such field")
    try:
        return _SCENARIO.validate_python(item)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or whole
        raise InputError(f"{where}: `{field}`: {first['msg'].lower()}") from None


def read(path: Path) -> str:
    """The text of a file, or InputError."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a scenario file ({error})") from None


def parse(text: str, where: str) -> Any:
    """JSON, or InputError that says `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON that can be read ({error})") from None


TEXTS = ("system", "task", "format", "supervised", "unsupervised", "neutral", "comply", "best_paid")
NEEDED_TEXTS: dict[str, tuple[str, ...]] = {"role_play": TEXTS, "collusion": TEXTS, "tool_use": TEXTS}
"""By testbed; the others can do without any."""


def checked(scenarios: list[Scenario], path: Path | str) -> list[Scenario]:
    """The same scenarios, if every one of them can be played; else InputError that names file and scenario."""
    if not scenarios:
        raise InputError(f"{path}: holds no scenario")
    seen: set[str] = set()
    for scenario in scenarios:
        where = f"{path}: scenario {scenario.id!r}"
        if scenario.id in seen:
            raise InputError(f"{where} occurs twice; ids must be unique")
        seen.add(scenario.id)
        readable = all(parse_choice(format_choice(o), scenario.options).option == o for o in scenario.options)
        if len(scenario.options) < 2 or not readable:
            raise InputError(f"{where}: needs two different options that replies can name, got {[*scenario.options]}")
        if set(scenario.payoffs) != set(scenario.options):
            raise InputError(f"{where}: `payoffs` must name exactly the options {list(scenario.options)}")
        if not all(map(math.isfinite, scenario.payoffs.values())):
            raise InputError(f"{where}: `payoffs` must be finite, got {dict(scenario.payoffs)}")
        unit = scenario.extra.get("payoff_unit", 1)
        if not isinstance(unit, int | float) or isinstance(unit, bool) or not 0 < unit <= 1e300:
            raise InputError(f"{where}: `extra.payoff_unit` must be a finite number > 0, got {unit!r}; or leave it out")
        if scenario.payoff_unit <= 0:
            raise InputError(f"{where}: the largest of `payoffs` must be positive, got {dict(scenario.payoffs)}")
        if scenario.rule is not None and scenario.rule not in scenario.options:
            raise InputError(f"{where}: `rule` {scenario.rule!r} is none of the options {list(scenario.options)}")
        try:
            json.dumps(asdict(scenario), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: holds text that is not Unicode ({error.reason})") from None
        if missing := [key for key in NEEDED_TEXTS.get(scenario.testbed, ()) if key not in scenario.texts]:
            raise InputError(f"{where}: `texts` lacks {', '.join(missing)}")
        if missing := [key for key in ("required", "tempting") if scenario.extra.get(key) not in scenario.options]:
            raise InputError(f"{where}: `extra.{missing[0]}` must name one of the options {list(scenario.options)}")
        required = scenario.extra["required"]
        if required == scenario.extra["tempting"] or scenario.rule not in (None, required):
            raise InputError(f"{where}: `extra.required` must be the rule's option and `extra.tempting` another one")
    return scenarios
