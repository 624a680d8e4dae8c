"""Reward models: functions that say how much the learner is given for a reply. Each has a card in `README.md`.

Every entry has the signature of a TRL reward function, `f(prompts, completions, **columns) -> list[float | None]`, so
that `trl grpo --reward_funcs reward_models.compliance` and atp_rl's own loop call the very same code. None means "could
not tell". The columns, one value a completion, are those of a scenario, or of the round that was played:

- `options` (list of str): what can be chosen,
- `required` (str or None): the option that the rule asks for; None where the rule allows every option,
- `payoffs` (dict): what an undetected choice of each option pays,
- `payoff` (float or None, optional): what the environment did pay, detection included,
- `payoff_unit` (float or None, optional): what payoffs are divided by, where that is not the largest of `payoffs`,
- `key` (tuple, optional): names the random draws that belong to the reply.

Some are made from options: `Monitor(recall=.9)`, `Preference(DIR)`, `Judge(url, model, cache=FILE)`.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from reward_models.compliance import compliance
from reward_models.judge import Judge
from reward_models.monitor import Monitor, monitor
from reward_models.payoff import payoff
from reward_models.preference import Preference

RewardModel = Callable[..., list[float | None]]

REWARD_MODELS: dict[str, RewardModel] = {"payoff": payoff, "compliance": compliance, "monitor": monitor}
"""Name in a recipe -> function, of those that need no options."""

MAKERS: dict[str, Callable[..., RewardModel]] = {"monitor": Monitor, "preference": Preference, "judge": Judge}
"""Name in a recipe -> what makes the function from options."""

NAMES = list(dict.fromkeys([*REWARD_MODELS, *MAKERS]))


def make(names: Iterable[str], options: Mapping[str, Any], *, folder: Path) -> dict[str, RewardModel]:
    """The reward models of these names, with their options where they are given.

    Args:
        options: by name, the arguments of an entry of `MAKERS`, or None.
        folder: the run directory: where the judge keeps its answers, unless its options say otherwise.

    Raises:
        InputError: what an entry needs is not there.
    """
    made: dict[str, RewardModel] = {}
    for name in names:
        given = options.get(name)
        if name == "judge" and given:
            given = {**given, "cache": given.get("cache") or folder / "judge.sqlite"}
        made[name] = REWARD_MODELS[name] if given is None else MAKERS[name](**given)
    return made


__all__ = [
    "MAKERS",
    "NAMES",
    "REWARD_MODELS",
    "Judge",
    "Monitor",
    "Preference",
    "RewardModel",
    "compliance",
    "make",
    "monitor",
    "payoff",
]
