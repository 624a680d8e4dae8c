"""Samplers for engines that hold weights of their own: they get every version of the adapters as files.

Token in, token out: an engine is sent the very tokens of a prompt and returns the tokens that it drew with their
log-probabilities; nothing is decoded and tokenised again. After every `sync` see `sync_probe.py`: an engine that kept
old weights must not go unnoticed.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from pydantic import BaseModel, ValidationError

from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import ALIGNED, Policy, adapter_tensors, write_adapter
from atp_rl.model.service import Service, StatusError
from atp_rl.scenarios import random_stream
from atp_rl.scenarios.choices import format_choice
from atp_rl.types import Chat, Completion, InputError, SamplingParams


class Question(NamedTuple):
    """What an engine is asked: to go on after these tokens, or (without `sampling`) how probable they are."""

    adapter: str | None
    """The name under which it was loaded; None is the bare base."""
    ids: tuple[int, ...]
    sampling: SamplingParams | None
    seed: int


class Answer(NamedTuple):
    """Tokens with their log-probabilities: those drawn, or those that were asked about from the second one on."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Loaded(NamedTuple):
    name: str
    weights: str
    """`Policy.adapter_hash` of what was written."""


class TokenSampler(ABC):
    """Draws replies from an engine that is sent the policy's adapters.

    Every version of an adapter has a name that was never used before, also by other runs: engines cache by name.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.version = policy, policy.version
        self.chat: ChatFormat = policy.chat
        self._tag, self._number = f"atp-{uuid.uuid4().hex[:8]}", count(1)
        self._folder = tempfile.TemporaryDirectory(prefix="atp_rl_adapters_")  # gone with this object
        self._loaded: dict[str, Loaded] = {}

    def sync(self, policy: Policy) -> None:
        """Hand over the adapters whose weights have changed, each under a new name, in place of the ones before."""
        self.policy, self.version = policy, policy.version
        for adapter in (*policy.live, *([ALIGNED] if policy.has_aligned else [])):
            before, weights = self._loaded.get(adapter), policy.adapter_hash(adapter)
            if before and before.weights == weights:
                continue
            if before:
                self._unload(before.name)
                shutil.rmtree(self._path(before.name))
            name = f"{self._tag}-{adapter}" + ("" if adapter == ALIGNED else f"-{next(self._number)}")
            config = policy.model.peft_config[adapter]
            assert isinstance(config, LoraConfig)
            self._path(name).mkdir()
            write_adapter(adapter_tensors(policy.model, adapter), config, policy.name, self._path(name))
            self._load(name, self._path(name))
            self._loaded[adapter] = Loaded(name, weights)

    def generate(self, chats: Sequence[Chat], params: SamplingParams) -> list[Completion]:
        questions = [
            Question(self._name(chat), tuple(chat.prompt_ids), params, seed=number_of(chat.seed)) for chat in chats
        ]
        return [
            Completion(
                text=self.chat.decode(answer.ids),
                token_ids=answer.ids,
                logprobs=answer.logprobs,
                stop_reason="stop" if answer.ids[-1] == self.chat.eos_id else "length",
            )
            for answer in self._ask(questions)
        ]

    def score(self, chats: Sequence[Chat]) -> list[tuple[float, ...]]:
        decisions = [
            (chat, (*self.chat.encode_text(format_choice(option)), self.chat.eos_id))
            for chat in chats
            for option in chat.options
        ]
        questions = [
            Question(self._name(chat), (*chat.prompt_ids, *decision), None, seed=0) for chat, decision in decisions
        ]
        totals = [
            sum(answer.logprobs[-len(decision) :])
            for answer, (_, decision) in zip(self._ask(questions), decisions, strict=True)
        ]
        scores = iter(totals)
        return [tuple(next(scores) for _ in chat.options) for chat in chats]

    def _name(self, chat: Chat) -> str | None:
        loaded = self._loaded.get(chat.player)
        return loaded.name if loaded else None  # of all players only `aligned` may have no adapter

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / name

    @abstractmethod
    def _load(self, name: str, folder: Path) -> None:
        """Make the adapter in `folder` known to the engine under `name`."""

    @abstractmethod
    def _unload(self, name: str) -> None: ...

    @abstractmethod
    def _ask(self, questions: Sequence[Question]) -> list[Answer]: ...


def number_of(seed: Sequence[int | str]) -> int:
    """A seed of 31 bits, which every engine takes, for one reply."""
    return int(random_stream(*seed).integers(2**31))


class ServedSampler(TokenSampler):
    """A server that speaks vLLM's protocol: `vllm serve --enable-lora`, started by the user (docs/samplers.md)."""

    def __init__(self, policy: Policy, service: Service, model: str) -> None:
        """Hand over the policy's adapters and find out whether the server can do what is needed.

        Args:
            model: the server's name of the base model.

        Raises:
            InputError: it is not there, serves another model, loads no adapters, or returns no tokens or probabilities.
        """
        super().__init__(policy)
        self.service, self.model = service, model
        check_model_is_served(service, model)
        self.sync(policy)
        trial = self.chat.encode([{"role": "user", "content": "Hello"}], [])
        chat = Chat([], trial, ("A",), (0,))
        self.generate([chat], SamplingParams(max_new_tokens=2))
        self.score([chat])

    def _load(self, name: str, folder: Path) -> None:
        try:
            self.service.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except StatusError as error:
            hint = (
                "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
                if error.status in (404, 405)
                else f"it must be able to read {folder.parent} (TMPDIR chooses where that is), and its --max-lora-rank "
                f"must be at least {self.policy.lora.r}"
            )
            raise InputError(f"the server loads no adapter: {hint}; {error}") from None

    def _unload(self, name: str) -> None:
        self.service.post("/unload_lora_adapter", {"lora_name": name})

    def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        return self.service.each(self._ask_one, questions)

    def _ask_one(self, question: Question) -> Answer:
        model = question.adapter or self.model
        body: dict[str, Any] = {"model": model, "prompt": question.ids, "return_token_ids": True}
        if question.sampling:
            body |= {
                "max_tokens": question.sampling.max_new_tokens,
                "temperature": question.sampling.temperature,
                "seed": question.seed,
                "logprobs": 1,
                # the plain distribution, whatever the model's generation_config.json would have
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                # what ends a reply here ends it there, and nothing else
                "ignore_eos": True,
                "stop_token_ids": [self.chat.eos_id],
            }
        else:
            body |= {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        at, raw = f"{self.service.url}: ", self.service.post("/completions", body)
        try:
            answered = _Completions.model_validate(raw)
            (choice,) = answered.choices
        except (ValidationError, ValueError):
            raise InputError(f"{at}the server's answer is no completion: {str(raw)[:200]}") from None
        if answered.model != model:
            raise InputError(f"{at}asked for the model {model!r}, the server answered as {answered.model!r}")
        if choice.token_ids is None or choice.prompt_token_ids is None:
            raise InputError(f"{at}the server returns no token ids (`return_token_ids`); vLLM does from 0.10.2 on")
        if tuple(choice.prompt_token_ids) != question.ids:
            raise InputError(f"{at}the server read other tokens than it was sent; is its --max-model-len too small?")
        if question.sampling:
            logprobs = choice.logprobs.token_logprobs if choice.logprobs else []
            if not choice.token_ids or len(logprobs) != len(choice.token_ids):
                raise InputError(
                    f"{at}{len(choice.token_ids)} tokens with {len(logprobs)} log-probabilities; the server must "
                    "return one for every token (`logprobs`)"
                )
            return Answer(tuple(choice.token_ids), tuple(logprobs))
        rest, listed = question.ids[1:], (choice.prompt_logprobs or [])[1:]
        if len(listed) != len(rest) or not all(e and str(t) in e for e, t in zip(listed, rest, strict=True)):
            raise InputError(f"{at}the server returns no log-probabilities of the prompt (`prompt_logprobs`)")
        return Answer(rest, tuple((entry or {})[str(token)].logprob for entry, token in zip(listed, rest, strict=True)))


def check_model_is_served(service: Service, model: str) -> None:
    """Raises InputError if there is no server, or it does not have this model."""
    try:
        names = [entry.id for entry in _Models.model_validate(service.get("/models")).data]
    except ValidationError:
        raise InputError(f"{service.url}: the server's list of models is none; correct `sampler.url`") from None
    if model not in names:
        raise InputError(
            f"{service.url}: the server has no model {model!r} but {', '.join(names) or 'none'}; set `sampler.model` "
            "to its name for the recipe's `model.name`, or start it with that"
        )


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class _Logprob(BaseModel):
    logprob: float


class _TokenLogprobs(BaseModel):
    token_logprobs: list[float]


class _Choice(BaseModel):
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _TokenLogprobs | None = None
    prompt_logprobs: list[dict[str, _Logprob] | None] | None = None


class _Completions(BaseModel):
    """The part of vLLM's answer that is read."""

    model: str
    choices: list[_Choice]
