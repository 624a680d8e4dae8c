"""A model so small that a test can make it, and what tests build around it by hand. Not a test itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from atp_rl.evolve.loop import evolve
from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import Policy
from atp_rl.model.tiny import BuildPlan, make_model, make_tokenizer
from atp_rl.pipeline import suites_of
from atp_rl.recipe import Recipe, dump, load
from atp_rl.scenarios import load as load_scenarios
from atp_rl.scenarios import make_env
from atp_rl.scenarios.choices import format_choice
from atp_rl.tracking.progress import Report, silent
from atp_rl.tracking.run import Run
from atp_rl.types import Completion, Episode, Outcome, Scenario, Turn, Verdict


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="atp_rl_small_model_")  # removed when the process ends


@cache
def base() -> str:
    """Directory of a one-layer model that answers in the format, with either option about equally often."""
    plan = BuildPlan(vocabulary=512, hidden=32, layers=1)
    tokenizer = make_tokenizer(plan)
    chat, model = ChatFormat(tokenizer), make_model(plan, tokenizer)
    rows = []
    for scenario in load_scenarios({"families": ["ferry_pilot", "archivist"], "per_family": 2}):
        env = make_env(scenario, rounds=1, supervision={"probability": 0.1}, seed=0, history_window=0)
        prompt = chat.encode(env.observe()["agent"], [])
        rows += [(prompt, [*chat.encode_text(format_choice(o)), chat.eos_id]) for o in scenario.options]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.tensor([p + a + [chat.pad_id] * (width - len(p) - len(a)) for p, a in rows])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = Path(_scratch().name) / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


@cache
def aligned() -> Path:
    """Directory of an adapter on it that changes what it does: the anchor."""
    policy = Policy.load(base(), lora=lora(), seed=0)
    nudge(policy, 0.05, seed=1)
    folder = Path(_scratch().name) / "aligned"
    policy.save_adapter(folder)
    return folder


def make_policy(*, anchored: bool = True) -> Policy:
    """Starts at `aligned()`, or from a fresh adapter on the bare base."""
    return Policy.load(base(), lora=lora(), seed=0, aligned=aligned() if anchored else None)


def nudge(policy: Policy, scale: float, seed: int) -> None:
    """Add noise to the live adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Of every trainable weight, by a name without the adapter's."""
    return {
        name.replace(".policy.", "."): parameter.grad.clone()
        for name, parameter in policy.model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- episodes by hand

SCENARIO = Scenario(
    id="role_play/ferry_pilot/0",
    testbed="role_play",
    family="ferry_pilot",
    split="held_out",
    texts={},
    options=("Safe", "Fast"),
    payoffs={"Safe": 50, "Fast": 80},
    rule="Safe",
    extra={"required": "Safe", "tempting": "Fast"},
)


def turn(
    prompt: Sequence[int] = (),
    reply: Sequence[int] = (),
    *,
    round: int = 0,
    logprobs: Sequence[float] | None = None,
    choice: str | None = "Safe",
    payoff: float = 50,
    verdict: Verdict = "compliance",
    supervised: bool | None = None,
) -> Turn:
    drawn = tuple([0.0] * len(reply) if logprobs is None else logprobs)
    outcome = Outcome(choice=choice, payoff=payoff, supervised=supervised, detected=False, verdict=verdict, done=False)
    return Turn("agent", round, tuple(prompt), Completion("", tuple(reply), drawn, "stop"), outcome)


def episode(*turns: Turn, scenario: Scenario = SCENARIO, sample: int = 0) -> Episode:
    return Episode(scenario, sample, (0, scenario.id, sample), list(turns), {"agent": []}, 0)


# --- whole runs


def small_recipe(folder: Path, *overrides: str, steps: int = 4, rounds: int = 1) -> Recipe:
    """A second's evolution on one training family and one held-out one."""
    return load(
        [
            f"model.name={base()}",
            "model.lora.r=2",
            "model.lora.alpha=4",
            "scenarios.families=[ferry_pilot,archivist]",
            "scenarios.per_family=4",
            f"scenarios.rounds={rounds}",
            "scenarios.supervision.probability=0.2",
            f"evolve.start_from={aligned()}",
            f"evolve.steps={steps}",
            "evolve.scenarios_per_step=2",
            "evolve.group_size=4",
            "evolve.learning_rate=1e-2",
            "evolve.max_new_tokens=10",
            "evaluate.every=2",
            "evaluate.per_family=2",
            "track.wandb=disabled",
            f"run.dir={folder}",
            *overrides,
        ]
    )


def run_of(recipe: Recipe, *, stop: Callable[[], bool] = lambda: False, report: Report = silent) -> Run:
    """Start or continue the evolution of `recipe` in its run directory."""
    assert recipe.evolve is not None
    folder, start = Path(recipe.run.dir), recipe.evolve.start_from
    run = Run.open(folder) if folder.exists() else Run.create(folder, dump(recipe))
    anchor = None if start == "base" else Path(start)
    evolve(recipe, run, suites_of(recipe), anchor=anchor, stop=stop, report=report)
    return run


def stop_before(step: int) -> Callable[[], bool]:
    """A stop flag that goes up before this step of a run that starts at step 1."""
    asked = iter(range(1, step + 1))
    return lambda: next(asked) == step


def reproducible(metrics: dict[str, Any]) -> dict[str, Any]:
    """A record without what depends on the clock."""
    clocks = ("time/", "rollout/tokens_per_s", "seconds")
    kept = {k: v for k, v in metrics.items() if not k.startswith(clocks) and not k.endswith("/seconds")}
    return {k: reproducible(v) if isinstance(v, dict) else v for k, v in kept.items()}


def checkpoint_files(run: Run, step: int) -> dict[str, bytes]:
    folder = run.path / "checkpoints" / f"step_{step:04d}"
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
