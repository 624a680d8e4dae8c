"""Every recipe that ships loads; every tiny one runs, through the command line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml

from atp_rl import pipeline
from atp_rl.recipe import json_schema, load
from tests.command_line import RECIPES, ROLE_PLAY, SMALL, atp

BASE = RECIPES / "tiny" / "role_play.yaml"
OVERLAYS = sorted(path for path in RECIPES.rglob("*.yaml") if path != BASE)
TINY_OVERLAYS = [path for path in OVERLAYS if path.parent.name in ("tiny", "defenses")]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_every_overlay_is_a_short_change_of_the_tiny_recipe(path):
    recipe = load([str(BASE), str(path)])
    assert recipe != load([str(BASE)])
    pipeline.check(recipe)
    comments_and_lines = path.read_text().splitlines()
    assert comments_and_lines[0].startswith("# ")
    if path.parent.name == "defenses":
        assert len(comments_and_lines) <= 7


def test_the_base_recipe_is_complete_by_itself():
    recipe = load([str(BASE)])
    pipeline.check(recipe)
    assert recipe.align is not None
    assert recipe.evolve is not None


def test_the_schema_in_the_folder_is_that_of_the_code():
    """`atp schema > recipes/schema.json` writes it anew."""
    assert json.loads((RECIPES / "schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("path", [None, *TINY_OVERLAYS], ids=lambda path: name(path) if path else "tiny/role_play")
def test_a_tiny_recipe_runs_through_the_command_line(path, tmp_path):
    in_context = path is not None and path.stem == "in_context"
    small = [s for s in SMALL if not (in_context and s.startswith("evolve.steps"))]
    if path is not None and path.stem == "grpo":
        small += ["align.trl.per_device_train_batch_size=8", "align.trl.num_generations=4"]
    output, _ = atp("run", ROLE_PLAY, *([path] if path else []), *small, "run.dir=run", cwd=tmp_path)
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["complete"] is True
    assert summary["steps"] == (0 if in_context else 2)
    assert summary["final"]["n"] == 10 * (6 if in_context else 1)  # ten held-out families
    assert "run" in output.splitlines()[-1]
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    if path is not None and path.parent.name == "defenses":
        assert [d["name"] for d in resolved["defenses"]] == [path.stem]
    steps = [0] if in_context else [0, 1, 2]
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == [f"step_{s:04d}" for s in steps]
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evaluations] == steps
    stored = gzip.decompress((run / "episodes" / "step_0000_held_out.jsonl.gz").read_bytes()).decode().splitlines()
    assert len(stored) == 10
    if in_context:
        assert len(evaluations[0]["splits"]["held_out"]["by_round"]) == 6


def test_the_8b_recipe_takes_the_same_path_with_the_tiny_model_in_its_place(tmp_path):
    overlay = RECIPES / "qwen3-8b" / "role_play.yaml"
    tiny = ["model.name=tiny", "model.dtype=float32", "evolve.max_new_tokens=16", "align.trl.num_train_epochs=1"]
    atp("run", ROLE_PLAY, overlay, *SMALL, *tiny, "run.dir=run", cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["complete"], summary["model"], summary["steps"]) == (True, "tiny", 2)
