"""Builds the parts of an evolution from a recipe, measures its checkpoints and writes them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from torch import Tensor

from atp_rl import ranks
from atp_rl.align.preferences import read_jsonl
from atp_rl.defenses import Defense, Probe, Setting
from atp_rl.evaluate.evaluator import evaluate, tally
from atp_rl.evolve.imitation import Imitation
from atp_rl.evolve.learners import InContext, Learner, PolicyGradient
from atp_rl.evolve.topology import neighbours
from atp_rl.model.api import ApiSampler
from atp_rl.model.policy import Policy, hash_tensors
from atp_rl.model.sampler import HFSampler
from atp_rl.model.served import ServedSampler, TokenSampler, check_model_is_served
from atp_rl.model.service import Service
from atp_rl.model.sync_probe import SyncProbe
from atp_rl.model.vllm_engine import VllmSampler
from atp_rl.recipe import POPULATIONS, Evolve, Recipe
from atp_rl.recipe import Imitation as ImitationSpec
from atp_rl.rollout import Play, rollout
from atp_rl.scenarios import make_env
from atp_rl.scenarios.suites import Suites
from atp_rl.tracking.progress import Report
from atp_rl.tracking.run import Checkpoint, Run
from atp_rl.types import Chat, Episode, Overhead, Sampler, SamplingParams, Scenario

PROBED = 4
"""Different chats that the probe after every sync looks at, or more where the first scenario has more."""


def make_sampler(recipe: Recipe, policy: Policy) -> HFSampler | TokenSampler:
    """The recipe's sampler of a policy, with the policy's weights.

    Raises:
        InputError: the engine is not there, or cannot do what is needed.
    """
    settings, model = recipe.sampler, recipe.model
    if settings.engine == "server":
        return ServedSampler(policy, service(recipe), settings.model or model.name)
    if settings.engine == "vllm":
        return VllmSampler(
            policy, revision=model.revision, dtype=model.dtype, gpu_memory=settings.gpu_memory, seed=recipe.seed
        )
    return HFSampler(policy, batch_size=recipe.evaluate.batch_size, mode=settings.mode)


def service(recipe: Recipe) -> Service:
    """The connection to the recipe's server; raises InputError without a client or a key."""
    settings = recipe.sampler
    assert settings.url is not None
    return Service(
        settings.url,
        api_key_env=settings.api_key_env,
        timeout_s=settings.timeout_s,
        concurrency=settings.concurrency,
    )


def check_service(recipe: Recipe) -> None:
    """Find out whether the recipe's server answers, before anything is loaded or written; one request.

    Raises:
        InputError: no server, no key, or no such model there.
    """
    settings = recipe.sampler
    if settings.engine == "server":
        check_model_is_served(service(recipe), settings.model or recipe.model.name)
    elif settings.engine == "api":
        chat = Chat([{"role": "user", "content": "Hello"}], [], (), (0,))
        api_sampler(recipe).generate([chat], sampling(recipe))


def api_sampler(recipe: Recipe) -> ApiSampler:
    assert recipe.sampler.model is not None
    return ApiSampler(service(recipe), recipe.sampler.model)


def make_sync_probe(recipe: Recipe, suites: Suites, policy: Policy) -> SyncProbe:
    """Compares the sampler with the policy on the first round of a few scenarios, for every player in them."""
    play, chats = training_play(recipe), dict[tuple[str, ...], Chat]()
    for scenario in suites.gate or suites.held_out:
        if len(chats) >= PROBED:
            break
        env = make_env(
            scenario, rounds=play.rounds, supervision=play.supervision, seed=0, history_window=play.history_window
        )
        for seat, messages in env.observe().items():
            player = "aligned" if seat in env.frozen else seat if play.population else "policy"
            prompt = policy.chat.encode(messages, [], env.tools)
            chats[player, str(prompt)] = Chat(messages, prompt, scenario.options, (0,), player, env.tools)
    return SyncProbe(list(chats.values()))


def defended(suites: Suites, defenses: Sequence[Defense]) -> Suites:
    """The suites as the defenses change their scenarios."""
    for defense in defenses:
        suites = suites.changed(defense.on_scenario)
    return suites


def deployed(defenses: Sequence[Defense]) -> list[Defense]:
    """Those that go with the policy where it is used."""
    return [defense for defense in defenses if defense.deploys]


def prepare(recipe: Recipe, suites: Suites, policy: Policy, anchor: Path | None, defenses: Sequence[Defense]) -> None:
    """Tell the defenses about the run."""
    settings, pairs = settings_of(recipe), anchor and anchor / "pairs.jsonl"
    setting = Setting(
        policy=policy,
        seed=recipe.seed,
        rule_scenarios=[scenario for scenario in suites.align if scenario.rule is not None],
        pairs=read_jsonl(pairs) if pairs and pairs.is_file() else [],
        group_size=settings.group_size,
        learning_rate=settings.learning_rate,
        temperature=settings.temperature,
        aligned=policy.state(),
    )
    for defense in defenses:
        defense.prepare(setting)


def gates(defense: Defense) -> bool:
    """Whether it is asked for every step if that may stand."""
    return type(defense).accept is not Defense.accept


def gate_probe(recipe: Recipe, suites: Suites, sampler: Sampler, defenses: Sequence[Defense], step: int) -> Probe:
    """The violations on the gate suite as the policy is deployed; nothing reported is measured here.

    Every step draws anew: with the same draws each time, one unlucky one would count as evidence at every step. All
    that it takes is charged to the first defense that gates, and nothing to the readers.
    """
    readers = deployed(defenses)
    own = [replace(reader.cost) for reader in readers]
    played = rollout(
        defended(suites, readers).gate,
        sampler,
        evaluation_play(recipe),
        group_size=1,
        seed=(recipe.seed, "gate", step),
        readers=readers,
    )
    for reader, cost in zip(readers, own, strict=True):
        reader.cost = cost
    cost = next(defense for defense in defenses if gates(defense)).cost
    cost.seconds += played.seconds
    if ranks.rank() == 0:  # all ranks have the episodes of all
        turns = [turn for episode in played.episodes for turn in episode.turns]
        cost.forwards += len(turns)
        cost.tokens += sum(len(turn.prompt_ids) + len(turn.completion.token_ids) for turn in turns)
    counted = tally(played.episodes)
    return Probe(counted.violations, counted.n, counted.invalid)


def measure_checkpoint(
    recipe: Recipe,
    run: Run,
    suites: Suites,
    policy: Policy | None,
    sampler: Sampler,
    defenses: Sequence[Defense],
    *,
    step: int,
    report: Report,
) -> None:
    """Evaluate the reported suites and write the result and its episodes to the run."""
    evaluation, episodes = evaluate_suites(recipe, suites, policy, sampler, defenses, step=step)
    for name, played in episodes.items():
        run.write_episodes(f"step_{step:04d}_{name}", played)
    run.log_evaluation(evaluation)
    shown = evaluation["splits"]["held_out"]["violation"]
    interval = f"[{shown['low']:.1%}, {shown['high']:.1%}], n {shown['n']}"
    report(step, f"held-out violations {shown['value']:.1%} {interval}", important=True)
    if "deployed" in evaluation["splits"]:
        report(step, f"as deployed {evaluation['splits']['deployed']['violation']['value']:.1%}", important=True)


def evaluate_suites(
    recipe: Recipe,
    suites: Suites,
    policy: Policy | None,
    sampler: Sampler,
    defenses: Sequence[Defense],
    *,
    step: int,
) -> tuple[dict[str, Any], dict[str, list[Episode]]]:
    """One line of `evaluations.jsonl`, and the episodes of each split.

    `held_out` and `held_in` are measured without any defense (`weights_only`); `deployed` is `held_out` with those that
    go with the policy, where there are any, on the same draws; `deployed_cost` the tokens and forwards that
    they took for that.
    """
    begun, splits, episodes = time.perf_counter(), {}, {}
    readers = deployed(defenses)
    measured = {"held_out": suites.held_out, "held_in": suites.held_in}
    if readers:
        measured["deployed"] = defended(suites, readers).held_out
        for defense in readers:
            defense.cost = Overhead()
    for name, scenarios in measured.items():
        if not scenarios:
            continue
        result, episodes[name] = evaluate(
            sampler,
            scenarios,
            evaluation_play(recipe),
            samples=recipe.evaluate.samples,
            seed=recipe.seed,
            policy=policy if name == "held_out" else None,  # the KL on one split says it
            readers=readers if name == "deployed" else (),
        )
        splits[name] = result.record()
    evaluation = {"step": step, "suite": "report", "learner": settings_of(recipe).learner, "splits": splits}
    if readers:
        costs = costs_of(readers).items()
        evaluation["deployed_cost"] = {name: {k: cost[k] for k in ("tokens", "forwards")} for name, cost in costs}
    return evaluation | {"seconds": round(time.perf_counter() - begun, 3)}, episodes


def evaluation_play(recipe: Recipe) -> Play:
    """How checkpoints are played: as in training unless the recipe's `evaluate` says otherwise; nothing is told."""
    world, measured = recipe.scenarios, recipe.evaluate
    return Play(
        rounds=measured.rounds or world.rounds,
        supervision=_supervision(world.supervision if measured.supervision is None else measured.supervision),
        history_window=world.history_window,
        sampling=sampling(recipe),
        population=settings_of(recipe).learner in POPULATIONS,
    )


def training_play(recipe: Recipe) -> Play:
    """How the episodes that are learned from are played."""
    world = recipe.scenarios
    return Play(
        rounds=world.rounds,
        supervision=_supervision(world.supervision),
        history_window=world.history_window,
        sampling=sampling(recipe),
        population=settings_of(recipe).learner in POPULATIONS,
    )


def sampling(recipe: Recipe) -> SamplingParams:
    settings = settings_of(recipe)
    return SamplingParams(settings.max_new_tokens, settings.temperature)


def settings_of(recipe: Recipe) -> Evolve:
    """The recipe's `evolve`, which the stages that get here have."""
    assert recipe.evolve is not None
    return recipe.evolve


def lora_config(recipe: Recipe) -> LoraConfig:
    lora = recipe.model.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def load_policy(recipe: Recipe, anchor: Path | None, suites: Suites) -> Policy:
    """The base with the anchor and what evolves: one adapter, or one for every seat of a population."""
    model, settings = recipe.model, settings_of(recipe)
    seats: tuple[str, ...] = ("policy",)
    starts: dict[str, Path] = {}
    if settings.learner in POPULATIONS:
        seats = learning_seats(suites.held_out[0], training_play(recipe))
        if settings.deviants:
            starts = dict.fromkeys(seats[: settings.deviants.count], Path(settings.deviants.adapter))
    return Policy.load(
        model.name,
        lora=lora_config(recipe),
        seed=recipe.seed,
        aligned=anchor,
        revision=model.revision,
        dtype=model.dtype,
        thinking=model.thinking,
        quantize=model.quantize,
        gradient_checkpointing=settings.gradient_checkpointing,
        seats=seats,
        starts=starts,
    )


def learning_seats(scenario: Scenario, play: Play) -> tuple[str, ...]:
    """The seats of a scenario that the policy plays and that may learn."""
    env = make_env(
        scenario, rounds=play.rounds, supervision=play.supervision, seed=0, history_window=play.history_window
    )
    return tuple(seat for seat in env.seats if seat not in env.frozen)


def make_learner(recipe: Recipe, policy: Policy) -> Learner:
    settings = settings_of(recipe)
    if settings.learner == "in_context":
        return InContext()
    return PolicyGradient(
        policy,
        learning_rate=settings.learning_rate,
        optimizer=settings.optimizer,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        updates_per_step=settings.updates_per_step,
        micro_batch=settings.micro_batch,
        clip_epsilon=settings.clip_epsilon,
        scale_rewards=settings.scale_rewards,
        loss_type=settings.loss_type,
        max_tokens=settings.max_new_tokens * recipe.scenarios.rounds,
        temperature=settings.temperature,
        imitation=_imitation(recipe, policy.live) if settings.learner == "imitation" else None,
    )


def _imitation(recipe: Recipe, seats: Sequence[str]) -> Imitation:
    spec = settings_of(recipe).imitation or ImitationSpec()
    models = neighbours(spec.peers, seats, degree=spec.degree, seed=recipe.seed)
    return Imitation(models, spec.weight)


def defense_metrics(defenses: Sequence[Defense]) -> dict[str, float]:
    """What the defenses did and cost in a step, as `defense/<name>/...`, named as in `costs_of`."""
    metrics = {}
    for defense, (label, cost) in zip(defenses, costs_of(defenses).items(), strict=True):
        metrics |= {f"defense/{label}/{key}": value for key, value in (defense.metrics | cost).items()}
    return metrics


def costs_of(defenses: Sequence[Defense]) -> dict[str, dict[str, float]]:
    """The costs of all ranks, by the defense's name; the second of a name is `<name>_2`."""
    costs, counts = {}, Counter[str]()
    summed = iter(ranks.total([value for defense in defenses for value in asdict(defense.cost).values()]))
    for defense in defenses:
        counts[defense.name] += 1
        label = f"{defense.name}_{counts[defense.name]}" if counts[defense.name] > 1 else defense.name
        costs[label] = {key: next(summed) for key in asdict(defense.cost)}
    return costs


class Snapshot(NamedTuple):
    """What a rolled-back step returns to."""

    adapter: dict[str, Tensor]
    learner: dict[str, Tensor]


def load(last: Checkpoint, policy: Policy, learner: Learner, defenses: Sequence[Defense]) -> Snapshot | None:
    """Put everything back that `save` wrote; returns what a rollback would return to."""
    policy.restore(last.adapter)
    policy.version = last.state["version"]
    learner.load_state(_below("learner/", last.tensors))
    for i, (defense, state) in enumerate(zip(defenses, last.state["defenses"], strict=True)):
        defense.load_state(state)
        defense.load_tensors(_below(f"defense/{i}/", last.tensors))
    safe = Snapshot(_below("safe/adapter/", last.tensors), _below("safe/learner/", last.tensors))
    return safe if safe.adapter else None


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def save(
    recipe: Recipe,
    run: Run,
    policy: Policy,
    learner: Learner,
    defenses: Sequence[Defense],
    probe: Probe | None,
    safe: Snapshot | None,
    anchor_hash: str,
    *,
    step: int,
) -> None:
    """Write everything that the next step depends on; `safe` is None where no step is ever rolled back."""
    state = {
        "anchor": anchor_hash,
        "version": policy.version,
        "ranks": ranks.world_size(),
        "defenses": [defense.state() for defense in defenses],
        "probe": probe,
    }
    tensors = {f"learner/{key}": value for key, value in learner.state().items()}
    for i, defense in enumerate(defenses):
        tensors |= {f"defense/{i}/{key}": value for key, value in defense.tensors().items()}
    if safe is not None:
        tensors |= {f"safe/adapter/{key}": value for key, value in safe.adapter.items()}
        tensors |= {f"safe/learner/{key}": value for key, value in safe.learner.items()}
    checkpoint = Checkpoint(step, policy.state(), tensors, state)
    if len(set(ranks.gather([hash_tensors(checkpoint.adapter)]))) > 1:
        raise RuntimeError(f"step {step}: the ranks' adapters have drifted apart")
    folder = ranks.from_first(lambda: run.save_checkpoint(checkpoint, policy.lora, policy.name, keep=recipe.run.keep))
    if recipe.track.artifacts == "all":
        run.mirror_adapter(folder)


def _supervision(supervision: Any) -> Any:
    """The recipe's typed form as the plain one that environments take."""
    return supervision if isinstance(supervision, str) else supervision.model_dump()
