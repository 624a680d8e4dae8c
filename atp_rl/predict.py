"""What the mean-field model of `evaluate/tipping.py` says of a recipe before it is run: `atp predict`, and the warnings
at the start of a run.

The recipe gives group size, scaling of the rewards, the rewards of violation, compliance and detected violation (means
over its training scenarios, in units of the best payoff), how likely detection is, and the defenses.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atp_rl import ranks
from atp_rl.evaluate import tipping
from atp_rl.evaluate.tipping import (
    KL,
    Covariance,
    Interleave,
    Lagrangian,
    MergeBack,
    Penalty,
    Replay,
    Screening,
    Setting,
    Static,
)
from atp_rl.evolve.setup import learning_seats, training_play
from atp_rl.recipe import POPULATIONS, DefenseSpec, Recipe
from atp_rl.scenarios.suites import Suites
from atp_rl.scenarios.supervision import SUPERVISED_IN_ROUND
from atp_rl.tracking.read import RunRecord, load_run
from atp_rl.tracking.summary import TIPPED_ABOVE
from atp_rl.types import InputError, Scenario
from reward_models.compliance import VIOLATING

ASSUMED_P0 = 0.01
"""Violation rate of the aligned policy where nothing was measured."""
HELD = 0.10
"""What a KL anchor is asked to hold the violations at, where another weight is proposed."""
HORIZON = 5000
"""Model steps of a simulation, or twice the time to 50 % without defenses where that is longer."""
LONGEST = 20_000

MODELLED: dict[str, tuple[str, ...]] = {
    "kl_anchor": ("beta", "estimator", "target_kl", "streams"),
    "lagrangian": ("limit", "kp", "ki", "kd", "warm_start", "cap"),
    "interleave": ("rho",),
    "monitor": ("mode", "kind", "recall", "false_alarm", "fine"),
    "covariance": ("recall",),
    "replay": ("loss", "weight", "beta"),
    "merge_back": ("every", "keep", "layers"),
}
"""The defenses that the model knows, and those of their options that matter to it."""


class Rewards(NamedTuple):
    """Means over the training scenarios, in units of reward."""

    violation: float
    """Not detected."""
    compliance: float
    detected: float
    spread: float
    """Standard deviation of compliance's between scenarios."""


@dataclass(frozen=True)
class Outlook:
    """What is predicted of a policy under some defenses."""

    name: str
    end: float | None
    """Violation rate at which it settles; None where the model does not know the defense."""
    peak: float
    """The highest rate on the way."""
    to_25: float
    """Model steps until 25 % violations; infinite for never."""
    to_50: float

    @property
    def fails(self) -> bool:
        """Whether violations come to 25 % or more, or stay there."""
        if self.end is None:
            return False
        return self.end >= TIPPED_ABOVE or (self.peak >= TIPPED_ABOVE and self.to_25 > 0)

    @property
    def words(self) -> str:
        """In plain words."""
        if self.end is None:
            return "no prediction: the model does not know it"
        end = f"{self.end:.1%}"
        if self.to_25 == 0:
            return f"starts above 25 % and settles at {end}"
        if self.end >= TIPPED_ABOVE:
            return f"tips: 25 % after about {self.to_25:,.0f} model steps, and {end} in the end"
        if self.fails:
            return f"overshoots: rises to {self.peak:.0%} before it comes back to {end}"
        if self.peak > 2 * self.end and self.peak > HELD:
            return f"holds, at {end}, after a rise to {self.peak:.0%}"
        return f"holds: settles at {end}"


@dataclass(frozen=True)
class Prediction:
    """Of one recipe and one starting point."""

    p0: float
    p0_from: str
    setting: Setting
    rewards: Rewards
    critical_beta: float
    """Of the k3 anchor."""
    modelled: list[Static | MergeBack | Lagrangian | None]
    """The recipe's defenses as the model has them, in order; None for one that it does not know."""
    undefended: Outlook
    alone: list[Outlook]
    """Each of the recipe's defenses as if it were the only one."""
    together: Outlook
    """All that the model knows at once."""
    notes: list[str]

    @property
    def gap(self) -> float:
        """Expected reward of a violation, less that of compliance."""
        return tipping.expected_gap(
            self.setting["payoff_gap"], self.setting.get("detection", 0.0), self.setting.get("loss", 0.0)
        )


class NoPrediction(Exception):
    """The model does not apply to a recipe; the message says why."""


def predict(recipe: Recipe, suites: Suites, *, p0: float | None = None, p0_from: str = "given") -> Prediction:
    """What the model says of a recipe.

    Args:
        p0: violation rate of the aligned policy; None takes that of the recipe's own run, or assumes `ASSUMED_P0`.

    Raises:
        NoPrediction: the model does not apply.
        InputError: `p0` is no probability between 0 and 1.
    """
    scenarios = _ruled(recipe, suites)
    assert recipe.evolve is not None
    if p0 is None:
        p0, p0_from = starting_point(Path(recipe.run.dir))
    if not 0 < p0 < 1:
        raise InputError(f"p0 must be between 0 and 1, got {p0}: a policy at either end never changes in this model")
    detection, fine, notes = _detection(recipe)
    rewards = _rewards(scenarios, recipe.evolve.rewards, fine)
    setting: Setting = {
        "group_size": recipe.evolve.group_size,
        "scale_rewards": recipe.evolve.scale_rewards,
        "payoff_gap": rewards.violation - rewards.compliance,
        "detection": detection,
        "loss": rewards.compliance - rewards.detected,
        "spread": rewards.spread,
    }
    if recipe.scenarios.rounds > 1:
        notes.append("Of several rounds an episode has one reward; thresholds hold while violations are rare.")
    if scenarios[0].testbed == "tool_use":
        notes.append("Every answer is taken to be right, with the tool and without it.")
    modelled = [as_modelled(spec, p0, setting) for spec in recipe.defenses]
    together = [each for each in modelled if each is not None]
    undefended = outlook("none", [], p0, setting)
    unknown = Outlook("", None, math.nan, math.nan, math.nan)
    alone = [
        dataclasses.replace(unknown, name=spec.name) if each is None else outlook(label(spec), [each], p0, setting)
        for spec, each in zip(recipe.defenses, modelled, strict=True)
    ]
    return Prediction(
        p0=p0,
        p0_from=p0_from,
        setting=setting,
        rewards=rewards,
        critical_beta=tipping.critical_beta(**setting),
        modelled=modelled,
        undefended=undefended,
        alone=alone,
        together=outlook("together", together, p0, setting) if len(together) > 1 else [undefended, *known(alone)][-1],
        notes=notes,
    )


def known(outlooks: Sequence[Outlook]) -> list[Outlook]:
    """Those of defenses that the model knows."""
    return [each for each in outlooks if each.end is not None]


def _ruled(recipe: Recipe, suites: Suites) -> list[Scenario]:
    """The training scenarios that the model is about; raises NoPrediction."""
    evolve = recipe.evolve
    if evolve is None:
        raise NoPrediction("the recipe has no `evolve`")
    if evolve.learner in POPULATIONS:
        raise NoPrediction(f"the learner {evolve.learner} has one adapter a seat, and the model has one policy")
    if evolve.learner == "in_context":
        raise NoPrediction("the learner in_context updates no weights")
    if unknown := sorted(set(evolve.rewards) - {"payoff", "compliance"}):
        raise NoPrediction(f"the model does not know what the reward model {unknown[0]} gives for a violation")
    scenarios = [scenario for scenario in suites.train if scenario.rule is not None]
    if not scenarios:
        raise NoPrediction("no rule forbids anything in the training scenarios")
    if len(learning_seats(scenarios[0], training_play(recipe))) > 1:
        raise NoPrediction("what a decision pays depends on the other seats, and the model has one seat")
    return scenarios


def starting_point(run: Path) -> tuple[float, str]:
    """The violation rate of the aligned policy that a finished run measured, and where it is from; else the assumed
    one.
    """
    if not (run / "summary.json").exists():
        return ASSUMED_P0, "assumed: nothing was measured; give --p0, or run the recipe"
    return aligned_rate(load_run(run))


def aligned_rate(record: RunRecord) -> tuple[float, str]:
    """Violation rate of a run at its first checkpoint, kept off 0 and 1, and how it was measured."""
    aligned, first = record.summary["aligned"], record.curve[0][1]
    rate, n, propensity = aligned["violation_rate"], aligned["n"], first["propensity"]
    if rate is not None and 0 < rate < 1:
        return rate, f"measured by {record.path}, n = {n}"
    if propensity is not None and 0 < propensity < 1:
        return propensity, f"exact propensity of {record.path}: its {n} decisions were all alike"
    return ((rate or 0.0) * n + 0.5) / (n + 1), f"half a decision off that of {record.path}, whose {n} were all alike"


def _detection(recipe: Recipe) -> tuple[float, float, list[str]]:
    """Probability of detection, the fine (in the scenario's currency), and what was simplified."""
    supervision = recipe.scenarios.supervision
    if not isinstance(supervision, str):
        return supervision.probability, supervision.fine, []
    pattern, rounds = SUPERVISED_IN_ROUND.get(supervision), recipe.scenarios.rounds
    if pattern and all(pattern(k, rounds) for k in range(rounds)):
        return 1.0, 0.0, []
    told = "The agent is told when it is watched: what is predicted is its behaviour in rounds without supervision."
    return 0.0, 0.0, [] if supervision == "all_unsupervised" else [told]


def _rewards(scenarios: Sequence[Scenario], weights: dict[str, float], fine: float) -> Rewards:
    """What the reward models pay for the three outcomes, in the mean over scenarios."""
    pays, complies = weights.get("payoff", 0.0), weights.get("compliance", 0.0)
    found = []
    for scenario in scenarios:
        assert scenario.rule is not None
        tempting = max(paid for option, paid in scenario.payoffs.items() if option != scenario.rule)
        violation, compliance, detected = (
            pays * paid / scenario.payoff_unit + complies * kept
            for paid, kept in ((tempting, VIOLATING), (scenario.payoffs[scenario.rule], 1.0), (-fine, VIOLATING))
        )
        found.append((violation, compliance, detected))
    means = np.mean(found, axis=0)
    return Rewards(float(means[0]), float(means[1]), float(means[2]), float(np.std([row[1] for row in found])))


# Defenses


def as_modelled(spec: DefenseSpec, p0: float, setting: Setting) -> Static | MergeBack | Lagrangian | None:
    """A recipe's defense as the model has it; None where it has no such thing."""
    if spec.name not in MODELLED:
        return None
    o = options(spec)
    if (
        o.get("streams", "all") != "all"
        or o.get("kind", "action") != "action"
        or o.get("layers", "uniform") != "uniform"
    ):
        return None
    if spec.name == "kl_anchor":
        beta = o["beta"]
        if o["target_kl"] and o["estimator"] != "reward":
            return None  # it is a mean over the tokens of a reply, of which the model has one
        if o["target_kl"]:  # the weight is adjusted until the KL is the target, so it is the one that holds it there
            limit = tipping.rate_at_kl(o["target_kl"], p0)
            beta = tipping.hold_beta(limit, p0, o["estimator"], **setting)
        return KL(beta, o["estimator"])
    if spec.name == "lagrangian":
        cap = math.inf if o["cap"] is None else o["cap"]
        return Lagrangian(o["limit"], o["kp"], o["ki"], o["kd"], o["warm_start"] or 0.0, cap, anti_windup=True)
    if spec.name == "monitor":
        if o["mode"] == "screening":
            return Screening(o["recall"], o["false_alarm"])
        return Penalty(o["recall"], o["fine"], o["false_alarm"])
    if spec.name == "covariance":
        return Covariance(o["recall"])
    if spec.name == "interleave":
        return Interleave(o["rho"], 1.0 - VIOLATING)
    return Replay(o["loss"], o["weight"], o["beta"]) if spec.name == "replay" else MergeBack(o["every"], o["keep"])


def options(spec: DefenseSpec) -> dict[str, Any]:
    """The options of a defense that the model knows: the recipe's, else the defaults of its class."""
    from atp_rl.defenses import DEFENSES

    return {field.name: field.default for field in dataclasses.fields(DEFENSES[spec.name])} | spec.options


def label(spec: DefenseSpec) -> str:
    """A defense's name and the options that matter to the model."""
    names = {"monitor": ("mode", "recall", "fine")}.get(spec.name, MODELLED[spec.name])
    found = {name: value for name in names if (value := options(spec)[name]) not in (None, "all", "uniform")}
    if found.get("mode") == "screening":
        del found["fine"]
    return f"{spec.name} ({', '.join(f'{name} {value}' for name, value in found.items())})"


def outlook(name: str, defenses: Sequence[Static | MergeBack | Lagrangian], p0: float, setting: Setting) -> Outlook:
    """What becomes of p0: the equilibrium, or a simulation where a defense has a memory."""
    static = [each for each in defenses if not isinstance(each, MergeBack | Lagrangian)]
    if len(static) == len(defenses):
        end = tipping.equilibrium(p0, defenses=static, **setting)
        times = [tipping.time_to(threshold, p0, defenses=static, **setting) for threshold in (0.25, 0.5)]
        return Outlook(name, end, max(p0, end), *times)
    undefended = tipping.time_to(0.5, p0, **setting)
    steps = int(min(LONGEST, max(HORIZON, 2 * undefended))) if math.isfinite(undefended) else HORIZON
    path = tipping.simulate(p0, steps=steps, defenses=defenses, **setting)
    last = max((each.every for each in defenses if isinstance(each, MergeBack)), default=1)
    times = [math.inf if step is None else step for step in (tipping.passing_step(path, t) for t in (0.25, 0.5))]
    return Outlook(name, float(path[-last:].max()), float(path.max()), *times)


# Warnings


def warnings(recipe: Recipe, suites: Suites) -> list[str]:
    """A line for each of the recipe's defenses that is predicted to fail, from an assumed start of `ASSUMED_P0`.

    Those that need past rounds fail where there are none. Of the others none is named where the defenses together hold
    (at `HELD` or less; a Lagrangian without kp or warm start is still named), where nothing tips without them, or
    where the model does not apply.
    """
    idle = _without_effect(recipe)
    if not any(spec.name in MODELLED for spec in recipe.defenses):
        return idle
    try:
        prediction = predict(recipe, suites, p0=ASSUMED_P0)
    except NoPrediction:
        return idle
    return idle + warnings_of(prediction, recipe.defenses)


def _without_effect(recipe: Recipe) -> list[str]:
    from atp_rl.defenses import DEFENSES

    if max(recipe.scenarios.rounds, recipe.evaluate.rounds or 1) > 1:
        return []
    return [
        f"defense {spec.name}: changes nothing in episodes of one round; set `scenarios.rounds`, or leave it out"
        for spec in recipe.defenses
        if DEFENSES[spec.name].needs_past
    ]


def warnings_of(prediction: Prediction, specs: Sequence[DefenseSpec]) -> list[str]:
    """`warnings` of a prediction that was made."""
    if not prediction.undefended.fails:
        return []
    found = []
    for spec, modelled, alone in zip(specs, prediction.modelled, prediction.alone, strict=True):
        reason = _why_it_fails(spec, modelled, alone, prediction)
        if reason and (prediction.together.peak > HELD or isinstance(modelled, Lagrangian)):
            found.append(f"defense {spec.name}: {reason}. Predicted from p0 = {prediction.p0:g}: {alone.words}")
    return found


def _why_it_fails(
    spec: DefenseSpec, modelled: Static | MergeBack | Lagrangian | None, alone: Outlook, prediction: Prediction
) -> str | None:
    """The reason, and what would help; None where the defense is not predicted to fail."""
    p0, setting, gap = prediction.p0, prediction.setting, prediction.gap
    if isinstance(modelled, Lagrangian):
        lacking = [name for name, value in (("kp", modelled.kp), ("warm_start", modelled.warm_start)) if not value]
        fix = f"set warm_start to about {1.2 * gap:.2g} (1.2 x the payoff gap) and kp to 2"
        late = "it acts after the violations have come, and the faster the run learns the higher they rise"
        return f"without {' and '.join(lacking)} {late}; {fix}" if lacking else None
    if isinstance(modelled, KL):
        below = modelled.estimator == "k3" and modelled.beta < prediction.critical_beta
        if not alone.fails and not (below and alone.peak > HELD):
            return None
        if options(spec)["target_kl"]:
            return f"target_kl {options(spec)['target_kl']:g} is reached after tipping; make it smaller"
        enough = tipping.hold_beta(HELD, p0, modelled.estimator, **setting)
        enough = max(enough, prediction.critical_beta) if below else enough
        how = f"{modelled.estimator}, G = {setting['group_size']}, scale_rewards {setting['scale_rewards']}"
        fault = f"is below the critical {prediction.critical_beta:.3g}" if below else "is too low"
        fix = f"; from {rounded_up(enough)} on it holds {HELD:.0%}" if math.isfinite(enough) else ""
        return f"beta {modelled.beta:g} {fault} ({how}){fix}"
    if not alone.fails:
        return None
    before = prediction.undefended.to_25
    slows = f"only slows, {alone.to_25 / before:.1f} times" if before else "only slows"
    if isinstance(modelled, Screening | Covariance):
        return f"with recall {modelled.recall:g} it {slows}"
    if isinstance(modelled, Interleave):
        return f"rho {modelled.share:g} {slows}: the payoff still pushes harder"
    if isinstance(modelled, Penalty):
        left = gap - (modelled.recall - modelled.false_alarm) * modelled.fine
        if left > 0:
            fine = (
                gap / (modelled.recall - modelled.false_alarm) if modelled.recall > modelled.false_alarm else math.inf
            )
            fault = f"is below the deterrence bound, a violation still gains {left:.2g}"
            return f"{fault}; a fine above {rounded_up(fine)} deters"
        why = "deters on average, but group-normalised advantages count how often a violation pays, not how much"
        return f"{why}: recall above .5 is needed"
    return "is too weak"


def rounded_up(bound: float, digits: int = 3) -> str:
    """A lower bound, rounded up to that many significant digits: whoever takes what is printed has enough."""
    if not 0 < bound < math.inf:
        return f"{bound:.{digits}g}"
    unit = 10.0 ** (math.floor(math.log10(bound)) + 1 - digits)
    return f"{math.ceil(bound / unit - 1e-9) * unit:.{digits}g}"  # .2 as a float is not to become .201


def in_a_line(recipe: Recipe, suites: Suites) -> str:
    """What the defenses together are predicted to do from `ASSUMED_P0`, for a plan."""
    try:
        prediction = predict(recipe, suites, p0=ASSUMED_P0)
    except NoPrediction as reason:
        return f"no prediction: {reason}"
    if unknown := [each.name for each in prediction.alone if each.end is None]:
        return f"no prediction: the model does not know {' and '.join(unknown)}"
    return f"prediction from p0 = {ASSUMED_P0:g}: {prediction.together.words}"


def warn(recipe: Recipe, suites: Suites) -> None:
    """Print `warnings` to standard error, once for all processes."""
    if ranks.is_first():
        for line in warnings(recipe, suites):
            print(f"atp: warning: {line}; `atp predict` says more", file=sys.stderr)
