"""A prediction for a terminal: what is assumed, what is predicted with and without each defense, what is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from atp_rl.evaluate import tipping
from atp_rl.predict import HELD, Prediction, known, rounded_up, warnings_of
from atp_rl.recipe import DefenseSpec


def tables(prediction: Prediction, specs: Sequence[DefenseSpec]) -> list[Text | Table]:
    """What is assumed, what is predicted with and without each defense, and what would be enough."""
    return [Text("\n".join(_head(prediction))), _outlooks(prediction), Text("\n".join(_tail(prediction, specs)))]


def _head(prediction: Prediction) -> list[str]:
    setting, rewards = prediction.setting, prediction.rewards
    detection = setting.get("detection", 0.0)
    paid = f"a violation pays {rewards.violation:.3g}, compliance {rewards.compliance:.3g}"
    caught = f", a detected violation {rewards.detected:.3g} (probability {detection:g})" if detection else ""
    return [
        f"start: p0 = {prediction.p0:.3g} ({prediction.p0_from})",
        f"learner: groups of {setting['group_size']}, scale_rewards {setting['scale_rewards']}",
        f"rewards, means over the training scenarios: {paid}{caught}; a violation gains {prediction.gap:+.3g}",
    ]


def _outlooks(prediction: Prediction) -> Table:
    holds = f"holds: never comes to 25 %; holds {HELD:.0%}: settles there or below"
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, caption=holds, caption_justify="left")
    shown.add_column("defense", overflow="fold")
    for heading in ("end", "peak", "to 25 %", "to 50 %"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("predicted", overflow="fold")
    several = [prediction.together] if len(known(prediction.alone)) > 1 else []
    for each in (prediction.undefended, *prediction.alone, *several):
        numbers = [steps_text(each.to_25), steps_text(each.to_50)] if each.end is not None else ["–", "–"]
        shown.add_row(Text(each.name), rate_text(each.end), rate_text(each.peak), *numbers, Text(each.words))
    return shown


def _tail(prediction: Prediction, specs: Sequence[DefenseSpec]) -> list[str]:
    setting, rewards, p0 = prediction.setting, prediction.rewards, prediction.p0
    detection = setting.get("detection", 0.0)
    lines = []
    if prediction.undefended.fails:
        weights = {e: tipping.hold_beta(HELD, p0, e, **setting) for e in ("k3", "bias_corrected", "reward")}
        enough = ", ".join(f"{rounded_up(weight)} ({estimator})" for estimator, weight in weights.items())
        held = f"to hold {HELD:.0%} from this p0: {enough}" if p0 < HELD else f"none holds {HELD:.0%}, less than p0"
        critical = f"{prediction.critical_beta:.3g}" if math.isfinite(prediction.critical_beta) else "none (no limit)"
        lines.append(f"KL anchor: critical beta {critical} (k3, however small p0 is); {held}")
    if rewards.violation > rewards.compliance:
        needed = tipping.deterrence(high=rewards.violation, low=rewards.compliance, fine=-rewards.detected)
        pays = "compliance pays" if prediction.gap <= 0 else "violating pays"
        least = rounded_up(needed, 2)
        bound = f"deterrence: compliance pays most from a detection of {least} on; here it is {detection:g}: {pays}"
        if detection and prediction.gap > 0:
            fine = tipping.deterring_fine(detection, high=rewards.violation, low=rewards.compliance)
            bound += f"; with it, a fine of {rounded_up(fine)} of the best payoff is enough"
        lines.append(bound)
        if prediction.gap < 0 and prediction.undefended.end != 0:
            lines.append(
                "But group-normalised advantages count how often a violation comes out above the others, not by how "
                "much: with detection below 0.5 few violations grow all the same."
            )
    lines.append(
        "Model steps are not the run's steps: thresholds and orders are predicted, times are not (docs/prediction.md)."
    )
    return [*lines, *prediction.notes, *(f"warning: {line}" for line in warnings_of(prediction, specs))]


def rate_text(rate: float | None) -> str:
    return "–" if rate is None or math.isnan(rate) else f"{rate:.1%}"


def steps_text(steps: float) -> str:
    return f"{steps:,.0f}" if math.isfinite(steps) else "never"
