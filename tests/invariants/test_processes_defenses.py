"""Defenses that measure, draw or carry something do the same in two processes as in one."""

from __future__ import annotations

import pytest

from tests.invariants.test_processes import ONE, TWO, adapters, done, episodes, evolution, metrics, start

DEFENSES = ", ".join(
    [
        "{name: interleave, rho: 0.4}",
        "{name: kl_anchor, estimator: reward, streams: rule, target_kl: 0.01}",
        "{name: moving_anchor, beta: 0.5}",
        "{name: lagrangian, warm_start: 0.3}",
        "{name: random_routing, mode: screening, false_alarm: 0.2}",
        "{name: covariance}",
        "{name: gate, test: cusum, p0: 0.2, shift: 0.3, h: 6}",
        "{name: early_stop, budget: 0.02}",
    ]
)


def test_two_processes_defend_as_one_does(tmp_path):
    runs = []
    for name, command in (("one", ONE), ("two", TWO)):
        done(start([*command, *evolution("run.dir=run", f"defenses=[{DEFENSES}]")], tmp_path / name))
        runs.append(tmp_path / name / "run")
    one, two = runs
    assert episodes(one) == episodes(two)
    ours, theirs = adapters(one), adapters(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        for key, tensor in ours[name].items():
            assert (tensor - theirs[name][key]).abs().max().item() < 1e-6, (name, key)
    lines = list(zip(metrics(one), metrics(two), strict=True))
    assert len(lines) == 3
    for mine, other in lines:
        assert mine.keys() == other.keys()
        for key, value in mine.items():  # what both of them read together may be more
            if key.startswith("defense/") and not key.endswith(("/tokens", "/forwards")):
                assert value == pytest.approx(other[key], rel=1e-4, abs=2e-6), key
