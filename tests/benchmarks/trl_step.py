"""The same evolution step by TRL's GRPOTrainer, which plays the same environments through its `rollout_func`.

Of TRL's two ways to play episodes of several rounds this is the one that can: `environment_factory` has a model call
tools, and needs a chat template that can; ours answers in text. Generation is TRL's own with transformers, not vLLM:
what its tool loop calls in every turn. The environments, the tokens of the prompts and the rewards are those
of `atp_rl`, so that both do the same work around the model.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import datasets
from peft import get_peft_model
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from atp_rl.evolve.loop import shape
from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import TINY, load_base, load_chat
from atp_rl.rollout import Rollout, rollout
from atp_rl.samples import training_rows
from atp_rl.types import Chat, Completion, Group, SamplingParams
from tests.benchmarks.evolution_step import LEARNING_RATE, REWARDS
from tests.benchmarks.rollouts import LORA, Work


class TrlStep:
    """A trainer that takes one step per call."""

    def __init__(self, work: Work, *, batch_size: int) -> None:
        """`batch_size`: rows of one forward and backward of the update; all episodes are generated in one batch."""
        self.work = work
        self.scenarios = {scenario.id: scenario for scenario in work.scenarios}
        episodes = len(work.scenarios) * work.group_size
        self.folder = tempfile.TemporaryDirectory(prefix="atp_rl_trl_")
        config = GRPOConfig(
            output_dir=self.folder.name,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            shuffle_dataset=False,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=episodes // batch_size,
            num_generations=work.group_size,
            max_completion_length=work.play.sampling.max_new_tokens,
            temperature=work.play.sampling.temperature,
            top_k=0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            beta=0.0,
            loss_type="dapo",
            scale_rewards="group",
        )
        datasets.disable_progress_bars()
        set_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            self.trainer = self._trainer(config)
        self.trainer.remove_callback(PrinterCallback)
        self.clock = _StepClock()
        self.trainer.add_callback(self.clock)
        self.sampler = _TrlSampler(self.trainer, load_chat(TINY))
        self.played: Rollout | None = None

    def _trainer(self, config: GRPOConfig) -> GRPOTrainer:
        return GRPOTrainer(
            model=get_peft_model(load_base(TINY), LORA),  # pyright: ignore[reportArgumentType]
            reward_funcs=lambda episode_reward, **_: episode_reward,
            args=config,
            train_dataset=datasets.Dataset.from_list([{"prompt": name} for name in self.scenarios]),
            processing_class=load_chat(TINY).tokenizer,
            rollout_func=self._play,
        )

    def __call__(self) -> tuple[float, Rollout]:
        """Seconds of the step (generation, rewards, update; no set-up of the trainer), and what it played."""
        self.trainer.train()
        assert self.played is not None
        return self.clock.seconds, self.played

    def _play(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: each prompt comes once for every episode of its group, groups together."""
        names = list(dict.fromkeys(prompts))
        assert list(prompts) == [name for name in names for _ in range(self.work.group_size)]
        scenarios = [self.scenarios[name] for name in names]
        played = rollout(scenarios, self.sampler, self.work.play, group_size=self.work.group_size, seed=(0,))
        self.played = played
        rewards = shape(played.groups, REWARDS)
        return rollout_output(played.groups) | {"episode_reward": rewards.flatten().tolist()}


def rollout_output(groups: Sequence[Group]) -> dict[str, Any]:
    """Episodes of one seat, each a single row of tokens, as TRL wants them."""
    output: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "env_mask": [], "logprobs": None}
    for episode in (episode for group in groups for episode in group):
        (row,) = training_rows(episode.turns)
        start, acted = len(episode.turns[0].prompt_ids), set(row.acted)
        output["prompt_ids"].append(list(row.ids[:start]))
        output["completion_ids"].append(list(row.ids[start:]))
        output["env_mask"].append([int(position in acted) for position in range(start, len(row.ids))])
    return output


class _TrlSampler:
    """All chats in one batch of TRL's own generation."""

    version = 0

    def __init__(self, trainer: GRPOTrainer, chat: ChatFormat) -> None:
        self.trainer, self.chat = trainer, chat

    def generate(self, chats: Sequence[Chat], params: SamplingParams) -> list[Completion]:
        prompts = [list(chat.prompt_ids) for chat in chats]
        written, _ = self.trainer._generate_single_turn(prompts, None, {}, num_generations=1)
        return [
            Completion(self.chat.decode(ids), tuple(ids), (), "stop" if ids[-1] == self.chat.eos_id else "length")
            for ids in written
        ]

    def score(self, chats: Sequence[Chat]) -> list[tuple[float, ...]]:
        raise NotImplementedError


class _StepClock(TrainerCallback):
    """Seconds from where a step begins, which is before its generation, to where its optimizer has stepped."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **_: Any) -> None:
        self.seconds = time.perf_counter() - self.begun
