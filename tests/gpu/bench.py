"""Measure rollouts, LoRA training and an evolution step of an 8B model on one GPU, by one command:

    python -m tests.gpu.bench --out gpu_bench.json

The model has Qwen3-8B's shape and random weights in bf16, made on the device: nothing is downloaded. It needs nothing
beyond torch, transformers, accelerate, peft, bitsandbytes (for QLoRA alone) and a few small wheels: numpy, scipy,
networkx, pydantic, omegaconf, pyyaml, jinja2, rich. Replies of random weights are nonsense of full length, and no two
are equal: a trained model's JSON answers end earlier and coincide, so that it does less. The parts run in order of
importance; every one prints a line and is written to the file at once; one that fails or runs out of memory is
recorded, and the others go on.

Model-flops use (MFU) is flops per token x tokens/s / peak, where the flops are 6 N (as if all weights were trained) or
4 N (what LoRA has to do: forward 2 N, gradients of activations 2 N); N counts the weights of the base that a token is
multiplied by, with the head, without the embedding. Attention, the adapter and recomputation under checkpointing are
not counted. The peak is the data sheet's (dense bf16) where the card is known; `matmul` is what a large matrix product
reaches.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from atp_rl.evaluate.evaluator import evaluate
from atp_rl.model.policy import Policy
from atp_rl.model.sampler import HFSampler
from atp_rl.rollout import Play, rollout
from atp_rl.samples import training_rows
from atp_rl.types import SamplingParams
from tests.benchmarks.__main__ import hush, machine
from tests.benchmarks.evolution_step import EvolutionStep
from tests.benchmarks.rollouts import Work, pick_scenarios
from tests.gpu.shapes import DEVICE, SHAPES, Shape, make_policy, matmul_weights

PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 by the data sheets, by a part of the card's name; the first that fits."""

CUDA = DEVICE.type == "cuda"
T = TypeVar("T")
Measured = dict[str, Any]


class Bench:
    """Runs the parts one after the other and keeps what they found."""

    def __init__(self, shape: Shape, out: Path | None) -> None:
        self.shape, self.out = shape, out
        self.record: dict[str, Any] = machine() | {"model": shape.name, "parts": []}
        self._policy: Policy | None = None

    @property
    def policy(self) -> Policy:
        """In bf16 with adapters in float32, as a recipe makes it; made when it is first asked for."""
        if self._policy is None:
            self._policy = make_policy(self.shape)
        return self._policy

    def forget(self) -> None:
        """Give the memory of the policy back."""
        self._policy = None
        _free()

    def part(self, name: str, measure: Callable[[], Measured]) -> None:
        """Run one measurement, print its line and write the file; whatever it raises is part of the record."""
        _free()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        try:
            found: Measured = {"part": name, "ok": True, **measure()}
        except torch.OutOfMemoryError as error:
            found = {"part": name, "ok": False, "out_of_memory": True, "error": str(error).splitlines()[0]}
        except Exception as error:  # one broken part must not cost the others on a machine that is lent for minutes
            found = {"part": name, "ok": False, "out_of_memory": False, "error": repr(error)}
            found["traceback"] = traceback.format_exc()
        found["wall_s"] = time.perf_counter() - begun
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if CUDA else None
        self.record["parts"].append(found)
        print(json.dumps({key: _rounded(value) for key, value in found.items()}), flush=True)
        if self.out:
            self.out.write_text(json.dumps(self.record, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write, after every part")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--model-shape", choices=list(SHAPES), default="qwen3-8b")
    chosen = parser.parse_args(arguments)
    hush()
    bench = Bench(SHAPES[chosen.model_shape], chosen.out)
    for section in chosen.only:
        PARTS[section](bench)
    broken = [part["part"] for part in bench.record["parts"] if not part["ok"] and not part["out_of_memory"]]
    print(f"failed: {', '.join(broken)}" if broken else "all parts ran, or found no memory")
    return 1 if broken else 0


# --- rollouts


def rollouts(bench: Bench) -> None:
    bench.part("load", lambda: {"weights": sum(p.numel() for p in bench.policy.model.parameters())})
    bench.part("matmul", _matmul)
    first = bench.shape.rollout_batches[0]
    bench.part(f"rollout {first}", lambda: _rollout(bench.policy, bench.shape, first))


def batch_sizes(bench: Bench) -> None:
    for size in bench.shape.rollout_batches[1:]:
        bench.part(f"rollout {size}", lambda size=size: _rollout(bench.policy, bench.shape, size))


def _rollout(policy: Policy, shape: Shape, conversations: int) -> Measured:
    """One round of short conversations, all at once, groups of `group_size` with the same prompt."""
    scenarios = pick_scenarios("train", conversations // shape.group_size)
    play = Play(
        rounds=1,
        supervision={"probability": 0.1},
        history_window=1,
        sampling=SamplingParams(max_new_tokens=shape.reply_tokens),
    )
    brief = replace(play, sampling=SamplingParams(max_new_tokens=2))
    rollout(scenarios, HFSampler(policy, batch_size=conversations), brief, group_size=shape.group_size, seed=(0,))
    _synchronise()
    sampler = HFSampler(policy, batch_size=conversations)
    played = rollout(scenarios, sampler, play, group_size=shape.group_size, seed=(1,))
    return {
        "conversations": conversations,
        "output_tokens": played.tokens,
        "seconds": played.seconds,
        "output_tokens_per_s": played.tokens / played.seconds,
    }


# --- an evolution step


def steps(bench: Bench) -> None:
    for micro_batch in bench.shape.micro_batches:
        name = f"step, micro-batch {micro_batch}"
        bench.part(name, lambda micro_batch=micro_batch: _step(bench.policy, bench.shape, micro_batch))
        if bench.record["parts"][-1]["ok"]:
            return


def _step(policy: Policy, shape: Shape, micro_batch: int) -> Measured:
    """A role-play step of three rounds with answers as long as JSON ones, and the evaluation of a checkpoint."""
    play = Play(
        rounds=3,
        supervision={"probability": 0.1},
        history_window=3,
        sampling=SamplingParams(max_new_tokens=16),
    )
    work = Work("step", pick_scenarios("train", shape.step_scenarios), shape.group_size, play)
    episodes = shape.step_scenarios * shape.group_size
    EvolutionStep(policy, work.part(2), micro_batch=micro_batch)()  # what torch does once
    step = EvolutionStep(policy, work, micro_batch=micro_batch, batch_size=min(512, episodes))
    held_out = pick_scenarios("held_out", shape.step_scenarios)
    played, rollout_s, rollout_gb = _measured(step.play)
    metrics, update_s, update_gb = _measured(lambda: step.learn(played))
    _, evaluation_s, evaluation_gb = _measured(
        lambda: evaluate(step.sampler, held_out, play, samples=1, seed=0, policy=policy)
    )
    return {
        "episodes": episodes,
        "decisions": sum(len(episode.turns) for episode in played.episodes),
        "output_tokens": played.tokens,
        "trained_tokens": sum(len(row.ids) for episode in played.episodes for row in training_rows(episode.turns)),
        "step_s": rollout_s + update_s,
        "rollout_s": rollout_s,
        "update_s": update_s,
        "evaluation_s": evaluation_s,
        "evaluated_decisions": play.rounds * len(held_out),
        "rollout_gb": rollout_gb,
        "update_gb": update_gb,
        "evaluation_gb": evaluation_gb,
        "sampler_gap_mean": metrics["perf/sampler_gap_mean"],
    }


def _measured(run: Callable[[], T]) -> tuple[T, float, float | None]:
    """What it returns, its seconds, its peak memory in GB."""
    _free()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    _synchronise()
    begun = time.perf_counter()
    result = run()
    _synchronise()
    return result, time.perf_counter() - begun, torch.cuda.max_memory_allocated() / 1e9 if CUDA else None


# --- training


def training(bench: Bench) -> None:
    for length in bench.shape.lengths:
        for checkpointing in (False, True):
            name = f"train {length}, checkpointing {'on' if checkpointing else 'off'}"
            bench.part(name, lambda n=length, c=checkpointing: _train(bench.policy, bench.shape, n, checkpointing=c))
    bench.forget()
    length = bench.shape.lengths[0]
    bench.part(
        f"train {length}, checkpointing on, adapters in the base's type",
        lambda: _train(make_policy(bench.shape, adapters_in_float32=False), bench.shape, length, checkpointing=True),
    )


def qlora(bench: Bench) -> None:
    bench.forget()
    length = bench.shape.lengths[0]
    bench.part(
        f"qlora (NF4) {length}, checkpointing on",
        lambda: _train(make_policy(bench.shape, nf4=True), bench.shape, length, checkpointing=True),
    )


def _train(policy: Policy, shape: Shape, length: int, *, checkpointing: bool) -> Measured:
    """Steps on the log-likelihood of random tokens, a forward, a backward and an AdamW update each."""
    model: Any = policy.model
    sizes = list(dict.fromkeys(max(1, tokens // length) for tokens in shape.train_tokens))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # or transformers would not checkpoint; there is no dropout
    try:
        for rows in sizes:
            try:
                return _train_rows(policy, rows, length) | {"checkpointing": checkpointing}
            except torch.OutOfMemoryError:
                policy.model.zero_grad(set_to_none=True)
            _free()  # outside of `except`, whose traceback holds the tensors
        raise torch.OutOfMemoryError(f"not even {sizes[-1]} row(s) of {length} tokens fit")
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
        if checkpointing:
            model.gradient_checkpointing_disable()


def _train_rows(policy: Policy, rows: int, length: int, *, timed: int = 3) -> Measured:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()  # of this size alone
    optimizer = torch.optim.AdamW(policy.trainable, lr=1e-5)
    generator = torch.Generator(DEVICE).manual_seed(0)
    vocabulary = policy.model.config.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    for step in range(1 + timed):
        if step == 1:
            _synchronise()
            begun = time.perf_counter()
        ids = torch.randint(vocabulary, (rows, length), generator=generator, device=DEVICE)
        policy.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _synchronise()
    seconds = time.perf_counter() - begun
    speed = timed * rows * length / seconds
    base, adapter = matmul_weights(policy)
    found: Measured = {
        "rows": rows, "length": length, "seconds_per_step": seconds / timed, "tokens_per_s": speed,
        "matmul_weights": base, "adapter_weights": adapter,
    }  # fmt: skip
    if peak := _peak():
        found |= {"mfu_6n": 6 * base * speed / peak, "mfu_4n": 4 * base * speed / peak}
    return found


# --- the machine


def _matmul() -> Measured:
    """The speed of a large matrix product in the type of the model."""
    size, dtype = (8192, torch.bfloat16) if CUDA else (512, torch.float32)
    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    torch.mm(a, a)
    _synchronise()
    begun, times = time.perf_counter(), 20
    for _ in range(times):
        torch.mm(a, a)
    _synchronise()
    return {"size": size, "flops_per_s": times * 2 * size**3 / (time.perf_counter() - begun), "data_sheet": _peak()}


def _peak() -> float | None:
    if not CUDA:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)


def _synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def _free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


PARTS: dict[str, Callable[[Bench], None]] = {
    "rollout": rollouts,
    "step": steps,
    "train": training,
    "qlora": qlora,
    "batch_sizes": batch_sizes,
}
"""In order of importance: a run may be cut off."""


if __name__ == "__main__":
    raise SystemExit(main())
