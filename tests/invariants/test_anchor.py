"""The anchor is the aligned adapter, from the first step to the last, and after a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from atp_rl.defenses import DEFENSES, Defense, LossBatch, Setting
from atp_rl.evolve import setup
from atp_rl.model.policy import Policy, hash_tensors, load_base
from atp_rl.samples import training_rows
from atp_rl.tracking.run import Interrupted
from atp_rl.types import Group
from tests.small_model import aligned, base, make_policy, nudge, run_of, small_recipe, stop_before

ANCHORED = "defenses=[{name: kl_anchor, beta: 0.2}, {name: spy}]"


class Spy(Defense):
    """Changes nothing; keeps the policy, and what the loss was given in each step."""

    name = "spy"

    def prepare(self, setting: Setting) -> None:
        policy = self.policy = setting.policy
        self.base = policy.base_hash()
        self.hashes = [policy.adapter_hash("policy")]
        self.groups: list[Sequence[Group]] = []
        self.anchors: list[Tensor] = []

    def on_rewards(self, groups: Sequence[Group], rewards: Tensor) -> Tensor:
        self.groups.append(groups)
        return rewards

    def extra_loss(self, batch: LossBatch) -> None:
        self.anchors.append(batch.anchor_logprobs())

    def after_update(self, policy: Policy) -> None:
        self.hashes.append(policy.adapter_hash("policy"))


@pytest.fixture
def spies(monkeypatch) -> list[Spy]:
    """What recipes got for `{name: spy}`: one for every start of a run."""
    made: list[Spy] = []

    class Registered(Spy):
        def prepare(self, setting: Setting) -> None:
            super().prepare(setting)
            made.append(self)

    monkeypatch.setitem(DEFENSES, "spy", Registered)
    return made


def acted_logprobs(model: torch.nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    """Of every row of these episodes, by a plain forward of a plain model."""
    results = []
    for row in (row for group in groups for episode in group for row in training_rows(episode.turns)):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        results.append(torch.stack([logp[position - 1, row.ids[position]] for position in row.acted]))
    return results


def plain_model(adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(load_base(base()), str(adapter)).eval()  # pyright: ignore[reportArgumentType]


def distance(ours: Tensor, plain: list[Tensor]) -> float:
    assert len(ours) == len(plain)
    return max((a[: len(b)] - b).abs().max().item() for a, b in zip(ours, plain, strict=True))


def test_through_a_run_the_policy_moves_and_nothing_else_does(tmp_path, spies):
    run = run_of(small_recipe(tmp_path / "run", ANCHORED, steps=3))
    (spy,) = spies
    anchor = make_policy().adapter_hash("aligned")
    weights = load_file(aligned() / "adapter_model.safetensors")
    assert spy.policy.adapter_hash("aligned") == anchor == hash_tensors(weights)
    metrics = run.lines("metrics.jsonl")
    assert [m["drift/anchor_sha"] for m in metrics] == [anchor[:16]] * 3
    assert [json.loads((f / "state.json").read_text())["anchor"] for f in run.checkpoint_folders()] == [anchor] * 3
    assert spy.policy.base_hash() == spy.base == make_policy().base_hash()
    assert spy.hashes[0] == anchor  # it starts as the aligned adapter
    assert len(set(spy.hashes)) == 4  # and every step changes it
    distances = [m["drift/adapter_distance"] for m in metrics]
    assert distances[0] > 0
    assert distances == sorted(distances)


def test_the_kl_is_zero_before_the_first_step_and_then_it_is_not(tmp_path):
    recipe = small_recipe(tmp_path / "run", "defenses=[{name: kl_anchor, beta: 0.2}]", "evaluate.every=1", steps=3)
    run = run_of(recipe)
    kl = [e["splits"]["held_out"]["kl_to_aligned"] for e in run.lines("evaluations.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert all(value > 1e-6 for value in kl[1:])
    penalty = [m["defense/kl_anchor/kl"] for m in run.lines("metrics.jsonl")]
    assert penalty[0] == pytest.approx(0, abs=1e-6)  # the first step is played by the aligned policy itself
    assert penalty[2] > 1e-6


@pytest.mark.parametrize("stopped_before", [None, 3])
def test_the_reference_is_the_aligned_adapter_also_after_a_resume(tmp_path, spies, stopped_before):
    recipe = small_recipe(tmp_path / "run", ANCHORED, "evolve.learning_rate=5e-2", steps=3, rounds=2)
    if stopped_before:
        with pytest.raises(Interrupted):
            run_of(recipe, stop=stop_before(stopped_before))
    run = run_of(recipe)
    spy = spies[-1]
    assert len(spy.groups) == (1 if stopped_before else 3)  # steps since the run was started or resumed
    groups, anchor = spy.groups[-1], spy.anchors[-1]
    drifted = run.path / "checkpoints" / ("step_0002" if stopped_before else "step_0003")
    assert distance(anchor, acted_logprobs(plain_model(aligned()), groups)) < 1e-4
    assert distance(anchor, acted_logprobs(load_base(base()), groups)) > 1e-2
    assert distance(anchor, acted_logprobs(plain_model(drifted), groups)) > 1e-2


def test_without_an_aligned_adapter_the_reference_is_the_bare_base(tmp_path, spies):
    recipe = small_recipe(tmp_path / "run", ANCHORED, "evolve.start_from=base", steps=2)
    run = run_of(recipe)
    (spy,) = spies
    assert distance(spy.anchors[-1], acted_logprobs(load_base(base()), spy.groups[-1])) < 1e-4
    assert {m["drift/anchor_sha"] for m in run.lines("metrics.jsonl")} == {spy.policy.adapter_hash("aligned")[:16]}
    assert len(set(spy.hashes)) == 3


def test_a_change_of_the_aligned_adapter_stops_the_run(tmp_path, monkeypatch):
    class Tamper(Defense):
        def after_update(self, policy: Policy) -> None:
            if self.step == 2:
                with torch.no_grad():
                    for name, parameter in policy.model.named_parameters():
                        if ".aligned." in name:
                            parameter.view(-1)[0] += 1e-6  # the smallest slip counts
                            return

    monkeypatch.setitem(DEFENSES, "tamper", Tamper)
    recipe = small_recipe(tmp_path / "run", "defenses=[tamper]", "evaluate.every=1", steps=3)
    with pytest.raises(RuntimeError, match="step 2: the frozen aligned adapter has changed"):
        run_of(recipe)
    folders = [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(folders) == ["step_0000", "step_0001"]  # what followed was never saved


def test_another_adapter_in_its_place_is_noticed_on_resume(tmp_path):
    folder = tmp_path / "anchor"
    shutil.copytree(aligned(), folder)
    recipe = small_recipe(tmp_path / "run", f"evolve.start_from={folder}", steps=2)
    with pytest.raises(Interrupted):
        run_of(recipe, stop=stop_before(2))
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    other = make_policy()
    nudge(other, 1e-3, seed=9)
    other.save_adapter(folder)
    with pytest.raises(RuntimeError, match="not the one that this run started from"):
        run_of(recipe)
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == before


def test_a_sampler_that_plays_another_policy_stops_the_run(tmp_path, monkeypatch):
    class Stale(setup.HFSampler):
        """Plays the aligned adapter, whatever was learned."""

        def __init__(self, policy: Policy, *, batch_size: int, mode: str) -> None:
            super().__init__(policy, "aligned", batch_size=batch_size)

    monkeypatch.setattr(setup, "HFSampler", Stale)
    recipe = small_recipe(tmp_path / "run", "evolve.learning_rate=0.3", steps=4)
    with pytest.raises(RuntimeError, match="the sampler kept old weights"):
        run_of(recipe)
    monkeypatch.setattr(setup.SyncProbe, "check", lambda *_: {})  # what was learned from says it too
    with pytest.raises(RuntimeError, match="the sampler does not play the policy that learns"):
        run_of(small_recipe(tmp_path / "other", "evolve.learning_rate=0.3", steps=4))
