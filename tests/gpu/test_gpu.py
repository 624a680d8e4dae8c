"""What only a GPU can show: the same policy in bf16 by the sampler, by `generate` and by the learner; 4-bit weights."""

from __future__ import annotations

import json

import pytest
import torch

from atp_rl.evolve.loop import MAX_SAMPLER_GAP
from atp_rl.model.policy import Policy
from atp_rl.model.sampler import HFSampler
from atp_rl.types import SamplingParams
from tests.benchmarks.evolution_step import EvolutionStep, step_work
from tests.benchmarks.propensity import chats
from tests.benchmarks.rollouts import LORA
from tests.small_model import run_of, small_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def cuda_policy(dtype) -> Policy:
    policy = Policy.load("tiny", lora=LORA, seed=0, dtype=dtype)
    assert policy.device.type == "cuda"
    with torch.no_grad():
        for parameter in policy.trainable:  # a fresh adapter changes nothing
            parameter += 0.02 * torch.randn_like(parameter)
    return policy


def test_sampler_is_generate_when_greedy():
    policy = cuda_policy("float32")
    asked = chats(policy)
    replies = HFSampler(policy).generate(asked, SamplingParams(max_new_tokens=16, temperature=1e-4))
    pad, eos = policy.chat.pad_id, policy.chat.eos_id
    for chat, reply in zip(asked, replies, strict=True):
        ids = torch.tensor([chat.prompt_ids], device=policy.device)
        written = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=pad,
            eos_token_id=eos,
        )[0, ids.shape[1] :]
        assert list(reply.token_ids) == written.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampler_and_learner_agree(dtype):
    step = EvolutionStep(cuda_policy(dtype), step_work(3, scenarios=8))
    _, metrics = step()
    assert metrics["perf/sampler_gap_mean"] < (MAX_SAMPLER_GAP if dtype == "bfloat16" else 1e-4)


def test_evolution_moves_a_finite_adapter(tmp_path):
    run = run_of(small_recipe(tmp_path / "run", "model.dtype=bfloat16", steps=1))
    last = run.last_checkpoint()
    assert last is not None
    assert last.step == 1
    assert all(tensor.isfinite().all() for tensor in last.adapter.values())
    (metrics,) = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert metrics["drift/adapter_distance"] > 0


def test_nf4_base_takes_a_step():
    policy = Policy.load("tiny", lora=LORA, seed=0, dtype="bfloat16", quantize="nf4")
    before, packed = policy.state(), policy.base_hash()
    step = EvolutionStep(policy, step_work(1, scenarios=8))
    _, metrics = step()
    after = policy.state()
    assert metrics["evolve/grad_norm"] > 0
    assert metrics["perf/sampler_gap_mean"] < MAX_SAMPLER_GAP
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in after)
    assert policy.base_hash() == packed
