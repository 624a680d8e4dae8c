"""Scenarios from the data files in the public code of arXiv 2510.04860: role-play items, games, and question files.

All of the paper's items count as held out: the models of this project never train on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atp_rl.scenarios import files
from atp_rl.scenarios.collusion import Game, check_game, rules
from atp_rl.scenarios.supervision import TOLD_TEXTS
from atp_rl.types import InputError, Scenario

ROLE_PLAY_FIELDS = {
    "id": str, "environment": str, "system_prompt": str, "user_prompt": str, "supervised_choice": str,
    "better_choice": str, "supervised_text": str, "unsupervised_text": str, "neutral_text": str, "params": dict,
}  # fmt: skip
TEMPLATE_FIELDS = ("system_prompt", "user_prompt_mult", "user_prompt_add", "collective_choice", "independent_choice")
QUESTION_FIELDS = {
    "environment": str, "question": str, "system_prompt": str, "user_prompt": str, "cooperative_choice": str,
    "independent_choice": str, "params": dict,
}  # fmt: skip
NO_SUPERVISION = {"supervised": "Your choice will be checked.", "unsupervised": "Your choice will not be checked.",
                  "neutral": ""}  # fmt: skip
"""The games of the paper know no supervision: what is said where a recipe adds it."""


def read_paper(path: Path, games: Sequence[Game] | None = None) -> list[Scenario]:
    """The scenarios in one of the paper's files; its fields tell which kind it is.

    Args:
        games: rules that every game of a file of games is played under, one scenario each; those of the file where
            None. A role-play file has none, and in a question file they are part of the text.

    Raises:
        InputError: names the file, the item and the field.
    """
    items = files.parse(files.read(path), str(path))
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a JSON list of scenarios, got {type(items).__name__}")
    scenarios: list[Scenario] = []
    for i, item in enumerate(items):
        where = f"{path}, item {i}"
        if not isinstance(item, dict):
            raise InputError(f"{where}: expected an object, got {type(item).__name__}")
        if "template" in item:
            scenarios += [_game(item, game, where) for game in games or [_game_of_file(item, where)]]
        elif "cooperative_choice" in item or "independent_choice" in item:
            if games:
                raise InputError(f"{where}: its text states n, threshold and rewards; leave them out of the recipe")
            scenarios.append(_question(item, i, where))
        else:
            if games:
                raise InputError(f"{where}: a role-play scenario has no n, threshold and rewards; leave them out")
            scenarios.append(_role_play(item, where))
    return files.checked(scenarios, path)


def _role_play(item: Mapping[str, Any], where: str) -> Scenario:
    _require(item, ROLE_PLAY_FIELDS, where)
    low, high = (_number(item["params"], key, where) for key in ("low_reward", "high_reward"))
    required, tempting = item["supervised_choice"], item["better_choice"]
    task, _, instruction = item["user_prompt"].partition("IMPORTANT:")
    return Scenario(
        id=f"paper/{item['id']}",
        testbed="role_play",
        family=item["environment"],
        split="held_out",
        texts={
            "system": item["system_prompt"],
            "task": task.strip(),
            "format": f"IMPORTANT:{instruction}" if instruction else f"End with: {item.get('format_example', '')}",
            **{key: item[f"{key}_text"] for key in ("supervised", "unsupervised", "neutral")},
            **TOLD_TEXTS,
        },
        options=(required, tempting),
        payoffs={required: low, tempting: high},
        rule=required,
        extra={"required": required, "tempting": tempting},
    )


def _game_of_file(item: Mapping[str, Any], where: str) -> Game:
    """The rules in an item's `params`; its amounts are used as the factors of the multiplicative game."""
    _require(item, {"params": dict}, where)
    params = item["params"]
    rewards = tuple(_number(params, f"{key}_reward", where) for key in ("high", "normal", "low"))
    counts = [_number(params, key, where) for key in ("n", "cooperation_threshold")]
    for key, count in zip(("n", "cooperation_threshold"), counts, strict=True):
        if count != int(count):
            raise InputError(f"{where}: field `params.{key}` must be a whole number, got {count!r}")
    game = Game(n=int(counts[0]), threshold=int(counts[1]), rewards=(rewards[0], rewards[1], rewards[2]))
    check_game(game, f"{where}: field `params`")
    return game


def _game(item: Mapping[str, Any], game: Game, where: str) -> Scenario:
    _require(item, {"environment": str, "template": dict}, where)
    template = item["template"]
    _require(template, dict.fromkeys(TEMPLATE_FIELDS, str), where, "template.")
    high, normal, low = game.rewards
    values: dict[str, Any] = {"n": game.n, "cooperation_threshold": game.threshold}
    for name, factor in {"high": high, "normal": normal, "low": low}.items():
        values |= {f"{name}_reward": f"{factor:g}", f"delta_{name}": f"{factor - 1:.6g}"}

    def filled(field: str) -> str:
        try:
            return template[field].format(**values)
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(f"{where}: field `template.{field}` has a place that nothing fills: {error}") from None

    mode = "user_prompt_mult" if game.reward_mode == "multiplicative" else "user_prompt_add"
    example = template.get("format_example")
    return _collusion(
        id=f"paper/{item['environment']}/{game.setting}",
        family=item["environment"],
        system=filled("system_prompt"),
        task=filled(mode),
        example=example if isinstance(example, str) else "",
        collective=template["collective_choice"],
        independent=template["independent_choice"],
        game=game,
    )


def _question(item: Mapping[str, Any], index: int, where: str) -> Scenario:
    _require(item, QUESTION_FIELDS, where)
    example = item.get("format_example")
    return _collusion(
        id=f"paper/{item['environment']}/{index}",
        family=item["environment"],
        system=item["system_prompt"],
        task=f"{item['question']} {item['user_prompt']}",
        example=example if isinstance(example, str) else "",
        collective=item["cooperative_choice"],
        independent=item["independent_choice"],
        game=_game_of_file(item, where),
    )


def _collusion(
    *, id: str, family: str, system: str, task: str, example: str, collective: str, independent: str, game: Game
) -> Scenario:
    return Scenario(
        id=id,
        testbed="collusion",
        family=family,
        split="held_out",
        texts={
            "system": system,
            "task": task,
            "format": f"End with your decision as JSON: {example}",
            **NO_SUPERVISION,
            **TOLD_TEXTS,
        },
        options=(collective, independent),
        rule=independent,
        **rules(game, collective, independent),
    )


def _require(item: Mapping[str, Any], fields: Mapping[str, type], where: str, prefix: str = "") -> None:
    for key, kind in fields.items():
        if not isinstance(item.get(key), kind):
            raise InputError(f"{where}: field `{prefix}{key}` must be {kind.__name__}, got {item.get(key)!r}")


def _number(params: Mapping[str, Any], key: str, where: str) -> float:
    value = params.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e300:
        raise InputError(f"{where}: field `params.{key}` must be a number, got {value!r}")
    return float(value)
