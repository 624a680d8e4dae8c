"""The GPU benchmark runs as a whole, here with a tiny shape on whatever device there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import bench
from tests.gpu.shapes import QWEN3_8B, TINY_SHAPE, make_policy, matmul_weights


def test_every_part_runs_and_is_written(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert bench.main(["--model-shape", "tiny", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    parts = {part["part"]: part for part in record["parts"]}
    assert all(part["ok"] for part in parts.values())
    assert {name.split()[0].rstrip(",") for name in parts} == {"load", "matmul", "rollout", "step", "train", "qlora"}
    assert [parts[f"rollout {n}"]["conversations"] for n in TINY_SHAPE.rollout_batches] == [8, 16]
    speeds = [part.get("output_tokens_per_s", part.get("tokens_per_s")) for part in parts.values()]
    assert all(speed > 0 for speed in speeds if speed is not None)

    step = parts["step, micro-batch 2"]
    assert step["episodes"] == 4
    assert step["decisions"] == 12  # of three rounds
    assert step["step_s"] == pytest.approx(step["rollout_s"] + step["update_s"])
    assert step["trained_tokens"] > step["output_tokens"]
    assert step["sampler_gap_mean"] < 1e-3

    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["part"] for line in printed] == list(parts)


def test_it_needs_few_packages(tmp_path):
    """A lent machine has no more than the page of the benchmark names."""
    absent = ["trl", "datasets", "wandb", "statsmodels", "lifelines", "matplotlib", "typer", "math_verify", "sandlock"]
    arguments = ["--model-shape", "tiny", "--only", "rollout", "step", "--out", str(tmp_path / "gpu.json")]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        f"from tests.gpu.bench import main; sys.exit(main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def no_memory(*_):
        raise torch.OutOfMemoryError("no 80 GiB here")

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(bench, "_rollout", no_memory)
    monkeypatch.setattr(bench, "_matmul", broken)
    out = tmp_path / "gpu.json"
    assert bench.main(["--model-shape", "tiny", "--only", "rollout", "qlora", "--out", str(out)]) == 1
    parts = {part["part"]: part for part in json.loads(out.read_text())["parts"]}
    assert (parts["rollout 8"]["ok"], parts["rollout 8"]["out_of_memory"]) == (False, True)
    assert (parts["matmul"]["ok"], parts["matmul"]["out_of_memory"]) == (False, False)
    assert "broken" in parts["matmul"]["traceback"]
    assert parts["qlora (NF4) 64, checkpointing on"]["ok"]
    assert capsys.readouterr().out.splitlines()[-1] == "failed: matmul"


def test_a_smaller_batch_is_tried_where_one_does_not_fit(monkeypatch):
    tried = []

    def train(policy, rows, length):
        tried.append(rows)
        if rows * length > 128:
            raise torch.OutOfMemoryError("too much")
        return {}

    monkeypatch.setattr(bench, "_train_rows", train)
    policy = make_policy(TINY_SHAPE)
    assert bench._train(policy, TINY_SHAPE, 64, checkpointing=True) == {"checkpointing": True}
    assert tried == [4, 2]
    assert not policy.model.training
    with pytest.raises(torch.OutOfMemoryError, match="not even 1 row"):
        bench._train(policy, TINY_SHAPE, 256, checkpointing=False)


def test_weights_are_those_that_a_token_is_multiplied_by():
    policy = make_policy(TINY_SHAPE)
    linear = [m for m in policy.model.get_base_model().modules() if isinstance(m, torch.nn.Linear)]
    lora = sum(p.numel() for p in policy.trainable)
    assert matmul_weights(policy) == (sum(m.weight.numel() for m in linear) - lora, lora)


def test_qlora_trains_packed_weights():
    policy = make_policy(TINY_SHAPE, nf4=True)
    packed = [p for name, p in policy.model.named_parameters() if "layers" in name and p.dtype == torch.uint8]
    assert len(packed) == 7 * TINY_SHAPE.config["num_hidden_layers"]
    assert all(p.dtype == torch.float32 for p in policy.trainable)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_8b_rollout_on_a_gpu(tmp_path):
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip(f"{QWEN3_8B.name} in bf16 needs a GPU of 40 GB")
    out = tmp_path / "gpu.json"
    assert bench.main(["--only", "rollout", "--out", str(out)]) == 0
    parts = {part["part"]: part for part in json.loads(out.read_text())["parts"]}
    assert parts["rollout 256"]["output_tokens"] > 0.99 * 256 * QWEN3_8B.reply_tokens
