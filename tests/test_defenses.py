"""Each defense's arithmetic by hand, its options, and what it does to a real run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atp_rl.defenses import DEFENSES, Defense, Gate, KLAnchor, LossBatch, Probe, Setting
from atp_rl.defenses.kl_anchor import kl_to_anchor
from atp_rl.evolve import loop
from atp_rl.evolve.learners import PolicyGradient
from atp_rl.evolve.loop import draw
from atp_rl.model.policy import Policy
from atp_rl.recipe import DefenseSpec, check_defenses
from atp_rl.rollout import rollout
from atp_rl.tracking.run import Run
from atp_rl.types import InputError
from tests.small_model import (
    checkpoint_files,
    episode,
    make_policy,
    reproducible,
    run_of,
    small_recipe,
    turn,
)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


# --- kl_anchor


def test_the_penalty_of_one_token_by_hand():
    # d = log(aligned / policy) = log 1/2, log 2, 0;  k3 = exp(d) - d - 1 = log 2 - 1/2, 1 - log 2, 0
    policy, aligned, old = logs(0.5, 0.25, 0.3), logs(0.25, 0.5, 0.3), logs(0.4, 0.5, 0.1)
    k3 = [math.log(2) - 0.5, 1 - math.log(2), 0.0]
    assert kl_to_anchor(policy, aligned, old, "k3")[0].tolist() == pytest.approx(k3, abs=1e-6)
    ratios = [1.25, 0.5, 3.0]
    corrected = kl_to_anchor(policy, aligned, old, "bias_corrected")[0].tolist()
    assert corrected == pytest.approx([k * r for k, r in zip(k3, ratios, strict=True)], abs=1e-6)


LOGITS = torch.tensor([0.3, -0.8, 1.1, 0.0])
ALIGNED = torch.tensor([1.0, 0.2, -0.5, 0.4]).log_softmax(0)


def divergences(policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(policy || aligned) and KL(aligned || policy)."""
    return (policy.exp() * (policy - ALIGNED)).sum(), (ALIGNED.exp() * (ALIGNED - policy)).sum()


@pytest.mark.parametrize("estimator", ["k3", "bias_corrected"])
def test_on_average_over_the_policys_tokens_the_penalty_is_the_kl(estimator):
    policy = LOGITS.log_softmax(0)
    mean = (policy.exp() * kl_to_anchor(policy, ALIGNED, policy, estimator)).sum()
    torch.testing.assert_close(mean, divergences(policy)[0])


@pytest.mark.parametrize(("estimator", "direction"), [("bias_corrected", 0), ("k3", 1)])
def test_the_two_estimators_pull_along_the_two_directions_of_the_kl(estimator, direction):
    # the tokens are drawn once, so the weights of the mean are constants
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(0)
    drawn = policy.detach()
    (drawn.exp() * kl_to_anchor(policy, ALIGNED, drawn, estimator)).sum().backward()
    exact = LOGITS.clone().requires_grad_()
    divergences(exact.log_softmax(0))[direction].backward()
    torch.testing.assert_close(logits.grad, exact.grad)


def test_the_penalty_is_weighted_summed_and_logged_with_its_cost():
    asked = []

    def anchor() -> torch.Tensor:
        asked.append(1)
        return logs(0.25, 0.5, 0.9)

    policy = logs(0.5, 0.25, 0.3)
    weights, mask = torch.tensor([[0.5, 0.25, 0.0]]), torch.tensor([[True, True, False]])
    zeros = torch.zeros(1, 3)
    batch = LossBatch(policy, policy, anchor, mask, weights, zeros.long(), zeros[:, :1], zeros, zeros[0, :1].long())
    defense = KLAnchor(beta=4.0)
    defense.begin(1)
    mean = 0.5 * (math.log(2) - 0.5) + 0.25 * (1 - math.log(2))
    assert float(defense.extra_loss(batch) or 0) == pytest.approx(4 * mean, abs=1e-6)
    defense.extra_loss(batch)  # a second micro-batch of the same step
    assert len(asked) == 2
    assert defense.metrics["kl"] == pytest.approx(2 * mean, abs=1e-6)
    defense.begin(2)
    assert defense.metrics == {}


def test_a_heavier_anchor_holds_closer():
    group = [episode(turn((5, 6, 7), (20, 2))), episode(turn((5, 6, 7), (30, 2)))]

    def distance(beta: float) -> float:
        policy, anchor = make_policy(), KLAnchor(beta)
        learner = PolicyGradient(
            policy,
            learning_rate=5e-3,
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            updates_per_step=1,
            micro_batch=None,
            clip_epsilon=0.2,
            scale_rewards="group",
            loss_type="dapo",
            max_tokens=2,
            temperature=1.0,
        )
        for _ in range(15):
            anchor.on_rewards([group], torch.zeros(1))
            learner.update(policy, [group], torch.tensor([[1.0, 0.0]]), [anchor])
        return anchor.metrics["kl"]

    free, light, heavy = distance(1e-6), distance(1.0), distance(30.0)
    assert heavy < light / 2 < free / 4


# --- gate


@pytest.mark.parametrize(
    ("violations", "n", "p_value", "accepted"),
    [
        # P(X >= k) for X ~ binomial(10, 0.1): 1 - .9^10 - 10 x .1 x .9^9 - 45 x .01 x .9^8 = .0702 at k = 3
        (0, 10, 1.0, True),
        (1, 10, 1 - 0.9**10, True),
        (3, 10, 1 - 0.9**10 - 10 * 0.1 * 0.9**9 - 45 * 0.01 * 0.9**8, True),
        (4, 10, 1 - 0.9**10 - 10 * 0.1 * 0.9**9 - 45 * 0.01 * 0.9**8 - 120 * 0.001 * 0.9**7, False),
        (2, 2, 0.01, False),
        (1, 1, 0.1, True),  # one decision can never reject at 5 %
        (0, 0, 1.0, True),  # nothing was asked
    ],
)
def test_the_gate_tests_a_binomial(violations, n, p_value, accepted):
    gate = Gate(max_rate=0.1, alpha=0.05)
    assert gate.accept(Probe(0, n, 0), Probe(violations, n, 0)) is accepted
    assert gate.metrics["p_value"] == pytest.approx(p_value, abs=1e-12)
    assert gate.metrics["accepted"] == float(accepted)
    assert gate.metrics["rejected_total"] == float(not accepted)


def test_the_gate_counts_what_it_turned_down_over_a_resume():
    gate = Gate()
    verdicts = [gate.accept(Probe(0, 20, 0), Probe(k, 20, 0)) for k in (20, 0, 20)]
    assert verdicts == [False, True, False]
    successor = Gate()
    successor.load_state(gate.state())
    successor.accept(Probe(0, 20, 0), Probe(20, 20, 0))
    assert successor.metrics["rejected_total"] == 3


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "kl_anchor", "beta": 0.0}, "`beta` must be > 0, got 0.0; leave the defense out instead"),
        ({"name": "kl_anchor", "beta": -1.0}, "`beta` must be > 0"),
        ({"name": "kl_anchor", "beta": "much"}, r"`defenses\[0\].beta` must be a number"),
        (
            {"name": "kl_anchor", "estimator": "k2"},
            r"`defenses\[0\].estimator` must be 'k3', 'bias_corrected' or 'reward'",
        ),
        (
            {"name": "kl_anchor", "betta": 1.0},
            r"unknown option `defenses\[0\].betta` of kl_anchor; did you mean `beta`",
        ),
        ({"name": "gate", "max_rate": 0.0}, "`max_rate` must be between 0 and 1, got 0.0"),
        ({"name": "gate", "max_rate": 1.0}, "`max_rate` must be between 0 and 1"),
        ({"name": "gate", "alpha": 1.5}, "`alpha` must be between 0 and 1, got 1.5"),
        ({"name": "kl_anker"}, "unknown defense 'kl_anker'; did you mean `kl_anchor`"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        check_defenses([DefenseSpec.model_validate(options)])


def test_an_estimator_is_also_checked_without_a_recipe():
    with pytest.raises(InputError, match="`estimator` must be k3, bias_corrected or reward, got 'k2'"):
        KLAnchor(estimator="k2")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", DEFENSES)
def test_every_defense_is_a_defense_of_its_own_with_defaults(name):
    one, other = (check_defenses([DefenseSpec(name=name)])[0] for _ in range(2))
    assert isinstance(one, Defense)
    assert one.metrics == {}
    assert one.metrics is not other.metrics
    one.load_state(one.state())
    assert one.state() == other.state()


# --- in a run


def adapter(run: Run, step: int) -> bytes:
    return checkpoint_files(run, step)["adapter_model.safetensors"]


def learner_state(run: Run, step: int) -> bytes:
    return checkpoint_files(run, step)["state.safetensors"]


def learner_tensors(run: Run, step: int) -> dict[str, list]:
    tensors = load_file(run.path / f"checkpoints/step_{step:04d}/state.safetensors")
    return {key: tensor.tolist() for key, tensor in tensors.items() if key.startswith("learner/")}


def version(run: Run, step: int) -> int:
    return json.loads(checkpoint_files(run, step)["state.json"])["version"]


def refusing(*steps: int) -> type[Defense]:
    """A gate that turns down these steps."""

    class Refuse(Defense):
        name = "refuse"

        def accept(self, before: Probe, after: Probe) -> bool:
            return self.step not in steps

    return Refuse


def test_a_gate_that_a_policy_cannot_pass_keeps_it_where_it_started(tmp_path):
    # the small model violates about every second time, and its limit here is one in a thousand
    recipe = small_recipe(
        tmp_path / "run",
        "defenses=[{name: gate, max_rate: 0.001}]",
        "evaluate.every=1",
        "evaluate.gate_per_family=8",
        "seed=3",
        steps=3,
    )
    run = run_of(recipe)
    metrics = run.lines("metrics.jsonl")
    assert [m["defense/gate/rejected_total"] for m in metrics] == [1, 2, 3]
    assert [m["drift/adapter_distance"] for m in metrics] == [0.0] * 3
    assert {adapter(run, step) for step in range(4)} == {adapter(run, 0)}
    assert set(load_file(run.path / "checkpoints/step_0003/state.safetensors")) >= {
        "learner/updates"
    }  # no optimizer state
    assert {learner_state(run, step) for step in range(4)} == {learner_state(run, 0)}
    evaluations = [e["splits"] for e in run.lines("evaluations.jsonl")]
    assert all(e == evaluations[0] for e in evaluations)
    alerts = run.lines("alerts.jsonl")
    assert [(a["step"], a["alert"]) for a in alerts] == [(1, "rollback"), (2, "rollback"), (3, "rollback")]
    assert all(0 < a["violations"] <= a["n"] for a in alerts)
    # one family of eight gate scenarios, a reply each: what the gate costs
    assert [m["defense/gate/forwards"] for m in metrics] == [8] * 3
    assert all(m["defense/gate/tokens"] > 8 * 20 and m["defense/gate/seconds"] > 0 for m in metrics)


def test_a_rollback_returns_to_the_step_before_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(DEFENSES, "refuse", refusing(3, 4))
    settings = ("evaluate.every=1", "evolve.warmup_steps=5")
    run = run_of(small_recipe(tmp_path / "run", "defenses=[refuse]", *settings, steps=5))
    assert adapter(run, 1) != adapter(run, 2)
    # weights, Adam's moments and its count of updates are those of step 2 until step 5 is accepted
    assert adapter(run, 2) == adapter(run, 3) == adapter(run, 4) != adapter(run, 5)
    assert learner_state(run, 2) == learner_state(run, 3) == learner_state(run, 4) != learner_state(run, 5)
    updates = [int(load_file(f / "state.safetensors")["learner/updates"]) for f in run.checkpoint_folders()]
    assert updates == [0, 1, 2, 2, 2, 3]
    # the version goes on, so that no sampler takes the restored weights for the rejected ones it has cached
    assert [version(run, step) for step in range(6)] == [0, 1, 2, 3, 4, 5]
    metrics = run.lines("metrics.jsonl")
    assert [m["rollout/staleness"] for m in metrics] == [0] * 5
    assert max(m["perf/sampler_gap_max"] for m in metrics) < 1e-3  # the restored policy is what is sampled
    rates = [m["evolve/learning_rate"] for m in metrics]
    assert rates == pytest.approx([1e-2 * k / 6 for k in (1, 2, 3, 3, 3)])
    distances = [m["drift/adapter_distance"] for m in metrics]
    assert distances[1] == distances[2] == distances[3]
    assert [a["step"] for a in run.lines("alerts.jsonl")] == [3, 4]


def test_a_rejected_step_is_as_if_it_had_never_been(tmp_path, monkeypatch):
    monkeypatch.setitem(DEFENSES, "refuse", refusing(2))
    settings = ("defenses=[refuse]", "evaluate.every=1")
    rejected = run_of(small_recipe(tmp_path / "rejected", *settings, steps=3))

    # a run of two steps, whose second one draws what the third one drew
    def later(step: int) -> int:
        return 3 if step == 2 else step

    monkeypatch.setitem(DEFENSES, "refuse", refusing())
    monkeypatch.setattr(loop, "draw", lambda s, count, seed, step: draw(s, count, seed, later(step)))
    monkeypatch.setattr(
        loop, "rollout", lambda *args, seed, **others: rollout(*args, seed=(seed[0], later(seed[1])), **others)
    )
    direct = run_of(small_recipe(tmp_path / "direct", *settings, steps=2))
    assert adapter(rejected, 3) == adapter(direct, 2)
    assert learner_state(rejected, 3) == learner_state(direct, 2)


@pytest.mark.parametrize("kind", [Defense, refusing()], ids=["no_hooks", "accepts_everything"])
def test_a_defense_that_does_nothing_has_no_effect(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(DEFENSES, "nothing", kind)
    alone = run_of(small_recipe(tmp_path / "alone", "defenses=[]", steps=3))
    defended = run_of(small_recipe(tmp_path / "defended", "defenses=[nothing]", steps=3))
    for step in (0, 2, 3):
        assert adapter(alone, step) == adapter(defended, step)
        assert learner_tensors(alone, step) == learner_tensors(defended, step)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        undefended = [{k: v for k, v in reproducible(r).items() if "defense/" not in k} for r in defended.lines(name)]
        assert [reproducible(r) for r in alone.lines(name)] == undefended
    assert not (defended.path / "alerts.jsonl").exists()


def test_hooks_are_called_in_their_order_with_what_they_are_for(tmp_path, monkeypatch):
    called: list[str] = []

    class Witness(Defense):
        name = "witness"

        def prepare(self, setting: Setting) -> None:
            assert setting.policy.version == 0
            assert len(setting.rule_scenarios) > 0
            called.append("prepare")

        def begin(self, step: int) -> None:
            super().begin(step)
            called.append("begin")

        def on_scenario(self, scenario):
            if "on_scenario" not in called:
                called.append("on_scenario")
            return scenario

        def on_draw(self, scenarios):
            assert len(scenarios) == 2
            called.append("on_draw")
            return scenarios

        def on_history(self, rounds, moment):
            assert (rounds, moment.round, moment.past) == ([], 0, ())
            called.append("on_history")
            return rounds

        def on_prompts(self, prompts, ask):
            assert {prompt.messages[-1]["role"] for prompt in prompts} == {"user"}
            called.append(f"on_prompts of {len(prompts)}")
            return prompts

        def on_rewards(self, groups, rewards):
            assert rewards.shape == (2, 4)
            assert rewards.max() <= 1
            called.append("on_rewards")
            return rewards

        def on_advantages(self, groups, advantages):
            assert advantages.sum(1).abs().max() < 1e-5
            called.append("on_advantages")
            return advantages

        def extra_loss(self, batch: LossBatch) -> None:
            assert batch.weights[~batch.mask].abs().sum() == 0
            called.append("extra_loss")

        def backward(self, policy: Policy) -> None:
            called.append("backward")

        def on_gradients(self, policy: Policy) -> None:
            assert all(p.grad is not None for p in policy.trainable)
            called.append("on_gradients")

        def after_update(self, policy: Policy) -> None:
            assert self.step == policy.version == 1
            called.append("after_update")

        def accept(self, before: Probe, after: Probe) -> bool:
            assert before.n == after.n == 2  # the gate suite: two scenarios of the training family
            called.append("accept")
            return True

    monkeypatch.setitem(DEFENSES, "witness", Witness)
    run_of(small_recipe(tmp_path / "run", "defenses=[witness]", steps=1))
    # only training is prompted through the defenses: 2 scenarios x 4 episodes x 1 round; evaluations are not
    assert called == [
        "prepare",
        "on_scenario",
        "begin",
        "on_draw",
        *["on_history"] * 8,
        "on_prompts of 8",
        "on_rewards",
        "on_advantages",
        "extra_loss",
        "backward",
        "on_gradients",
        "after_update",
        "accept",
    ]
