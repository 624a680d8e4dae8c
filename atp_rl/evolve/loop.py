"""The evolution loop: an aligned policy meets environments that pay it, and learns from what pays.

Read this first. One step draws scenarios, plays a group of episodes of each, turns payoffs into rewards, updates the
live adapter, and every few steps measures what became of the alignment. Every hook of a defense is a line here or in
the learner. What is removed on purpose: replay of old episodes, a critic, asynchronous sampling; episodes are always
of the current policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import reward_models
from atp_rl import ranks
from atp_rl.defenses import Defense, Probe
from atp_rl.evaluate.drift import adapter_distance
from atp_rl.evaluate.evaluator import tally
from atp_rl.evolve.rewards import shape
from atp_rl.evolve.setup import (
    Snapshot,
    defended,
    defense_metrics,
    gate_probe,
    gates,
    load,
    load_policy,
    make_learner,
    make_sampler,
    make_sync_probe,
    measure_checkpoint,
    prepare,
    save,
    settings_of,
    training_play,
)
from atp_rl.recipe import Recipe, check_defenses
from atp_rl.rollout import rollout
from atp_rl.scenarios import random_stream
from atp_rl.scenarios.suites import Suites
from atp_rl.tracking.progress import Report, silent
from atp_rl.tracking.run import Interrupted, Run
from atp_rl.types import Scenario

MAX_SAMPLER_GAP = 0.1
"""Mean distance (nats) of the sampler's log-probabilities from the learner's at which the run stops: they must be the
same policy, and a sampler that silently kept old weights is the commonest bug of the field."""


def evolve(
    recipe: Recipe,
    run: Run,
    suites: Suites,
    *,
    anchor: Path | None,
    stop: Callable[[], bool] = lambda: False,
    report: Report = silent,
) -> None:
    """Run the evolution of `recipe` in `run`'s directory, from its last checkpoint if it has one.

    With several ranks each plays whole groups of its own and puts its share of the rows through the model; everything
    else happens on all of them alike.

    Args:
        anchor: directory of the aligned adapter that the policy starts from and is anchored to; None is the bare base.
        stop: asked at every step border; true saves a checkpoint and raises Interrupted.
        report: told what each step showed.

    Raises:
        Interrupted: `stop` said so; resuming continues bit for bit.
    """
    settings, play = settings_of(recipe), training_play(recipe)
    policy = load_policy(recipe, anchor, suites)
    aligned, anchor_hash = policy.state(), policy.adapter_hash("aligned")
    sampler, sync_probe = make_sampler(recipe, policy), make_sync_probe(recipe, suites, policy)
    models = reward_models.make(settings.rewards, settings.reward_options.model_dump(), folder=run.path)
    defenses: list[Defense] = check_defenses(recipe.defenses, recipe.evolve)
    prepare(recipe, suites, policy, anchor, defenses)
    train = defended(suites, defenses).train
    gating = any(gates(defense) for defense in defenses)
    learner = make_learner(recipe, policy)

    before: Probe | None = None
    safe: Snapshot | None = None
    if last := ranks.from_first(run.last_checkpoint):
        if last.state["anchor"] != anchor_hash:
            raise RuntimeError("the aligned adapter is not the one that this run started from")
        if (was := last.state.get("ranks", 1)) != ranks.world_size():
            news = f"{was} process(es) until here, {ranks.world_size()} from here: the same run but for rounding"
            report(last.step, news, important=True)
        ranks.from_first(lambda: run.rewind(last.step))
        safe = load(last, policy, learner, defenses)
        before = Probe(*last.state["probe"]) if last.state["probe"] else None
        sampler.sync(policy)
        sync_probe.check(policy, sampler)
    else:
        ranks.from_first(lambda: run.rewind(-1))
        sync_probe.check(policy, sampler)
        measure_checkpoint(recipe, run, suites, policy, sampler, defenses, step=0, report=report)
        before = gate_probe(recipe, suites, sampler, defenses, 0) if gating else None
        safe = Snapshot(policy.state(), learner.state()) if gating else None
        save(recipe, run, policy, learner, defenses, before, safe, anchor_hash, step=0)

    for step in range((last.step if last else 0) + 1, settings.steps + 1):
        if ranks.any_rank(stop()):
            save(recipe, run, policy, learner, defenses, before, safe, anchor_hash, step=step - 1)
            how = f"`atp resume {run.path}`" + (" under the same launcher" if ranks.world_size() > 1 else "")
            raise Interrupted(f"stopped after step {step - 1} of {settings.steps}; {how} continues")
        begun = time.perf_counter()
        scenarios = draw(train, settings.scenarios_per_step, recipe.seed, step)
        for defense in defenses:
            defense.begin(step)
            scenarios = defense.on_draw(scenarios)
        played = rollout(
            scenarios, sampler, play, group_size=settings.group_size, seed=(recipe.seed, step), readers=defenses
        )
        sampler.sync(policy)  # what it has read takes memory that the update needs
        rewards = shape(played.groups, settings.rewards, models)
        for defense in defenses:
            with defense.paying(policy):
                rewards = defense.on_rewards(played.groups, rewards)
        metrics = learner.update(policy, played.groups, rewards, defenses)
        if not metrics["perf/sampler_gap_mean"] <= MAX_SAMPLER_GAP:  # nan is no small gap
            raise RuntimeError(f"step {step}: the sampler does not play the policy that learns: {metrics}")
        for defense in defenses:
            with defense.paying(policy):
                defense.after_update(policy)
        sampler.sync(policy)
        metrics |= sync_probe.check(policy, sampler)
        if gating:
            assert before is not None
            after = gate_probe(recipe, suites, sampler, defenses, step)
            verdicts = [defense.accept(before, after) for defense in defenses]  # all of them see every step
            if all(verdicts):
                before = after
                if all(defense.trusts for defense in defenses):
                    safe = Snapshot(policy.state(), learner.state())
            else:
                assert safe is not None
                policy.restore(safe.adapter)
                learner.load_state(safe.learner)
                for defense in defenses:
                    defense.on_rollback()
                sampler.sync(policy)
                sync_probe.check(policy, sampler)
                run.log_alert({"step": step, "alert": "rollback", "violations": after.violations, "n": after.n})
        if policy.adapter_hash("aligned") != anchor_hash:
            raise RuntimeError(f"step {step}: the frozen aligned adapter has changed")

        outcomes = tally(played.episodes)
        metrics |= {
            "progress/step": step,
            "evolve/payoff_mean": outcomes.payoff_mean,
            "evolve/reward_mean": rewards.mean().item(),
            "rollout/violation_rate": outcomes.violations / outcomes.n,
            "rollout/invalid_rate": outcomes.invalid / outcomes.n,
            "rollout/tokens_per_s": played.tokens / played.seconds,
            "rollout/staleness": policy.version - 1 - played.episodes[0].version,
            "perf/ranks": ranks.world_size(),
            "drift/adapter_distance": adapter_distance(policy.state(), aligned),
            "drift/anchor_sha": anchor_hash[:16],
            "time/rollout_s": played.seconds,
            "time/step_s": time.perf_counter() - begun,
        }
        metrics |= {f"reward/{n}/{k}": v for n, m in models.items() for k, v in getattr(m, "metrics", {}).items()}
        metrics |= defense_metrics(defenses)
        run.log_metrics(metrics)
        report(
            step, f"payoff {outcomes.payoff_mean:.2f}  violations in training {outcomes.violations / outcomes.n:.0%}"
        )
        if step % recipe.evaluate.every == 0 or step == settings.steps:
            run.write_episodes(f"step_{step:04d}_train", played.episodes)
            measure_checkpoint(recipe, run, suites, policy, sampler, defenses, step=step, report=report)
            save(recipe, run, policy, learner, defenses, before, safe, anchor_hash, step=step)


def draw(scenarios: Sequence[Scenario], count: int, seed: int, step: int) -> list[Scenario]:
    """The scenarios of one step (from 1): the next `count` of an endless series of shuffled passes over all of them.

    Runs of four stay together: in them names and order of the options are counterbalanced (`role_play.generate`), or a
    small policy settles on one name before it has learned to read.
    """
    size = len(scenarios)
    runs = range(0, size, 4)

    def shuffled(number: int) -> list[Scenario]:
        order = random_stream(seed, "draw", number).permutation(runs)
        return [scenario for start in order for scenario in scenarios[start : start + 4]]

    places = range((step - 1) * count, step * count)
    passes = {number: shuffled(number) for number in {place // size for place in places}}
    return [passes[place // size][place % size] for place in places]
