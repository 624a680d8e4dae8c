"""The alpha sweep: exact at both ends, exact products between, one table."""

from __future__ import annotations

import json

import pytest
import torch
from peft.tuners.lora import LoraLayer

from atp_rl.cli import main
from atp_rl.evolve.setup import load_policy
from atp_rl.model.low_rank import factors
from atp_rl.pipeline import suites_of
from atp_rl.sweep import at, sweep, widened
from atp_rl.types import InputError
from tests.small_model import aligned, make_policy, nudge, run_of, small_recipe


@pytest.fixture(scope="module", params=["aligned", "base"])
def run(request, tmp_path_factory):
    start = str(aligned()) if request.param == "aligned" else "base"
    return run_of(small_recipe(tmp_path_factory.mktemp("sweep") / "run", f"evolve.start_from={start}"))


def test_both_ends_are_the_evaluations_of_the_run(run):
    found = sweep(run.path, 4, [0.0, 0.5, 1.0])
    assert [record["alpha"] for record in found] == [0.0, 0.5, 1.0]
    written, evaluations = run.lines("sweep.jsonl"), run.lines("evaluations.jsonl")
    assert [record["alpha"] for record in written] == [0.0, 0.5, 1.0]
    assert written[0]["splits"] == evaluations[0]["splits"]  # of step 0, the aligned adapter
    assert written[2]["splits"] == evaluations[-1]["splits"]
    kl = [record["splits"]["held_out"]["kl_to_aligned"] for record in written]
    assert kl[0] == 0 < kl[1] < kl[2]


def test_order_and_settings_are_those_that_were_asked_for(run):
    before = len(run.lines("sweep.jsonl"))
    found = sweep(run.path, 2, [1.0, 0.25], ["evaluate.per_family=1"])
    assert [record["alpha"] for record in found] == [1.0, 0.25]
    assert all(record["splits"]["held_out"]["violation"]["n"] == 1 for record in found)
    added = run.lines("sweep.jsonl")[before:]
    assert [(r["step"], r["alpha"], r["overrides"]) for r in added] == [
        (2, 1.0, ["evaluate.per_family=1"]),
        (2, 0.25, ["evaluate.per_family=1"]),
    ]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_wide_adapter_is_the_sum_of_the_products(rslora):
    policy = make_policy()
    start = policy.state()
    nudge(policy, 0.1, seed=4)
    end = policy.state()
    policy.lora.use_rslora = rslora
    rows, acted = [(3, 4, 5, 6, 7)], [range(1, 5)]
    with torch.no_grad():
        before = policy.acted_tokens(rows, acted).logprobs
    mixed, ends = factors(at(0.25, start, end)), (factors(start), factors(end))
    for name, update in mixed.items():
        low, high = (e[name].up @ e[name].down for e in ends)
        torch.testing.assert_close(update.up @ update.down, low + 0.25 * (high - low), atol=1e-6, rtol=1e-5)
    wide = widened(policy)
    assert wide.live == ("policy",)
    assert wide.lora.r == 2 * len(next(iter(ends[1].values())).down)
    wide.restore(at(1.0, start, end))
    if not rslora:  # the model was built without
        with torch.no_grad():
            torch.testing.assert_close(wide.acted_tokens(rows, acted).logprobs, before, atol=1e-5, rtol=1e-5)
    scalings = {layer.scaling["policy"] for layer in wide.model.modules() if isinstance(layer, LoraLayer)}
    assert sorted(scalings) == pytest.approx([4 / 2**0.5 if rslora else 4 / 2])


def test_the_recipes_model_is_widened_without_an_aligned_adapter_too(tmp_path):
    recipe = small_recipe(tmp_path / "run", "evolve.start_from=base")
    policy = load_policy(recipe, None, suites_of(recipe))
    start = policy.state()
    nudge(policy, 0.1, seed=4)
    end = policy.state()
    rows, acted = [(3, 4, 5, 6, 7)], [range(1, 5)]
    base = policy.acted_tokens(rows, acted, players="aligned").logprobs
    wide = widened(policy)
    wide.restore(at(0.0, start, end))
    torch.testing.assert_close(wide.acted_tokens(rows, acted).logprobs.detach(), base, atol=1e-5, rtol=1e-5)


def test_the_command_prints_the_curve(run, monkeypatch, capsys):
    def call(alphas: str) -> int:
        command = ["atp", "sweep", str(run.path), "--checkpoint", "4", "--alphas", alphas]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert call("0,1") == 0
    output = capsys.readouterr().out
    assert all(heading in output for heading in ("alpha", "violation", "invalid", "payoff", "KL"))
    assert output.count("held-out") == 2
    assert call("0,much") == 2
    assert "--alphas 0,much: give numbers" in capsys.readouterr().err


def test_what_cannot_be_swept_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="no checkpoint 3; there are: 0, 2, 4"):
        sweep(run.path, 3, [0.5])
    with pytest.raises(InputError, match="give at least one number"):
        sweep(run.path, 4, [])
    engine = ["sampler.engine=server", "sampler.url=http://127.0.0.1:1/v1"]
    with pytest.raises(InputError, match=r"--set sampler.engine=hf --set sampler.url=null"):
        sweep(run.path, 4, [0.5], engine)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "recipe.yaml").write_bytes((run.path / "recipe.yaml").read_bytes())
    folder = broken / "checkpoints" / "step_0004"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"state.json": {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(InputError, match="broken checkpoint"):
        sweep(broken, 4, [0.5])
    with pytest.raises(InputError, match="one adapter that learns, and the learner is population"):
        sweep(run.path, 4, [0.5], ["evolve.learner=population"])
