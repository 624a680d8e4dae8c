"""What saves memory must not change what is computed: chunks, checkpointing, order of rows, 8-bit state, 4-bit base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig
from torch import Tensor

from atp_rl.align import dpo
from atp_rl.align.trainer import Training
from atp_rl.evolve.learners import _Batch
from atp_rl.model import token_logprobs as module
from atp_rl.model.optimizer_state import make_optimizer, optimizer_tensors, restore_optimizer
from atp_rl.model.policy import Policy, Quantize, load_base
from atp_rl.model.sampler import HFSampler
from atp_rl.model.token_logprobs import divergence, token_logprobs
from atp_rl.recipe import load
from atp_rl.samples import samples_of
from atp_rl.types import Chat, InputError, SamplingParams
from tests.small_model import aligned, base, checkpoint_files, gradients, lora, nudge, run_of, same, small_recipe
from tests.test_learners import GROUPS, REWARDS, make_learner


def kept_for_backward(compute: Callable[[], Any]) -> tuple[Any, int]:
    """What a computation gives, and the bytes that autograd keeps for its backward pass, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return compute(), sum(kept.values())


# --- log-probabilities in chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 3 * 50, 1 << 20])  # one token at once, three, all
def test_chunks_give_the_same_values_and_gradients(chunk, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(4, 5, 50, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(50, (4, 5), generator=generator)
    weights = torch.randn(4, 5, generator=generator)
    logprobs, entropy = token_logprobs(logits, targets, 0.7)
    (logprobs * weights).sum().backward()
    assert logits.grad is not None
    ours, logits.grad = logits.grad, None

    plain = (logits.float() / 0.7).log_softmax(-1)
    chosen = plain.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    (chosen * weights).sum().backward()
    torch.testing.assert_close(logprobs, chosen, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, -(plain.exp() * plain).sum(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, logits.grad, rtol=0, atol=1e-6)
    assert not entropy.requires_grad

    others = torch.randn(4, 5, 50, generator=generator).to(dtype)
    exact = torch.nn.functional.kl_div(others.float().log_softmax(-1), logits.float().log_softmax(-1), log_target=True,
                                       reduction="none").sum(-1)  # fmt: skip
    torch.testing.assert_close(divergence(logits, others), exact, rtol=0, atol=1e-6)


def test_chunks_keep_no_copy_in_single_precision(monkeypatch):
    logits = torch.randn(8, 50, 1000).bfloat16().requires_grad_()
    targets = torch.zeros(8, 50, dtype=torch.long)

    def kept() -> int:
        return kept_for_backward(lambda: token_logprobs(logits, targets, 1.0))[1]

    plain = kept()
    monkeypatch.setattr(module, "CHUNK", 10_000)
    assert plain >= 4 * logits.numel()  # a float32 copy
    assert kept() <= 2 * logits.numel() + 16 * targets.numel()  # the logits themselves, in bf16


# --- checkpointing


def policy_with(**options: Any) -> Policy:
    shape = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    policy = Policy.load(base(), lora=shape, seed=0, **options)
    nudge(policy, 0.05, seed=5)
    return policy


def test_checkpointing_keeps_less_and_gives_the_same_update():
    """Also with dropout in the adapter's configuration, which stays off."""
    rows = [tuple(range(3, 3 + n)) for n in (60, 50, 40)]
    acted = [tuple(range(n // 2, n)) for n in (60, 50, 40)]
    kept, grads, states = {}, {}, {}
    for recomputes in (False, True):
        policy = policy_with(gradient_checkpointing=recomputes)
        tokens, kept[recomputes] = kept_for_backward(lambda p=policy: p.acted_tokens(rows, acted))
        tokens.logprobs.sum().backward()
        grads[recomputes] = gradients(policy)
        for _ in range(2):
            make_learner(policy, micro_batch=2).update(policy, GROUPS, REWARDS, [])
        states[recomputes] = policy.state()
    assert same(grads[True], grads[False])
    assert same(states[True], states[False])
    assert kept[True] < kept[False] / 2


def test_checkpointing_leaves_the_samplers_cache_alone():
    ids = tuple(range(5, 25))
    chats = [Chat([], ids, ("a", "b"), (0, k)) for k in range(4)]
    said = []
    for recomputes in (False, True):
        policy = policy_with(gradient_checkpointing=recomputes)
        policy.acted_tokens([ids], [(4, 5)]).logprobs.sum().backward()
        said.append(HFSampler(policy).generate(chats, SamplingParams(6)))
    assert said[0] == said[1]


def test_checkpointing_a_mixture_of_adapters_is_refused():
    with pytest.raises(InputError, match=r"gradient_checkpointing.*works for one adapter"):
        load(["evolve.learner=population", "evolve.steps=1", "evolve.gradient_checkpointing=true", "align.method=dpo"])


# --- rows of one length together


def test_rows_are_cut_into_micro_batches_by_length():
    samples = [sample for group in GROUPS for sample in samples_of(group)]
    samples = [samples[0], samples[3], samples[1], *samples[4:], samples[2]]  # short and long ones alternate
    batch = _Batch(samples, [0] * 6, torch.arange(6.0), "dapo", 12, micro_batch=2)

    def pads(chunks: list[list[tuple[int, ...]]]) -> int:
        return sum(max(map(len, rows)) * len(rows) - sum(map(len, rows)) for rows in chunks)

    in_order = list(dict.fromkeys(row.ids for row, _ in batch.rows))
    # lengths 6, 4, 4, 8, 5 of five different rows as they come; sorted: 4, 4 | 5, 6 | 8
    assert sorted(map(len, in_order)) == [4, 4, 5, 6, 8]
    assert pads([in_order[i : i + 2] for i in range(0, 5, 2)]) > 1
    assert pads([chunk.rows for chunk in batch.chunks]) == 1
    # every row of a sample still finds its own tokens, advantage and weight
    seen = [
        (chunk.rows[place], advantage)
        for chunk in batch.chunks
        for place, advantage in zip(chunk.episode_of.tolist(), chunk.advantages.tolist(), strict=True)
    ]
    assert sorted(seen) == sorted((row.ids, float(i)) for row, i in batch.rows)


# --- the optimizer in eight bits


def test_the_state_of_the_8_bit_optimizer_is_saved_and_restored_to_the_last_bit():
    def fresh() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        weights = [torch.nn.Parameter(torch.linspace(-1, 1, n).view(-1, 8)) for n in (8192, 64)]
        return weights, make_optimizer("paged_adamw_8bit", weights, learning_rate=1e-2, weight_decay=0.1)

    def steps(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()

    weights, optimizer = fresh()
    steps(weights, optimizer, range(3))
    saved, values = optimizer_tensors(optimizer), [w.detach().clone() for w in weights]
    kept = {key: value.clone() for key, value in saved.items()}
    assert saved["optimizer.0.state1"].dtype == torch.uint8
    assert saved["optimizer.1.state1"].dtype == torch.float32  # too small to quantize
    steps(weights, optimizer, range(3, 6))
    assert same(saved, kept)  # copies, which do not move

    others, other = fresh()
    for weight, value in zip(others, values, strict=True):
        weight.data.copy_(value)
    restore_optimizer(other, saved)
    assert same(optimizer_tensors(other), saved)
    steps(others, other, range(3, 6))
    for weight, expected in zip(others, weights, strict=True):
        assert torch.equal(weight, expected)
    assert same(optimizer_tensors(other), optimizer_tensors(optimizer))
    restore_optimizer(other, {})
    assert optimizer_tensors(other) == {}


def test_both_optimizers_agree_where_the_state_is_not_quantized():
    moved = []
    for name in ("adamw", "paged_adamw_8bit"):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 64))
        optimizer = make_optimizer(name, [weight], learning_rate=1e-2, weight_decay=0.1)
        for k in range(5):
            weight.grad = torch.linspace(-2, 1, 64) * (k + 1)
            optimizer.step()
        moved.append(weight.detach())
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-6)


# --- the base in four bits


@pytest.fixture(scope="module")
def dequantized(tmp_path_factory) -> str:
    """The weights that the quantized base stands for, as a model of its own."""
    folder = tmp_path_factory.mktemp("dequantized")
    shutil.copytree(base(), folder, dirs_exist_ok=True)
    plain, quantized = load_base(base()), load_base(base(), quantize="nf4")
    for name, layer in quantized.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            packed: Any = layer.weight
            weight = dequantize_4bit(packed.data, packed.quant_state)
            plain.get_parameter(f"{name}.weight").data.copy_(weight)
    plain.save_pretrained(folder)
    return str(folder)


def test_a_quantized_base_learns_and_samples_as_the_weights_it_stands_for(dequantized):
    rows, acted = [tuple(range(5, 25)), tuple(range(30, 42))], [(4, 5, 19), (3, 11)]
    chats = [Chat([], row, ("a", "b"), (0, k)) for k, row in enumerate(rows * 2)]
    found = []
    models: list[tuple[str, Quantize | None]] = [(base(), "nf4"), (dequantized, None), (base(), None)]
    for name, quantize in models:
        policy = Policy.load(name, lora=lora(), seed=0, quantize=quantize)
        nudge(policy, 0.05, seed=5)
        frozen = policy.base_hash()
        # sampling first: on some CPUs bitsandbytes would now replace the weights by ones that give no gradient
        said = HFSampler(policy).generate(chats, SamplingParams(5))
        tokens = policy.acted_tokens(rows, acted)
        tokens.logprobs.sum().backward()
        assert policy.base_hash() == frozen
        found.append((said, tokens.logprobs.detach(), gradients(policy)))
    (said, logprobs, grads), (said_, logprobs_, grads_), (_, whole, _) = found
    assert [c.token_ids for c in said] == [c.token_ids for c in said_]
    torch.testing.assert_close(logprobs, logprobs_, rtol=0, atol=1e-4)
    assert (logprobs - whole).abs().max() > 1e-2  # it really is another model than the unquantized one
    assert grads.keys() == grads_.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], grads_[name], rtol=1e-3, atol=1e-4)


def test_rows_of_a_quantized_base_can_go_through_several_adapters(dequantized):
    rows, acted = [tuple(range(5, 15)), tuple(range(5, 15))], [(4, 5), (4, 5)]
    found = []
    models: list[tuple[str, Quantize | None]] = [(base(), "nf4"), (dequantized, None)]
    for name, quantize in models:
        policy = Policy.load(name, lora=lora(), seed=0, quantize=quantize, seats=("s0", "s1"))
        nudge(policy, 0.05, seed=5)
        found.append(policy.acted_tokens(rows, acted, players=["s0", "s1"]).logprobs.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
    assert not torch.equal(found[0][0], found[0][1])


QLORA = ("model.quantize=nf4", "evolve.optimizer=paged_adamw_8bit", "evolve.gradient_checkpointing=true",
         "evolve.micro_batch=3", "evolve.start_from=base", "model.lora.r=128")  # fmt: skip
"""A rank at which the 8-bit optimizer really quantizes."""


def test_a_quantized_run_resumes_bit_for_bit(tmp_path):
    whole = run_of(small_recipe(tmp_path / "whole", *QLORA, steps=4))
    stopped = run_of(small_recipe(tmp_path / "parts", *QLORA, steps=2))
    recipe = small_recipe(tmp_path / "parts", *QLORA, steps=4)
    assert run_of(recipe).path == stopped.path
    names = {name for name in checkpoint_files(whole, 4) if name.endswith("safetensors")}
    assert len(names) == 2
    for name in names:
        assert checkpoint_files(stopped, 4)[name] == checkpoint_files(whole, 4)[name]
    assert checkpoint_files(whole, 4) != checkpoint_files(whole, 2)
    last = whole.last_checkpoint()
    assert last is not None
    assert any(tensor.dtype == torch.uint8 for name, tensor in last.tensors.items() if name.endswith("state1"))


def test_an_adapter_is_aligned_on_a_quantized_base(tmp_path):
    pairs = [
        {
            "prompt": [{"role": "user", "content": "Method A or Method B?"}],
            "chosen": [{"role": "assistant", "content": '{"choice": "Method A"}'}],
            "rejected": [{"role": "assistant", "content": '{"choice": "Method B"}'}],
        }
    ] * 4
    options = {"max_steps": 2, "learning_rate": 1e-3, "optim": "paged_adamw_8bit", "gradient_checkpointing": True}
    made = dpo.train(pairs, Training(base(), tmp_path, lora(), options, seed=0, quantize="nf4"))
    assert made["steps"] == 2
    policy = Policy.load(base(), lora=lora(), seed=0, aligned=Path(tmp_path), quantize="nf4")
    assert policy.adapter_hash("aligned") == made["adapter_sha256"] == policy.adapter_hash("policy")
    log = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert log


def test_an_anchor_of_the_unquantized_base_can_start_a_quantized_policy():
    policy = Policy.load(base(), lora=lora(), seed=0, aligned=aligned(), quantize="nf4")
    assert policy.adapter_hash("aligned") == policy.adapter_hash("policy")
