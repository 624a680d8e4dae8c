"""Where the time of an evolution step goes, against what it would have to cost:

    python -m tests.benchmarks.profile_step --out profile.json

The step is the tiny recipe's (32 scenarios x 8 episodes), of one round and of three. Time inside the model is split by
what it was for; `rest` is everything else: environments, templates, drawing tokens, building rows, the loss.

The floor counts every token once that the same episodes share, by position in the tree of their prefixes:

    forward   2 (N + A) per token + 2 V d per drawn token + 4 h L per token and token of its context
    backward  2 N + 4 A per token + 2 V d per drawn token + 8 h L per token and token of its context

with N the weights of the layers, A those of the adapter, V the vocabulary, d the hidden size, h = heads x head size, L
layers; nothing is spent on gradients of frozen weights. Bytes: the weights once per forward that has to wait for a
token drawn before, and keys and values of the context once per token drawn. The floor in seconds divides by the matrix
product that this machine did best, and by the copy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from atp_rl.model.policy import Policy
from atp_rl.samples import training_rows
from atp_rl.types import Group
from tests.benchmarks.__main__ import hush, machine
from tests.benchmarks.evolution_step import SAMPLER_MODES, EvolutionStep, step_work
from tests.benchmarks.rollouts import make_policy


@dataclass
class Part:
    seconds: float = 0.0
    calls: int = 0
    tokens: int = 0
    """Rows x width of what went into the model, pads included."""


class StepClock:
    """Sums up the time that one step spends inside the model, its backward pass and its optimizer."""

    def __init__(self, policy: Policy, longest_reply: int) -> None:
        """`longest_reply`: a forward that reads no more tokens a row than this continues replies, else it reads
        prompts."""
        self.policy, self.longest_reply = policy, longest_reply
        self.parts: dict[str, Part] = defaultdict(Part)
        self.phase = ""
        self._reading = ""

    @contextmanager
    def running(self, phase: str) -> Iterator[None]:
        """Everything inside belongs to `phase`: rollout or update."""
        base: Any = self.policy.model.get_base_model()
        self.phase, begun, before = phase, time.perf_counter(), sum(part.seconds for part in self.parts.values())
        with ExitStack() as until:
            for module, name in ((base.model, None), (base.lm_head, "head")):
                until.callback(module.register_forward_pre_hook(self._enter(name), with_kwargs=True).remove)
                until.callback(module.register_forward_hook(self._leave).remove)
            until.callback(register_optimizer_step_pre_hook(lambda *_: self._start("optimizer")).remove)
            until.callback(register_optimizer_step_post_hook(lambda *_: self._stop()).remove)
            until.enter_context(patch.object(torch.Tensor, "backward", self._timed_backward(torch.Tensor.backward)))
            yield
        inside = sum(part.seconds for part in self.parts.values()) - before
        self.parts[f"{phase}: rest"].seconds += time.perf_counter() - begun - inside

    def _enter(self, name: str | None) -> Callable[..., None]:
        def enter(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
            if name is None:
                ids = kwargs["input_ids"]
                kind = "forward" if self.phase == "update" else self._kind(ids.shape[1])
                self._reading = kind
                self.parts[f"{self.phase}: {kind}"].tokens += ids.numel()
                self.parts[f"{self.phase}: {kind}"].calls += 1
            self._start(self._reading)

        return enter

    def _kind(self, width: int) -> str:
        return "decode" if width <= self.longest_reply else "prompts"

    def _leave(self, *_: Any) -> None:
        self._stop()

    def _timed_backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            self._start("backward")
            backward(*args, **kwargs)
            self._stop()
            self.parts[f"{self.phase}: backward"].calls += 1

        return timed

    def _start(self, name: str) -> None:
        self._running, self._begun = f"{self.phase}: {name}", time.perf_counter()

    def _stop(self) -> None:
        self.parts[self._running].seconds += time.perf_counter() - self._begun


class Tree(NamedTuple):
    """What sequences of tokens have in common counted once."""

    tokens: int
    context: int
    """Sum over those tokens of how many they see, themselves included."""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Tree:
        tokens = context = 0
        before: Sequence[int] = ()
        for sequence in sorted(map(tuple, sequences)):
            shared = next(
                (i for i, (a, b) in enumerate(zip(before, sequence, strict=False)) if a != b),
                min(len(before), len(sequence)),
            )
            tokens += len(sequence) - shared
            context += (len(sequence) * (len(sequence) + 1) - shared * (shared + 1)) // 2
            before = sequence
        return cls(tokens, context)


class Floor(NamedTuple):
    tokens: int
    """That have to be read, shared ones once."""
    flops: float
    bytes: float


def floors(policy: Policy, groups: Sequence[Group]) -> dict[str, Floor]:
    """The least that the rollout and the update of these episodes can cost."""
    config: Any = policy.model.config
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    heads = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layers = config.num_hidden_layers * config.hidden_size * (heads + 3 * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    adapter = sum(parameter.numel() for parameter in policy.trainable)
    size = next(iter(policy.model.parameters())).element_size()
    kept = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * size  # a token's keys, values

    turns = [turn for group in groups for episode in group for turn in episode.turns]
    read = Tree.of([(*turn.prompt_ids, *turn.completion.token_ids[:-1]) for turn in turns])
    drawn = {
        (*turn.prompt_ids, *turn.completion.token_ids[:k])
        for turn in turns
        for k in range(len(turn.completion.token_ids))
    }
    waits = sum(
        max(len(turn.completion.token_ids) for turn in turns if turn.round == k) for k in {t.round for t in turns}
    )
    rows = [row for group in groups for episode in group for row in training_rows(episode.turns)]
    learned = Tree.of([row.ids[:-1] for row in rows])
    acted = len({row.ids[:position] for row in rows for position in row.acted})

    def forward(tree: Tree, logits: int) -> float:
        return 2 * (layers + adapter) * tree.tokens + 2 * head * logits + attention * tree.context

    weights = size * (layers + head + adapter)
    backward = (2 * layers + 4 * adapter) * learned.tokens + 2 * head * acted + 2 * attention * learned.context
    return {
        "rollout": Floor(read.tokens, forward(read, len(drawn)), waits * weights + kept * sum(map(len, drawn))),
        "update": Floor(learned.tokens, forward(learned, acted) + backward, 2 * weights + 7 * size * adapter),
    }


def matmul_speed(rows: int, inner: int, columns: int, *, seconds: float = 0.3) -> float:
    """Floating-point operations per second of the best of many products of such matrices in float32."""
    a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    return 2 * rows * inner * columns / _best(lambda: torch.mm(a, b, out=out), seconds)


def copy_speed(*, megabytes: int = 128, seconds: float = 0.3) -> float:
    """Bytes per second read and written by the best of many copies."""
    a, b = torch.empty(megabytes * 250_000), torch.zeros(megabytes * 250_000)
    return 2e6 * megabytes / _best(lambda: a.copy_(b), seconds)


def _best(run: Callable[[], Any], seconds: float) -> float:
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return best


def profile(rounds: int, repeats: int, mode: Mapping[str, Any]) -> dict[str, Any]:
    """The fastest of several steps, by part, and its floor."""
    work = step_work(rounds)
    step = EvolutionStep(make_policy(), work, **mode)
    step()  # what torch and transformers do once
    best: StepClock | None = None
    found: dict[str, Floor] = {}
    for _ in range(repeats):
        clock = StepClock(step.policy, work.play.sampling.max_new_tokens)
        with clock.running("rollout"):
            played = step.play()
        with clock.running("update"):
            step.learn(played)
        if best is None or _total(clock) < _total(best):
            best, found = clock, floors(step.policy, played.groups)
    assert best is not None
    return {
        "work": work.name,
        "parts": {name: asdict(part) for name, part in sorted(best.parts.items())},
        "floor": {phase: floor._asdict() for phase, floor in found.items()},
    }


def _total(clock: StepClock) -> float:
    return sum(part.seconds for part in clock.parts.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.profile_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 3], help="a step of so many rounds each")
    parser.add_argument("--repeats", type=int, default=5, help="steps, of which the fastest is shown (default 5)")
    parser.add_argument("--mode", choices=list(SAMPLER_MODES), default="sampled", help="how replies are drawn")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    chosen = parser.parse_args(arguments)
    hush()
    record = machine() | {
        "mode": chosen.mode,
        "matmul_flops": matmul_speed(1024, 1024, 1024),
        "matmul_flops_of_a_layer": matmul_speed(4096, 64, 192),
        "copy_bytes": copy_speed(),
        "steps": [profile(rounds, chosen.repeats, SAMPLER_MODES[chosen.mode]) for rounds in chosen.rounds],
    }
    if chosen.out:
        chosen.out.write_text(json.dumps(record, indent=2) + "\n")
    console = Console(width=120)
    for step in record["steps"]:
        console.print(_table(step, record))
    console.print(
        f"{record['threads']} thread(s); float32 products of 1024 x 1024 matrices {record['matmul_flops'] / 1e9:.0f} "
        f"GFLOP/s, of [4096, 64] x [64, 192] {record['matmul_flops_of_a_layer'] / 1e9:.0f}; copy "
        f"{record['copy_bytes'] / 1e9:.1f} GB/s"
    )


def _table(step: Mapping[str, Any], record: Mapping[str, Any]) -> Table:
    table = Table(title=f"{step['work']}, {record['mode']}")
    for heading in ("part", "seconds", "share", "calls", "tokens"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    total = sum(part["seconds"] for part in step["parts"].values())
    for name, part in step["parts"].items():
        counts = [f"{part[key]:,}" if part[key] else "" for key in ("calls", "tokens")]
        table.add_row(name, f"{part['seconds']:.3f}", f"{part['seconds'] / total:.0%}", *counts)
    table.add_row("together", f"{total:.3f}", "100%", "", "", end_section=True)
    for phase, floor in step["floor"].items():
        took = sum(part["seconds"] for name, part in step["parts"].items() if name.startswith(phase))
        fastest = max(record["matmul_flops"], record["matmul_flops_of_a_layer"])
        operations, moved = floor["flops"] / fastest, floor["bytes"] / record["copy_bytes"]
        table.add_row(
            f"floor of the {phase}: {floor['flops'] / 1e9:.2f} GFLOP, {floor['bytes'] / 1e6:.0f} MB",
            f"{operations:.3f} + {moved:.3f}",
            f"{(operations + moved) / took:.0%} of it",
            "",
            f"{floor['tokens']:,}",
        )
    return table


if __name__ == "__main__":
    main()
