"""The estimate of GPU memory: the 8B models by hand, and the tiny model to the byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, GPT2Config, LlamaConfig, Qwen3Config

from atp_rl import pipeline
from atp_rl.memory_plan import memory_lines
from atp_rl.model.memory import (
    GIB,
    Phase,
    activations_bytes,
    adapters_bytes,
    fused_logits_bytes,
    kv_bytes,
    lines,
    logits_bytes,
    nf4_bytes,
    optimizer_bytes,
    shape_of,
    weights_bytes,
)
from atp_rl.model.optimizer_state import make_optimizer, optimizer_tensors
from atp_rl.model.policy import Policy, base_path, load_base
from atp_rl.model.sampler import HFSampler
from atp_rl.recipe import load
from atp_rl.types import Chat, SamplingParams
from tests.command_line import RECIPES, atp
from tests.test_memory_savings import kept_for_backward

QWEN = Qwen3Config(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
)  # fmt: skip
"""The published configurations of Qwen3-8B and Llama-3.1-8B, what matters here."""


def lora(r: int) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def qwen():
    return shape_of(QWEN, lora(16))


@pytest.fixture(scope="module")
def llama():
    return shape_of(LLAMA, lora(16))


# --- the 8B models, by hand


def test_parameters_of_qwen3_8b(qwen):
    # a layer: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 12288
    assert len(qwen.linears) == 36 * 7
    assert sum(qwen.linears) == 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288) == 6_945_767_424
    # embeddings and head; two norms of 4096 and two of 128 a layer, and the last
    assert qwen.others == 2 * 151936 * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096 == 1_244_967_936
    assert sum(qwen.linears) + qwen.others == 8_190_735_360
    # rank 16: q and o 16 x 8192, k and v 16 x 5120, three of 16 x 16384
    assert sum(qwen.adapter) == 36 * 16 * (2 * 8192 + 2 * 5120 + 3 * 16384) == 43_646_976
    assert qwen.qk_norm


def test_parameters_of_llama_3_1_8b(llama):
    assert sum(llama.linears) == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) == 6_979_321_856
    assert llama.others == 2 * 128256 * 4096 + 65 * 4096 == 1_050_939_392
    assert sum(llama.linears) + llama.others == 8_030_261_248
    assert sum(llama.adapter) == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) == 41_943_040
    assert not llama.qk_norm


def test_weights_of_the_8b_models(qwen, llama):
    assert weights_bytes(qwen, "bfloat16") == 2 * 8_190_735_360
    assert weights_bytes(llama, "bfloat16") == 2 * 8_030_261_248
    # n/2 + n/64 + 4 n/16384 + 1092 for each weight; all of them are multiples of 16384
    n = 6_945_767_424
    four_bit = n // 2 + n // 64 + n // 4096 + 252 * 1092
    assert weights_bytes(qwen, "bfloat16", "nf4") == four_bit + 2 * 1_244_967_936
    assert four_bit / n == pytest.approx(0.516, abs=1e-3)
    # on 8 GPUs an eighth, and gathered: two of 36 layers, and embeddings, head and norms
    share = weights_bytes(qwen, "bfloat16", shards=8)
    assert share == 2 * 8_190_735_360 // 8 + 2 * 2 * n // 36 + 2 * 1_244_967_936
    assert weights_bytes(qwen, "bfloat16", shards=1_000_000) > 2 * 1_244_967_936


def test_adapters_gradients_and_optimizer_of_qwen3_8b(qwen):
    assert adapters_bytes(qwen, 2) == 2 * 4 * 43_646_976
    assert adapters_bytes(qwen, 2, shards=4) == 2 * 43_646_976
    assert optimizer_bytes(qwen, "adamw") == 8 * 43_646_976
    # every weight of the adapter has 16 x 1024 numbers or more, a multiple of 256
    assert optimizer_bytes(qwen, "paged_adamw_8bit") == 2 * 43_646_976 + 8 * 43_646_976 // 256 + 2048


def test_cache_of_the_8b_models(qwen, llama):
    # 2 x 36 x 8 x 128 x 2 bytes = 144 KiB a token; 1000 tokens and a place for pads are 1024 places
    assert kv_bytes(qwen, "bfloat16", 64, 1000) == 64 * 1024 * 147_456
    assert kv_bytes(qwen, "bfloat16", 1, 1023) == 1024 * 147_456
    assert kv_bytes(qwen, "bfloat16", 1, 1024) == 1152 * 147_456
    assert kv_bytes(llama, "bfloat16", 1, 1000) == 1024 * 131_072  # 2 x 32 x 8 x 128 x 2


def test_activations_and_logits_of_qwen3_8b(qwen):
    # a token in a layer: 8 x 4096 + 4 (5 x 4096 + 4096 + 12288) + 4 (4096 + 1024) + 4 (4096 + 1024) + 6 x 12288
    layer = 32_768 + 147_456 + 20_480 + 20_480 + 73_728
    assert layer == 294_912
    assert activations_bytes(qwen, "bfloat16", 2, 500, checkpointing=False) == 1000 * 36 * layer
    assert activations_bytes(qwen, "bfloat16", 2, 500, checkpointing=True) == 1000 * (36 * 8192 + layer)
    # 4 copies of 2 bytes, and five chunks of 2^26 in single precision, since 1000 x 151936 is more
    assert logits_bytes(qwen, "bfloat16", 4, 250) == 4 * 1000 * 151_936 + 20 * 2**26
    assert logits_bytes(qwen, "bfloat16", 1, 10) == 4 * 10 * 151_936 + 20 * 10 * 151_936
    assert fused_logits_bytes(qwen, "bfloat16", 4, 250) == 2 * 1000 * 32_768 + 6 * 1000 * 4096


# --- the tiny model, as it is


def nbytes(tensors: Any) -> int:
    """Of tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture(scope="module")
def tiny():
    return shape_of(AutoConfig.from_pretrained(base_path("tiny")), lora(64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_what_the_tensors_take(tiny, dtype):
    assert nbytes(load_base("tiny", dtype=dtype).parameters()) == weights_bytes(tiny, dtype)
    quantized = list(load_base("tiny", dtype=dtype, quantize="nf4").named_parameters())
    states = [p.quant_state for _, p in quantized if hasattr(p, "quant_state")]  # pyright: ignore
    kept = [t for s in states for t in (s.absmax, s.code, s.offset.view(1), s.state2.absmax, s.state2.code)]
    assert len(states) == len(tiny.linears)
    assert nbytes(p for _, p in quantized) + sum(t.numel() * t.element_size() for t in kept) == weights_bytes(
        tiny, dtype, "nf4"
    )


def test_nf4_of_a_weight_that_fills_no_block():
    assert nf4_bytes(64) == 32 + 1 + 4 + 1092
    assert nf4_bytes(65) == 33 + 2 + 4 + 1092


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit"])
def test_adapters_gradients_and_optimizer_are_what_the_tensors_take(name, tiny):
    policy = Policy.load("tiny", lora=lora(64), seed=0, dtype="bfloat16")
    assert nbytes(policy.trainable) == adapters_bytes(tiny, 1)
    policy.acted_tokens([(5, 6, 7)], [(2,)]).logprobs.sum().backward()
    assert nbytes(p.grad for p in policy.trainable) == adapters_bytes(tiny, 1)
    optimizer = make_optimizer(name, policy.trainable, learning_rate=1e-3, weight_decay=0.0)
    optimizer.step()
    state = {key: t for key, t in optimizer_tensors(optimizer).items() if not key.endswith(".step")}
    books = [t for key, t in state.items() if ".qmap" in key]
    others = [t for key, t in state.items() if ".qmap" not in key]
    once = 2 * books[0].nbytes if books else 0  # copied for each weight here, shared in the optimizer
    assert bool(books) == (name == "paged_adamw_8bit")
    assert sum(t.nbytes for t in others) + once == optimizer_bytes(tiny, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_what_the_tensors_take(tiny, dtype):
    policy = Policy.load("tiny", lora=lora(64), seed=0, dtype=dtype)
    sampler = HFSampler(policy)
    prompt = tuple(5 + i % 900 for i in range(150))
    sampler.generate([Chat([], (k, *prompt), (), (0, k)) for k in range(3)], SamplingParams(8))
    read = sampler._read
    assert len(read.sequences) == 3
    longest = max(map(len, read.sequences))
    assert nbytes(t for layer in read.stored for t in layer) == kv_bytes(tiny, dtype, 3, longest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_about_what_autograd_keeps(dtype):
    """Within a tenth, without the weights that it keeps too; a small rank, since the formula leaves it out."""
    shape = shape_of(AutoConfig.from_pretrained(base_path("tiny")), lora(2))
    policy = Policy.load("tiny", lora=lora(2), seed=0, dtype=dtype)
    rows = [tuple(5 + i * j % 900 for i in range(200)) for j in range(1, 5)]
    _, kept = kept_for_backward(lambda: policy.acted_tokens(rows, [(5,)] * 4))
    kept -= weights_bytes(shape, dtype) + adapters_bytes(shape, 1)
    assert kept == pytest.approx(activations_bytes(shape, dtype, 4, 200, checkpointing=False), rel=0.1)


# --- what a dry run says


@pytest.fixture
def qwen_folder(tmp_path) -> Path:
    """Qwen3-8B as far as a dry run looks: its configuration, and a tokenizer."""
    folder = tmp_path / "Qwen3-8B"
    shutil.copytree(base_path("tiny"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    QWEN.save_pretrained(folder)
    return folder


def test_a_dry_run_estimates_the_memory_and_warns(qwen_folder, tmp_path):
    recipe = RECIPES / "qwen3-8b" / "role_play.yaml"
    output, _ = atp("run", recipe, f"model.name={qwen_folder}", "--dry-run", cwd=tmp_path)
    assert "align: ask  align: train  evolve: play  evolve: update" in output
    (weights,) = [line for line in output.splitlines() if line.startswith("base weights")]
    assert weights.split()[2:] == ["15.26"] * 4  # 2 x 8,190,735,360 / 2^30
    assert "a GPU of 80 GiB is assumed" in output or torch.cuda.is_available()
    assert "WARNING" not in output
    output, _ = atp("run", recipe, f"model.name={qwen_folder}", "evolve.micro_batch=null", "--dry-run", cwd=tmp_path)
    assert "WARNING: evolve: update needs " in output


def test_what_takes_less_is_estimated_at_less(qwen_folder):
    recipe = str(RECIPES / "qwen3-8b" / "role_play.yaml")

    def update(*overrides: str) -> float:
        resolved = load([recipe, f"model.name={qwen_folder}", *overrides])
        (line,) = [s for s in memory_lines(resolved, pipeline.suites_of(resolved)) if s.startswith("sum")]
        return float(line.split()[-1])

    whole = update()
    assert update("model.quantize=nf4") == pytest.approx(whole - 15.26 + 5.66, abs=0.02)
    assert update("evolve.gradient_checkpointing=false") > whole + 10
    assert update("evolve.micro_batch=1") < whole - 2
    assert update("evolve.optimizer=paged_adamw_8bit") < whole
    assert update("scenarios.rounds=1") < whole
    assert (
        update("evolve.learner=population", "evolve.gradient_checkpointing=false", "scenarios.testbed=collusion")
        > whole
    )


def test_without_the_configuration_a_dry_run_says_so_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    output, errors = atp("run", RECIPES / "llama3.1-8b" / "evaluate.yaml", "--dry-run", cwd=tmp_path)
    (line,) = [line for line in output.splitlines() if line.startswith("memory:")]
    assert "not estimated, since configuration and tokenizer of meta-llama/Llama-3.1-8B-Instruct are not here" in line
    assert "max_new_tokens: 256" in output
    assert "Retrying" not in output + errors  # the Hub is not asked


def test_a_model_of_another_kind_is_not_estimated(tmp_path):
    shutil.copytree(base_path("tiny"), tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.safetensors"))
    GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path / "gpt2")
    recipe = load([str(RECIPES / "tiny" / "role_play.yaml"), f"model.name={tmp_path / 'gpt2'}"])
    (line,) = memory_lines(recipe, pipeline.suites_of(recipe))
    assert line.startswith("memory: not estimated, since the formulae are for decoders with gated MLPs")


def test_the_table_names_what_is_too_large():
    phases = [Phase("evolve: play", {"base weights": 3 * GIB}), Phase("evolve: update", {"gradients": GIB // 2})]
    table = lines(phases, 2 * GIB, assumed=False)
    assert table[-1] == "WARNING: evolve: play needs 3.0 GiB and a GPU has 2 (the one here)"
    assert sum("WARNING" in line for line in table) == 1
    assert lines(phases, 2 * GIB, assumed=True)[-1].startswith("a GPU of 2 GiB is assumed")
    assert json.dumps(table).count("0.50") == 2
