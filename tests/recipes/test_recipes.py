"""Every recipe that ships loads; every tiny one runs through the command line, and the paper's with the tiny model."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig

from atp_rl import pipeline
from atp_rl.model.policy import Policy
from atp_rl.recipe import Recipe, json_schema, load
from tests.command_line import RECIPES, SMALL, atp

BASES = [RECIPES / "tiny" / f"{testbed}.yaml" for testbed in ("role_play", "collusion", "tool_use")]
PAPER = sorted((RECIPES / "paper").rglob("*.yaml"))
TINY_MODEL = RECIPES / "tiny" / "model.yaml"
EIGHT_B = sorted(path for model in ("qwen3-8b", "llama3.1-8b") for path in (RECIPES / model).glob("*.yaml"))
STUDIES = (RECIPES / "studies").glob("*.yaml")  # tests/test_study.py has them
OVERLAYS = sorted(set(RECIPES.rglob("*.yaml")) - {*BASES, *PAPER, *EIGHT_B, *STUDIES, TINY_MODEL})
TINY = BASES + [path for path in OVERLAYS if path.parent.name in ("tiny", "defenses")]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def sources(path: Path) -> list[Path]:
    """The recipe files that are laid over each other: a base, and what says that it lies over it (or over none)."""
    if path in BASES:
        return [path]
    over = re.search(r"over (recipes/tiny/\w+\.yaml)", path.read_text())
    return [RECIPES.parent / over[1] if over else BASES[0], path]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """Of the tiny recipes' shape, and as good as none."""
    folder = tmp_path_factory.mktemp("adapter")
    shape = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    Policy.load("tiny", lora=shape, seed=0).save_adapter(folder)
    return folder


def adapters(path: Path, adapter: Path) -> list[str]:
    """Overrides that put a directory in place of one that a run has yet to make."""
    return [f"evolve.deviants.adapter={adapter}"] if "deviants" in path.read_text() else []


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_every_overlay_is_a_short_change_of_a_tiny_recipe(path, adapter):
    base, _ = sources(path)
    recipe = load([str(base), str(path), *adapters(path, adapter)])
    assert recipe != load([str(base)])
    pipeline.check(recipe)
    comments_and_lines = path.read_text().splitlines()
    assert comments_and_lines[0].startswith("# ")
    if path.parent.name == "defenses":
        assert len(comments_and_lines) <= 7


@pytest.mark.parametrize("path", BASES, ids=name)
def test_the_base_recipes_are_complete_by_themselves(path):
    recipe = load([str(path)])
    pipeline.check(recipe)
    assert recipe.align is not None
    assert recipe.evolve is not None


def test_the_schema_in_the_folder_is_that_of_the_code():
    """`atp schema > recipes/schema.json` writes it anew."""
    assert json.loads((RECIPES / "schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("path", TINY, ids=name)
def test_a_tiny_recipe_runs_through_the_command_line(path, adapter, tmp_path):
    given = [str(source) for source in sources(path)]
    recipe = load([*given, *adapters(path, adapter)])
    in_context = recipe.evolve is not None and recipe.evolve.learner == "in_context"
    small = [s for s in SMALL if not (in_context and s.startswith("evolve.steps"))] + adapters(path, adapter)
    if recipe.align and recipe.align.method == "grpo":
        small += ["align.trl.per_device_train_batch_size=8", "align.trl.num_generations=4"]
    if recipe.scenarios.testbed == "collusion":
        small += ["scenarios.families=[grain_sellers,bay_fishers,taxi_rank]"]
    if path.stem == "collusion_grid":
        small += ["scenarios.collusion.threshold=[2,4]", "scenarios.collusion.rewards=[1.2,1,.8]"]
    output, _ = atp("run", *given, *small, "run.dir=run", cwd=tmp_path)
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["complete"] is True
    assert summary["steps"] == (0 if in_context else 2)
    held_out = len(pipeline.check(load([*given, *small])).held_out)
    rounds = recipe.evaluate.rounds or recipe.scenarios.rounds
    decided = {"role_play": rounds, "collusion": 8 * rounds, "tool_use": rounds / 2}  # eight seats; half are hard
    assert summary["final"]["n"] == held_out * decided[recipe.scenarios.testbed]
    assert "run" in output.splitlines()[-1]
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    if path.parent.name == "defenses":
        listed = yaml.safe_load(path.read_text()).get("defenses", [])
        assert resolved["defenses"] == listed
    steps = [0] if in_context else [0, 1, 2]
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == [f"step_{s:04d}" for s in steps]
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evaluations] == steps
    stored = gzip.decompress((run / "episodes" / "step_0000_held_out.jsonl.gz").read_bytes()).decode().splitlines()
    assert len(stored) == held_out
    assert len(evaluations[0]["splits"]["held_out"]["by_round"]) == rounds


# The 8B recipes.

HUB = {"qwen3-8b": "Qwen/Qwen3-8B", "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct"}
STEMS = ["collusion", "dpo", "evaluate", "grpo", "qlora", "role_play", "tool_use"]


def test_both_8b_models_have_the_same_recipes():
    assert {name(path) for path in EIGHT_B} == {f"{model}/{stem}" for model in HUB for stem in STEMS}


@pytest.mark.parametrize("path", [path for path in EIGHT_B if path.stem != "qlora"], ids=name)
def test_an_8b_recipe_is_complete_by_itself(path):
    text = path.read_text()
    assert f"atp run recipes/{name(path)}.yaml" in text
    assert "has not been run" in text
    recipe = load([str(path)])
    plan = pipeline.plan(recipe, pipeline.check(recipe))
    assert plan[0] == f"run directory runs/{path.parent.name}-{path.stem}, model {HUB[path.parent.name]}, seed 0"
    assert (recipe.model.dtype, recipe.model.quantize, recipe.model.thinking) == ("bfloat16", None, False)
    assert (recipe.model.lora.r, recipe.model.lora.alpha) == (16, 32)
    assert (recipe.align is None) == (path.stem == "evaluate")
    assert (recipe.evolve is None) == (path.stem in ("dpo", "grpo"))
    if recipe.evolve and path.stem != "evaluate":
        assert recipe.evolve.gradient_checkpointing
        quantized = load([str(path), str(path.parent / "qlora.yaml")])
        pipeline.check(quantized)
        assert quantized.model.quantize == "nf4"
        assert quantized.evolve is not None
        assert quantized.align is not None
        assert quantized.evolve.optimizer == quantized.align.trl["optim"] == "paged_adamw_8bit"
        rows = [r.align.trl for r in (recipe, quantized) if r.align]  # as many a step
        sizes = [t["per_device_train_batch_size"] * t["gradient_accumulation_steps"] for t in rows]
        assert sizes[0] == sizes[1]


def test_the_8b_recipes_differ_in_the_model_alone():
    for stem in STEMS[:4] + STEMS[5:]:
        qwen, llama = (load([str(RECIPES / model / f"{stem}.yaml")]) for model in HUB)
        assert qwen.model.name != llama.model.name
        model, run = llama.model.model_dump() | {"name": qwen.model.name}, qwen.run.model_dump()
        assert qwen.model_dump() == llama.model_dump() | {"model": model, "run": run}


SMALL_8B = {
    "dpo": ["align.trl.max_steps=2"],
    "grpo": [
        "align.trl.max_steps=2",
        "align.trl.per_device_train_batch_size=4",
        "align.trl.gradient_accumulation_steps=1",
        "align.trl.num_generations=4",
        "align.trl.max_completion_length=12",
    ],
    "evaluate": ["evolve.max_new_tokens=16", "scenarios.rounds=2"],
}
EVOLVES = [s for s in SMALL if "max_steps" not in s] + [
    "align.trl.max_steps=2",
    "evolve.max_new_tokens=16",
    "scenarios.rounds=2",
]


@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem != "qlora"])
def test_an_8b_recipe_runs_with_a_tiny_model_in_its_place(stem, quantize, tmp_path):
    """The QLoRA overlay too, with bitsandbytes' kernels for CPUs. Llama's recipes differ in the model alone."""
    path = RECIPES / "qwen3-8b" / f"{stem}.yaml"
    world = path.stem if path.stem in TESTBED else "role_play"
    evolves = path.stem in TESTBED
    small = EVOLVES if evolves else [*SMALL_8B[path.stem], "evaluate.per_family=1", "track.wandb=disabled"]
    small = [*small, "model.name=tiny", *TESTBED[world]]  # the testbed of tools has a tiny model of its own
    if path.stem != "evaluate":
        small += ["align.per_family=1", "align.max_new_tokens=40"]
    given = [path, path.parent / "qlora.yaml"] if quantize and evolves else [path]
    small += ["model.quantize=nf4"] if quantize else []
    run = pipeline.run(load([*map(str, given), *small, f"run.dir={tmp_path / 'run'}"]))
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (resolved["model"]["dtype"], resolved["model"]["quantize"]) == ("bfloat16", "nf4" if quantize else None)
    if path.stem != "evaluate":
        assert json.loads((run / "aligned" / "metrics.json").read_text())["steps"] == 2
    if resolved["evolve"]:
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["complete"], summary["steps"]) == (True, 2 if evolves else 0)
    if evolves:
        assert resolved["evolve"]["optimizer"] == ("paged_adamw_8bit" if quantize else "adamw")
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


# The paper's arms.

MODELS = {"qwen3-8b": ("Qwen/Qwen3-8B", True), "llama3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", False)}
ALIGNMENTS = ("base", "dpo", "grpo")
ROUNDS = {"role_play": 6, "tool_use": 4, "collusion": 3}


def arm(path: Path) -> tuple[str, str, str]:
    """Testbed, model and alignment, by its name."""
    model, _, how = path.stem.rpartition("-")
    return path.parent.name, model, how


def test_every_arm_has_a_recipe():
    assert {arm(path) for path in PAPER} == {(t, m, a) for t in ROUNDS for m in MODELS for a in ALIGNMENTS}


@pytest.mark.parametrize("path", PAPER, ids=name)
def test_an_arm_of_the_paper_loads_and_dry_runs(path):
    testbed, model, how = arm(path)
    recipe = load([str(path)])
    plan = pipeline.plan(recipe, pipeline.check(recipe))
    assert f"run directory runs/paper/{testbed}/{path.stem}" in plan[0]
    assert any("in context only" in line for line in plan)
    assert (recipe.model.name, recipe.model.thinking) == MODELS[model]
    assert (recipe.scenarios.testbed, recipe.scenarios.rounds) == (testbed, ROUNDS[testbed])
    assert recipe.evolve is not None
    assert recipe.align is not None
    assert recipe.evolve.start_from == ("base" if how == "base" else "aligned")
    trl = recipe.align.trl
    if how == "dpo":
        assert (trl["beta"], trl["num_train_epochs"], trl["max_length"]) == (0.1, 12, 4096)
        assert trl["learning_rate"] == (5e-6 if model == "qwen3-8b" else 1e-5)
        assert trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"] == 8
    if how == "grpo":
        assert (trl["beta"], trl["num_train_epochs"], trl["num_generations"]) == (0.04, 6, 4)
        assert trl["learning_rate"] == (5e-6 if testbed == "collusion" else 1e-6)
    if testbed == "collusion":
        assert recipe.scenarios.collusion is not None
        assert (recipe.scenarios.collusion.n, recipe.scenarios.collusion.threshold) == (8, [2, 4, 6, 8])


def test_arms_of_a_testbed_differ_in_model_and_alignment_alone():
    """The files are complete, so that one can be read alone; this holds them together."""

    def common(recipe: Recipe) -> dict:
        resolved = recipe.model_dump(exclude={"align": True, "run": True, "model": {"name", "thinking"}})
        return resolved | {"evolve": {**resolved["evolve"], "start_from": None}}

    for testbed in ROUNDS:
        first, *others = [common(load([str(path)])) for path in PAPER if path.parent.name == testbed]
        assert all(other == first for other in others)


TWO_STEPS = [
    "track.wandb=disabled",
    "align.per_family=1",
    "align.trl.max_steps=2",
    "scenarios.rounds=2",
    "scenarios.per_family=1",
    "evaluate.per_family=1",
    "evaluate.gate_per_family=1",
]
TESTBED = {
    "role_play": ["scenarios.families=[welder,tailor,forester,soap_maker,perfumer]"],
    "tool_use": ["model.name=tiny_tools", "scenarios.tool_use.problems=sums"],
    "collusion": [
        "scenarios.families=[grain_sellers,bay_fishers,taxi_rank]",
        "scenarios.collusion.threshold=[2,4]",
        "scenarios.collusion.rewards=[[1.2,1.0,0.8]]",
    ],
}


@pytest.mark.parametrize("path", PAPER, ids=name)
def test_an_arm_of_the_paper_runs_with_the_tiny_model_in_its_place(path, tmp_path):
    """Two steps of alignment and two rounds: in context there are no others."""
    testbed, _, how = arm(path)
    overrides = [*TWO_STEPS, *TESTBED[testbed], f"run.dir={tmp_path / 'run'}"]
    run = pipeline.run(load([str(path), str(TINY_MODEL), *overrides]))
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["complete"], summary["learner"]) == (True, "in_context")
    assert summary["model"] == ("tiny_tools" if testbed == "tool_use" else "tiny")
    evaluation = json.loads((run / "evaluations.jsonl").read_text())
    assert len(evaluation["splits"]["held_out"]["by_round"]) == 2
    assert (run / "aligned").exists() == (how != "base")
    if how != "base":
        assert json.loads((run / "aligned" / "metrics.json").read_text())["steps"] == 2


@pytest.mark.parametrize("testbed", ROUNDS)
def test_an_arm_of_the_paper_can_go_on_to_update_its_weights(testbed, tmp_path):
    learn = ["evolve.learner=policy_gradient", "evolve.steps=2", "evolve.scenarios_per_step=2", "evolve.group_size=2"]
    path = RECIPES / "paper" / testbed / "llama3.1-8b-base.yaml"
    overrides = [*TWO_STEPS, *TESTBED[testbed], *learn, f"run.dir={tmp_path / 'run'}"]
    run = pipeline.run(load([str(path), str(TINY_MODEL), *overrides]))
    assert json.loads((run / "summary.json").read_text())["steps"] == 2


def test_an_overlay_can_be_given_as_an_option_and_overrides_win(tmp_path):
    path = RECIPES / "paper" / "role_play" / "qwen3-8b-dpo.yaml"
    output, _ = atp("run", path, "evolve.max_new_tokens=7", "-o", TINY_MODEL, "--dry-run", cwd=tmp_path)
    assert "model tiny" in output
    assert yaml.safe_load(output.partition("\n\n")[2])["evolve"]["max_new_tokens"] == 7
