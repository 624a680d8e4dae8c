"""robust_align: its mathematics by hand and against autograd, and a few steps that show what each option does."""

import json
import math

import pytest
import torch

from atp_rl import pipeline
from atp_rl.align import grpo
from atp_rl.align.robust import FRPOTrainer, frpo_advantages
from atp_rl.align.trainer import Training
from atp_rl.recipe import load
from atp_rl.scenarios import load as load_scenarios
from atp_rl.scenarios import make_env
from atp_rl.types import InputError
from tests import small_model


def test_frpo_by_hand():
    # two samples: e = (1, 2), S = 3, S_k = (2, 1); weights G e_i / S - (G - 1) / G e_i / S_k of the other one's k
    advantages = torch.tensor([[math.log(2), 0.0]])
    weights = torch.tensor([[2 * 1 / 3 - 0.5 * 1 / 1, 2 * 2 / 3 - 0.5 * 2 / 2]])
    assert weights.sum() == pytest.approx(1)
    torch.testing.assert_close(frpo_advantages(advantages, 1.0), 1 - 2 * weights)
    assert frpo_advantages(torch.zeros(3, 4), 1.0).abs().max() < 1e-6  # equal samples: nothing to learn


def objective(logprobs, advantages, lam):
    """-lam log E[exp(-A / lam)], jackknifed over the drawn samples, with the source's baseline: their mean ratio."""
    ratio = torch.exp(logprobs - logprobs.detach())
    e, group = ratio * torch.exp(-advantages / lam), len(advantages)
    without = [torch.log(torch.cat([e[:k], e[k + 1 :]]).mean()) for k in range(group)]
    return -lam * (group * torch.log(e.mean()) - (group - 1) * torch.stack(without).mean() - ratio.mean())


@pytest.mark.parametrize("lam", [0.5, 1.0, 4.0])
def test_frpo_is_the_gradient_of_its_objective(lam):
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    logprobs = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad(objective(logprobs, advantages, lam), logprobs)
    (ours,) = torch.autograd.grad((logprobs * frpo_advantages(advantages.unsqueeze(0), lam)[0]).mean(), logprobs)
    torch.testing.assert_close(ours, theirs)


def test_frpo_becomes_grpo_and_fears_bad_samples_more():
    advantages = torch.tensor([[1.0, 1.0, 1.0, -3.0]], dtype=torch.float64)
    # the jackknife also takes off what a sample adds to its own baseline: the factor G / (G - 1)
    torch.testing.assert_close(frpo_advantages(advantages, 1e4), 4 / 3 * advantages, atol=1e-3, rtol=0)
    robust = frpo_advantages(advantages, 1.0)
    assert robust[0, 3] < 1.3 * 4 / 3 * -3
    assert robust.sum() == pytest.approx(0, abs=1e-9)
    assert frpo_advantages(torch.tensor([[80.0, -80.0, 0.0]]), 0.5).isfinite().all()


OPTIONS = {
    "max_steps": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "max_completion_length": 12,
}


def prompts():
    rows = []
    for scenario in load_scenarios({"families": ["ferry_pilot", "archivist"], "per_family": 2}):
        env = make_env(scenario, rounds=1, supervision={"probability": 0.1}, seed=0, history_window=0)
        rows.append({"prompt": env.observe()["agent"], "options": list(scenario.options), "required": scenario.rule})
    return rows


def align(out, options=None, **robust):
    training = Training(small_model.base(), out, small_model.lora(), OPTIONS | (options or {}), seed=0)
    grpo.train(prompts(), training, **robust)
    entries = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def test_less_entropy_with_its_weight(tmp_path):
    plain, weak, strong = (
        align(tmp_path / name, **robust)
        for name, robust in {"plain": {}, "weak": {"entropy": 0.1}, "strong": {"entropy": 2.0}}.items()
    )
    start = plain[0]["entropy"]
    assert weak[0]["entropy"] == strong[0]["entropy"] == start  # the same start
    assert strong[0]["loss"] - plain[0]["loss"] == pytest.approx(2.0 * start, rel=1e-3)  # the loss, by hand
    assert strong[-1]["entropy"] < weak[-1]["entropy"] < plain[-1]["entropy"]
    assert strong[-1]["entropy"] < 0.7 * plain[-1]["entropy"]


def test_frpo_weights_reach_the_loss(tmp_path, monkeypatch):
    weighed, given = [], []

    def spy(advantages, lam):
        weighed.append((advantages, frpo_advantages(advantages, lam)))
        return weighed[-1][1]

    class Spy(FRPOTrainer):
        def _compute_loss(self, model, inputs):
            given.append(inputs["advantages"])
            return super()._compute_loss(model, inputs)

    monkeypatch.setattr("atp_rl.align.robust.frpo_advantages", spy)
    monkeypatch.setattr("atp_rl.align.robust.FRPOTrainer", Spy)
    align(tmp_path, {"max_steps": 1}, frpo_lambda=1.0)
    ((before, after),) = weighed
    assert before.shape == (2, 8)
    assert before.abs().max() > 0.1  # the coin of the base gives some group both verdicts
    assert not torch.allclose(before, after, atol=0.01)
    torch.testing.assert_close(given[0].sort().values, after.flatten().sort().values)  # TRL shuffles them


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["align.method=dpo", "align.robust.entropy=.1"],
            "`align.robust` works on sampled replies.*set `align.method` to grpo",
        ),
        (["align.method=grpo", "align.robust={}"], "`align.robust` needs `entropy` or `frpo_lambda`"),
        (["align.method=grpo", "align.robust.frpo_lambda=0"], "`align.robust.frpo_lambda` must be greater than 0"),
        (
            ["align.method=grpo", "align.robust.entropy=.1", "align.trl.entropy_coef=.1"],
            "`align.robust` sets the entropy's weight, and so does `align.trl.entropy_coef`",
        ),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        pipeline.check(load(overrides))
