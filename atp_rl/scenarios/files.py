"""Scenarios from and to files: the project's JSONL, and the role-play files of the paper."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from atp_rl.scenarios import role_play
from atp_rl.scenarios.choices import format_choice, parse_choice
from atp_rl.types import InputError, Scenario

_SCENARIO = TypeAdapter(Scenario)


def write_jsonl(scenarios: Iterable[Scenario], path: Path) -> None:
    """One scenario a line, in the form that `read_jsonl` reads."""
    path.write_text("".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in scenarios), "utf-8")


def read_jsonl(path: Path) -> list[Scenario]:
    """Raises InputError that names file, line and field for anything that is not a playable scenario."""
    scenarios = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            scenarios.append(_SCENARIO.validate_python(_parse(line, where)))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the line"
            raise InputError(f"{where}: `{field}`: {first['msg'].lower()}") from None
    return _checked(scenarios, path)


def read_paper(path: Path) -> list[Scenario]:
    """A role-play file of the paper: a JSON list of items (testbeds of arXiv 2510.04860, public code)."""
    items = _parse(_read(path), str(path))
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a JSON list of scenarios, got {type(items).__name__}")
    scenarios = [role_play.from_paper(item, where=f"{path}, item {i}") for i, item in enumerate(items)]
    return _checked(scenarios, path)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a scenario file ({error})") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON that can be read ({error})") from None


TEXTS = ("system", "task", "format", "supervised", "unsupervised", "neutral", "comply", "best_paid")


def _checked(scenarios: list[Scenario], path: Path) -> list[Scenario]:
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
        if max(scenario.payoffs.values()) <= 0:
            raise InputError(f"{where}: the largest of `payoffs` must be positive, got {dict(scenario.payoffs)}")
        if scenario.rule is not None and scenario.rule not in scenario.options:
            raise InputError(f"{where}: `rule` {scenario.rule!r} is none of the options {list(scenario.options)}")
        try:
            json.dumps(asdict(scenario), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: holds text that is not Unicode ({error.reason})") from None
        if missing := [key for key in TEXTS if key not in scenario.texts]:
            raise InputError(f"{where}: `texts` lacks {', '.join(missing)}")
        if missing := [key for key in ("required", "tempting") if scenario.extra.get(key) not in scenario.options]:
            raise InputError(f"{where}: `extra.{missing[0]}` must name one of the options {list(scenario.options)}")
        required = scenario.extra["required"]
        if required == scenario.extra["tempting"] or scenario.rule not in (None, required):
            raise InputError(f"{where}: `extra.required` must be the rule's option and `extra.tempting` another one")
    return scenarios
