"""Chat services of text alone: models that nobody here can train, for evaluation and evolution in context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from atp_rl.model.served import number_of
from atp_rl.model.service import Service
from atp_rl.scenarios.actions import TOOL, parse_action
from atp_rl.types import Chat, Completion, InputError, Message, SamplingParams


class ApiSampler:
    """Answers with what a chat service writes: no tokens, no log-probabilities, and the service's own chat template."""

    version = 0
    chat = None

    def __init__(self, service: Service, model: str) -> None:
        self.service, self.model = service, model

    def generate(self, chats: Sequence[Chat], params: SamplingParams) -> list[Completion]:
        return self.service.each(lambda chat: self._reply(chat, params), chats)

    def score(self, chats: Sequence[Chat]) -> list[tuple[float, ...]]:
        """A service of text has no probabilities: nan for every option."""
        return [tuple(float("nan") for _ in chat.options) for chat in chats]

    def _reply(self, chat: Chat, params: SamplingParams) -> Completion:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": spoken(chat.messages),
            "max_completion_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "seed": number_of(chat.seed),  # the best a service can do; not all of them keep to it
        }
        if chat.tools:
            body["tools"] = list(chat.tools)
        raw = self.service.post("/chat/completions", body)
        try:
            (choice,) = _Chats.model_validate(raw).choices
        except (ValidationError, ValueError):
            raise InputError(
                f"{self.service.url}: the server's answer is no chat completion: {str(raw)[:200]}"
            ) from None
        return Completion(
            text=choice.message.text,
            token_ids=(),
            logprobs=(),
            stop_reason="length" if choice.finish_reason == "length" else "stop",
        )


def spoken(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a service takes them: a call of the tool, which is text here, is an entry of its own there."""
    converted: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        converted.append(dict(message))
        if message["role"] != "tool":
            continue
        call = f"call_{i}"
        converted[-1]["tool_call_id"] = call
        arguments = json.dumps({"code": parse_action(messages[i - 1]["content"]).code})
        asked = {"id": call, "type": "function", "function": {"name": TOOL, "arguments": arguments}}
        converted[-2] = {"role": "assistant", "content": "", "tool_calls": [asked]}
    return converted


class _Function(BaseModel):
    name: str
    arguments: str


class _Call(BaseModel):
    function: _Function


class _Message(BaseModel):
    content: str | None = None
    tool_calls: list[_Call] | None = None

    @property
    def text(self) -> str:
        """All of it as text, calls of tools in the form that `parse_action` reads."""
        calls = [f'{{"name": {json.dumps(c.function.name)}, "arguments": {c.function.arguments}}}' for c in self.calls]
        return "\n".join([*([self.content] if self.content else []), *calls])

    @property
    def calls(self) -> list[_Call]:
        return self.tool_calls or []


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Chats(BaseModel):
    """The part of an answer that is read."""

    choices: list[_Choice]
