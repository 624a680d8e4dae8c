"""vLLM in this process, beside the learner on the same GPU. Written from vLLM's documentation, not run (no GPU)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from atp_rl import ranks
from atp_rl.model.policy import Policy, base_path
from atp_rl.model.served import Answer, Question, TokenSampler
from atp_rl.types import InputError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM can make room for."""


class VllmSampler(TokenSampler):
    """An engine of vLLM's that is asleep (its base weights in main memory, its cache gone) while the policy learns."""

    def __init__(self, policy: Policy, *, revision: str | None, dtype: str, gpu_memory: float, seed: int) -> None:
        """Load the base model into a second engine, and hand over the policy's adapters.

        Args:
            gpu_memory: share of the GPU's memory that the engine may take while it is awake.

        Raises:
            InputError: vLLM is not installed, there are other processes, or it has no room for adapters of this rank.
        """
        super().__init__(policy)
        if ranks.world_size() > 1:
            raise InputError("`sampler.engine`: vllm runs in a single process; start one, or use a server")
        try:
            import vllm  # pyright: ignore[reportMissingImports]
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError(
                "`sampler.engine`: vllm is not installed; `pip install 'atp-rl[vllm]'` on a machine with a GPU"
            ) from None
        room = next((rank for rank in RANKS if rank >= policy.lora.r), None)
        if room is None:
            raise InputError(f"`model.lora.r`: vLLM takes adapters of rank {RANKS[-1]} at most; lower it")
        self._vllm, self._request = vllm, LoRARequest
        adapters = len(policy.live) + policy.has_aligned
        self.engine = vllm.LLM(
            model=base_path(policy.name),
            revision=revision,
            dtype=dtype,
            seed=seed,
            trust_remote_code=False,
            enable_lora=True,
            max_loras=adapters,
            max_cpu_loras=adapters + 1,
            max_lora_rank=room,
            logprobs_mode="processed_logprobs",  # after the temperature, as they were drawn
            gpu_memory_utilization=gpu_memory,
            enable_sleep_mode=True,
        )
        self._asleep, self._integer, self._requests = False, count(1), dict[str, Any]()
        self.sync(policy)

    def sync(self, policy: Policy) -> None:
        super().sync(policy)
        if not self._asleep:
            self.engine.sleep(level=1)  # level 2 would drop the base weights
            self._asleep = True

    def _load(self, name: str, folder: Path) -> None:
        self._requests[name] = self._request(name, next(self._integer), str(folder))  # it is read with the first prompt

    def _unload(self, name: str) -> None:
        del self._requests[name]  # the engine, which may be asleep now, forgets the one least used when it needs room

    def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        if self._asleep:
            self.engine.wake_up()
            self._asleep = False
        outputs = self.engine.generate(
            [{"prompt_token_ids": list(question.ids)} for question in questions],
            [self._params(question) for question in questions],
            lora_request=[self._requests[q.adapter] if q.adapter else None for q in questions],
            use_tqdm=False,
        )
        return [_answer(question, output) for question, output in zip(questions, outputs, strict=True)]

    def _params(self, question: Question) -> Any:
        if question.sampling is None:
            return self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        return self._vllm.SamplingParams(
            max_tokens=question.sampling.max_new_tokens,
            temperature=question.sampling.temperature,
            seed=question.seed,
            logprobs=1,
            ignore_eos=True,
            stop_token_ids=[self.chat.eos_id],
            detokenize=False,
        )


def _answer(question: Question, output: Any) -> Answer:
    if question.sampling is None:
        rest = question.ids[1:]
        listed = zip(output.prompt_logprobs[1:], rest, strict=True)
        return Answer(rest, tuple(entry[token].logprob for entry, token in listed))
    ids = tuple(output.outputs[0].token_ids)
    listed = zip(output.outputs[0].logprobs, ids, strict=True)
    return Answer(ids, tuple(entry[token].logprob for entry, token in listed))
