"""The plain way of playing: transformers' `generate`, with every prompt read from its first token in every round."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atp_rl.model.policy import Policy
from atp_rl.types import Chat, Completion, SamplingParams


class GenerateSampler:
    """All chats that it is given go through one `generate`, padded on the left.

    It reports no log-probabilities, takes the model without PEFT's outer wrapper (the adapter is active all the same)
    and draws from torch's global generator: all of it saves work that the sampler of `atp_rl` does.
    """

    version = 0

    def __init__(self, policy: Policy) -> None:
        self.chat, self.model, self.device = policy.chat, policy.model.get_base_model(), policy.device

    def generate(self, chats: Sequence[Chat], params: SamplingParams) -> list[Completion]:
        pad, eos = self.chat.pad_id, self.chat.eos_id
        width = max(len(chat.prompt_ids) for chat in chats)
        pads = [width - len(chat.prompt_ids) for chat in chats]
        ids = [[*[pad] * n, *chat.prompt_ids] for n, chat in zip(pads, chats, strict=True)]
        written = self.model.generate(  # pyright: ignore[reportCallIssue]  # torch types what a module lacks as a tensor
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in pads], device=self.device),
            do_sample=True,
            temperature=params.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=params.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=eos,
        )[:, width:].tolist()
        completions = []
        for row in written:
            reply = row[: row.index(eos) + 1] if eos in row else row
            stop = "stop" if eos in row else "length"
            completions.append(Completion(self.chat.decode(reply), tuple(reply), (), stop))
        return completions

    def score(self, chats: Sequence[Chat]) -> list[tuple[float, ...]]:
        raise NotImplementedError
