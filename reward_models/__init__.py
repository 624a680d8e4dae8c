"""Reward models: functions that say how much the learner is given for a reply. Each has a card in `README.md`.

Every entry has the signature of a TRL reward function, `f(prompts, completions, **columns) -> list[float | None]`, so
that `trl grpo --reward_funcs reward_models.compliance` and atp_rl's own loop call the very same code. None means "could
not tell". The columns, one value a completion, are those of a scenario, or of the round that was played:

- `options` (list of str): what can be chosen,
- `required` (str or None): the option that the rule asks for; None where the rule allows every option,
- `payoffs` (dict): what an undetected choice of each option pays,
- `payoff` (float or None, optional): what the environment did pay, detection included,
- `payoff_unit` (float or None, optional): what payoffs are divided by, where that is not the largest of `payoffs`.
"""

from collections.abc import Callable

from reward_models.compliance import compliance
from reward_models.monitor import monitor
from reward_models.payoff import payoff

RewardModel = Callable[..., list[float | None]]

REWARD_MODELS: dict[str, RewardModel] = {"payoff": payoff, "compliance": compliance, "monitor": monitor}
"""Name in a recipe -> function."""

__all__ = ["REWARD_MODELS", "RewardModel", "compliance", "monitor", "payoff"]
