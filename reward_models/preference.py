"""A learned reward: the score that a Bradley-Terry head gives to a conversation with its reply.

`atp reward-model RECIPE... --out DIR` (`atp_rl/align/reward_model.py`) trains one on the preference pairs of an
alignment, so that what evolution does to a learned reward can be studied.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp_rl.types import InputError, Message
from reward_models.completions import Completion, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from atp_rl.model.chat import ChatFormat

CARD = "reward_model.json"
"""File of a reward model that says on which model it was trained: `base`, `revision`, `dtype`, `thinking`."""


class Preference:
    """A trained reward model: reads its directory when it is first asked."""

    def __init__(self, model: str | Path, batch_size: int = 64) -> None:
        """
        Args:
            model: directory that `atp reward-model` wrote.
            batch_size: conversations scored at once. With padding it may change a score's last digits.

        Raises:
            InputError: there is no reward model in it; found out from its card and the headers of its weights.
        """
        self.folder, self.batch_size = Path(model), batch_size
        self.card = read_card(self.folder)
        self.metrics: dict[str, float] = {}
        self.__name__ = "preference"  # TRL's name of the metric
        self._loaded: tuple[Any, ChatFormat] | None = None

    def __call__(
        self,
        prompts: Sequence[str | Sequence[Message]],
        completions: Sequence[Completion],
        options: Sequence[Sequence[str] | None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """The score of each reply, as log-odds: of two replies to a prompt the better one has the higher score.

        Args:
            prompts: conversations; a plain text is the message of a user.
            options: a row where they are None is another task's and gets None.
        """
        begun = time.perf_counter()
        wanted = [i for i in range(len(prompts)) if options is None or options[i] is not None]
        scores = self.scores([conversation(prompts[i], completions[i]) for i in wanted])
        self.metrics = {"seconds": time.perf_counter() - begun}
        of_row = dict(zip(wanted, scores, strict=True))
        return [of_row.get(i) for i in range(len(prompts))]

    def scores(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """The score of each conversation that ends with a reply; equal ones are scored once."""
        import torch

        model, chat = self._loaded = self._loaded or load(self.folder, self.card)
        rows = [tuple(conversation_ids(chat, messages)) for messages in conversations]
        different = sorted({*rows}, key=lambda row: (len(row), row))  # alike in length: little padding
        score_of: dict[tuple[int, ...], float] = {}
        for start in range(0, len(different), self.batch_size):
            batch = different[start : start + self.batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[*row, *[chat.pad_id] * (width - len(row))] for row in batch], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask).logits[:, 0]
            score_of |= dict(zip(batch, logits.float().tolist(), strict=True))
        return [score_of[row] for row in rows]


def conversation(prompt: str | Sequence[Message], completion: Completion) -> list[Message]:
    """The messages up to the reply, and the reply."""
    asked: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*asked, {"role": "assistant", "content": text_of(completion)}]


def conversation_ids(chat: ChatFormat, messages: Sequence[Message]) -> list[int]:
    """What the model reads, in training too: the conversation as the chat template renders it.

    Marks of the template in a text are broken up: no reply can end its own turn and praise itself in another role.
    """
    harmless = [{"role": m["role"], "content": chat.harmless(m["content"] or "")} for m in messages]
    rendered = chat.tokenizer.apply_chat_template(
        harmless, tokenize=True, return_dict=True, enable_thinking=chat.thinking
    )
    return list(rendered["input_ids"])


def read_card(folder: Path) -> dict[str, Any]:
    """What a reward model was trained on; raises InputError where there is no reward model."""
    from safetensors import safe_open

    from atp_rl.model.policy import check_adapter

    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
        known = {"base": str, "revision": str | None, "dtype": str, "thinking": bool}
        if card.keys() != known.keys() or not all(isinstance(card[key], kind) for key, kind in known.items()):
            raise ValueError(f"needs {', '.join(known)}")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder}: no reward model here ({CARD}: {error}); `atp reward-model RECIPE... --out DIR` trains one"
        ) from None
    check_adapter(folder, card["base"])
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        if not any(key.endswith("score.weight") for key in file.keys()):  # noqa: SIM118 - no mapping
            raise InputError(f"{folder}: the adapter has no score head, so it is no reward model")
    return card


def load_with_head(base: str, *, revision: str | None, dtype: str) -> PreTrainedModel:
    """A base model with a fresh head of one output in place of its language head, frozen, on this process's device.

    The head's first weights are drawn from torch's generator: seed it first.

    Raises:
        InputError: the model is not there, or its kind has no such head.
    """
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    from atp_rl.model.policy import base_path, load_chat

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # it would report that the head is new
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base_path(base),
            revision=revision,
            num_labels=1,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model {base!r} cannot be loaded with a score head: {error}") from None
    model.requires_grad_(False)
    model.config.pad_token_id = load_chat(base, revision=revision).pad_id  # the score is read before the first of them
    if torch.cuda.is_available():
        torch.nn.Module.cuda(model)
    return model


def load(folder: Path, card: Mapping[str, Any]) -> tuple[Any, ChatFormat]:
    """A trained reward model in evaluation mode, and the chat format that it reads."""
    from peft import PeftModel

    from atp_rl.model.policy import load_chat

    base = load_with_head(card["base"], revision=card["revision"], dtype=card["dtype"])
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{folder}: does not fit the base model {card['base']!r}: {error}") from None
    return model.eval(), load_chat(card["base"], revision=card["revision"], thinking=card["thinking"])
