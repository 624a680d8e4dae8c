"""The policy: frozen base weights, the frozen `aligned` adapter, and the live adapters that evolve.

There is one live adapter, `policy`; in a population there is one for every seat, named like the seat.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from atp_rl import ranks
from atp_rl.model.chat import ChatFormat
from atp_rl.model.mixture import BASE, mixture
from atp_rl.model.prefix_trees import Packed, pack
from atp_rl.model.shards import shard
from atp_rl.model.token_logprobs import token_logprobs
from atp_rl.model.training_templates import training_template
from atp_rl.types import InputError

TINY = "tiny"
"""The name of the model that ships with the package, in recipes and in adapters made on it."""

SHIPPED = {TINY: "tiny_weights", "tiny_tools": "tiny_tools"}
"""Models that ship with the package, and their folders: `tiny_tools` plays the testbed tool_use."""

Quantize = Literal["nf4"]

ALIGNED = "aligned"
"""The name of the anchor; live adapters have other names."""


def base_path(name: str) -> str:
    """Where a model is loaded from: the packaged weights of a shipped one, else the Hub id or directory itself."""
    return str(Path(__file__).parent / SHIPPED[name]) if name in SHIPPED else name


def load_chat(
    name: str, *, revision: str | None = None, thinking: bool = False, local_files_only: bool = False
) -> ChatFormat:
    """The tokenizer and the chat template of a model, or ours for a known one; those of an adapter are never read.

    Raises:
        InputError: the model is not there, or its template cannot be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base_path(name), revision=revision, trust_remote_code=False, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r} cannot be loaded: {error}") from None
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = training_template(tokenizer.chat_template) or tokenizer.chat_template
    return ChatFormat(tokenizer, thinking=thinking)


class ActedTokens(NamedTuple):
    """Log-probabilities of the tokens that a policy wrote, padded to the longest row."""

    logprobs: Tensor
    """[B, A] in nats; 0 where masked."""
    entropy: Tensor
    """[B, A] of the whole next-token distribution, in nats; no gradient."""
    mask: Tensor
    """[B, A] bool."""


class Policy:
    """Base weights shared by all LoRA adapters on one PEFT model.

    `aligned` is the anchor: every KL is measured to it and nothing ever trains it. Without an alignment adapter the
    anchor is the bare base model. The base weights are never merged into, so they stay bit-identical through a run.
    """

    def __init__(self, model: PeftModel, chat: ChatFormat, name: str) -> None:
        self.model, self.chat, self.name = model, chat, name
        self.version = 0
        self.forwards = self.tokens_read = 0
        """Through the model so far, outside of the sampler."""
        self.has_aligned = ALIGNED in model.peft_config
        self.live = tuple(adapter for adapter in model.peft_config if adapter != ALIGNED)
        self.model.eval()  # no dropout: sampling and learning see the same distribution
        self._layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._activate(self.live)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if not self.trainable:
            raise RuntimeError("the policy has no trainable parameter")

    @classmethod
    def load(
        cls,
        name: str,
        *,
        lora: LoraConfig,
        seed: int,
        aligned: Path | None = None,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        thinking: bool = False,
        quantize: Quantize | None = None,
        gradient_checkpointing: bool = False,
        seats: Sequence[str] = ("policy",),
        starts: Mapping[str, Path] | None = None,
    ) -> Policy:
        """Load the base and start the policy from the aligned adapter, or from a fresh one on the bare base.

        Args:
            name: `tiny`, a Hub id or a local directory.
            lora: shape of a fresh adapter; ignored when `aligned` is given.
            seed: of a fresh adapter's initial weights.
            aligned: directory of the adapter to start from and to anchor at.
            quantize: as in `load_base`.
            gradient_checkpointing: whether a forward that learns keeps the layers' inputs alone; not for mixtures.
            seats: names of the live adapters: the only one, or one for every seat of a population.
            starts: directories of the adapters that some of the seats start from instead.

        Raises:
            InputError: an adapter is malformed or belongs to another base model.
        """
        starts = starts or {}
        chat = load_chat(name, revision=revision, thinking=thinking)
        base = load_base(name, revision=revision, dtype=dtype, quantize=quantize)
        if gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model: PeftModel | None = None
        for adapter in (ALIGNED, *seats):
            start = aligned if adapter == ALIGNED else starts.get(adapter, aligned)
            if start is not None:
                model = _add_adapter(model or base, start, adapter, name)
            elif adapter != ALIGNED:
                set_seed(seed)
                if model is None:
                    model = get_peft_model(base, lora, adapter_name=adapter)
                else:
                    model.add_adapter(adapter, lora)
        assert isinstance(model, PeftModel)
        if ranks.wrapper() == "fsdp2" and ranks.world_size() > 1:
            shard(model)
        return cls(model, chat, name)

    @property
    def lora(self) -> LoraConfig:
        """The shape of the live adapters."""
        config = self.model.peft_config[self.live[0]]
        assert isinstance(config, LoraConfig)
        return config

    @property
    def device(self) -> torch.device:
        return self.trainable[0].device

    def parameters_of(self, adapter: str) -> list[torch.nn.Parameter]:
        """The trainable weights of one live adapter."""
        return [p for name, p in self.model.named_parameters() if p.requires_grad and f".{adapter}." in name]

    def by_key(self) -> dict[str, torch.nn.Parameter]:
        """The trainable weights themselves, by the names that `state` gives their copies."""
        return {
            f"{self._prefix(adapter)}{name.replace(f'.{adapter}.', '.')}": parameter
            for adapter in self.live
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and f".{adapter}." in name
        }

    def add_frozen(self, adapter: str) -> None:
        """Another adapter that never learns, for `acted_tokens(players=adapter)`; it starts as a copy of the live one.

        `set_frozen` gives it other weights.
        """
        if len(self.live) > 1:
            raise ValueError("a population has no single adapter to copy")
        self.model.add_adapter(adapter, copy.deepcopy(self.lora))
        self._activate(self.live)
        self.set_frozen(adapter, self.state())

    def set_frozen(self, adapter: str, state: Mapping[str, Tensor]) -> None:
        """Give a frozen adapter, never `aligned`, these weights in PEFT's own names."""
        if adapter == ALIGNED or adapter in self.live:
            raise ValueError(f"{adapter} must not be written to")
        set_peft_model_state_dict(self.model, dict(state), adapter_name=adapter)

    @contextmanager
    def using(self, which: str) -> Iterator[PeftModel]:
        """The model with one adapter active (`aligned` without one is the bare base).

        Gradients reach the only live adapter of a policy that is no population; for the others see `mixed`.
        """
        if (which,) == self.live:
            yield self.model
        elif which != ALIGNED or self.has_aligned:
            self._activate((which,))
            try:
                with torch.no_grad():
                    yield self.model
            finally:
                self._activate(self.live)
        else:
            with torch.no_grad(), self.model.disable_adapter():
                yield self.model

    def mixed(self, players: Sequence[str]) -> AbstractContextManager[None]:
        """While inside, row i of a forward goes through the adapter `players[i]`."""
        aligned = ALIGNED if self.has_aligned else BASE
        return mixture(self.model, [aligned if player == ALIGNED else player for player in players])

    def _activate(self, adapters: tuple[str, ...]) -> None:
        # PEFT makes whatever it activates trainable, so what does not learn is activated in inference mode
        tuner: Any = self.model.base_model
        tuner.set_adapter(list(adapters), inference_mode=adapters != self.live)

    def acted_tokens(
        self,
        rows: Sequence[Sequence[int]],
        acted: Sequence[Sequence[int]],
        *,
        players: str | Sequence[str] = "policy",
        temperature: float = 1.0,
    ) -> ActedTokens:
        """Log-probabilities of the tokens at positions `acted[i]` of `rows[i]`, each given all tokens before it.

        One forward for all rounds of an episode, and for all rows: what they share from their beginning is computed
        once. Logits are computed at acted positions alone.

        Args:
            rows: token ids, ragged.
            acted: positions (>= 1, ascending) of the tokens that the model wrote, ragged.
            players: the adapter of all rows, or of each.
            temperature: the logits are divided by it, as they were when the tokens were drawn.
        """
        recomputed = (
            self._recomputed() if isinstance(players, str) else nullcontext()
        )  # a mixture's hooks are gone then
        with recomputed:
            logits, packed = self._acted_logits(rows, acted, players)
        index, mask = packed.index.to(self.device), packed.mask.to(self.device)
        logprobs, entropy = token_logprobs(logits, packed.targets.to(self.device), temperature)
        return ActedTokens(logprobs[index].masked_fill(~mask, 0.0), entropy[index].masked_fill(~mask, 0.0), mask)

    def acted_distribution(
        self, rows: Sequence[Sequence[int]], acted: Sequence[Sequence[int]], players: str | Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, A, V] of every token where one was acted, in the model's type, and mask [B, A]; no gradient."""
        with torch.no_grad():
            logits, packed = self._acted_logits(rows, acted, players)
            return logits[packed.index.to(self.device)], packed.mask.to(self.device)

    def _acted_logits(
        self, rows: Sequence[Sequence[int]], acted: Sequence[Sequence[int]], players: str | Sequence[str]
    ) -> tuple[Tensor, Packed]:
        """Logits [Q, V] that predict the different tokens that were acted, and where each of them is."""
        single = isinstance(players, str)
        packed = pack(rows, acted, [players] * len(rows) if isinstance(players, str) else players)
        self.forwards += 1
        self.tokens_read += packed.ids.numel()
        base: Any = self.model.get_base_model()
        head = base.get_output_embeddings()
        if not single and isinstance(head, LoraLayer):
            raise ValueError("adapters of the output layer cannot be mixed in a batch; leave it out of target_modules")
        r, c = (place.to(self.device) for place in packed.places)
        picks = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][r, c].unsqueeze(0),))
        options: dict[str, Any] = {"input_ids": packed.ids.to(self.device), "use_cache": False}
        if packed.positions is not None and packed.sees is not None:
            hidden = torch.zeros(packed.sees.shape, dtype=base.dtype).masked_fill_(~packed.sees, float("-inf"))
            options |= {
                "position_ids": packed.positions.to(self.device),
                "attention_mask": hidden.unsqueeze(1).to(self.device),  # [R, 1, T, T]
            }
        try:
            with self.using(players) if isinstance(players, str) else self.mixed(packed.players):
                return self.model(**options).logits[0], packed
        finally:
            picks.remove()

    @contextmanager
    def _recomputed(self) -> Iterator[None]:
        """Transformers checkpoints layers in training mode alone; set on the layers themselves, no dropout comes on."""
        for layer in self._layers:
            layer.training = torch.is_grad_enabled()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.training = False

    def state(self) -> dict[str, Tensor]:
        """The weights of the live adapter in PEFT's own names; in a population with `<seat>/` before them."""
        return {
            f"{self._prefix(adapter)}{key}": value.detach().clone()
            for adapter in self.live
            for key, value in adapter_tensors(self.model, adapter).items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put saved weights of the live adapters back, exactly.

        Raises:
            InputError: they are not those of these adapters, which are left as they were.
        """
        shapes = {key: value.shape for key, value in state.items()}
        own = {key: value.shape for key, value in self.state().items()}
        if wrong := sorted(key for key in shapes.keys() | own.keys() if shapes.get(key) != own.get(key)):
            raise InputError(f"the checkpoint does not fit the adapter: missing, unexpected or reshaped {wrong[:3]}")
        for adapter in self.live:
            prefix = self._prefix(adapter)
            weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            set_peft_model_state_dict(self.model, weights, adapter_name=adapter)

    def _prefix(self, adapter: str) -> str:
        return "" if len(self.live) == 1 else f"{adapter}/"

    def save_adapter(self, folder: Path) -> None:
        """Write the live adapters so that plain PEFT loads them: to `folder`, or one in `<seat>` below it for each."""
        write_adapters(self.state(), self.lora, self.name, folder)

    def adapter_hash(self, which: str) -> str:
        """SHA-256 over an adapter's weights; of the word 'base' where the anchor is the bare model."""
        if which == ALIGNED and not self.has_aligned:
            return hashlib.sha256(b"base").hexdigest()
        return hash_tensors(adapter_tensors(self.model, which))

    def base_hash(self) -> str:
        """SHA-256 over the frozen base weights."""
        return hash_tensors({n: p for n, p in self.model.named_parameters() if "lora_" not in n})


def load_base(
    name: str, *, revision: str | None = None, dtype: str = "float32", quantize: Quantize | None = None
) -> PreTrainedModel:
    """The bare causal language model, from safetensors alone and without remote code.

    Args:
        quantize: `nf4` quantizes the linear layers, all but the last, while they are loaded (QLoRA, arXiv 2305.14314).

    Raises:
        InputError: it is not there.
    """
    transformers_logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    quantized: dict[str, Any] = {}
    if quantize:
        quantized["quantization_config"] = nf4_config(dtype)
        quantized["device_map"] = {"": torch.cuda.current_device() if cuda else "cpu"}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base_path(name),
            revision=revision,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            **quantized,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r} cannot be loaded: {error}") from None
    model.requires_grad_(False)
    if quantize:
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # else bitsandbytes packs the weights anew in the first forward on a CPU, and has no gradient for those
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - unknown to the type checker
        return model
    if cuda and not (ranks.world_size() > 1 and ranks.wrapper() in ("fsdp2", "zero3")):  # those move their shards alone
        torch.nn.Module.cuda(model)
    return model


def nf4_config(dtype: str) -> BitsAndBytesConfig:
    """Four bits a weight, computed with in `dtype`, and stored in tensors of it, as FSDP2 needs it."""
    kind = getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind,
        bnb_4bit_quant_storage=kind,
    )


def check_model(
    name: str, adapters: Sequence[Path], lora: LoraConfig, *, revision: str | None = None, thinking: bool = False
) -> None:
    """Find out whether a model, a fresh adapter and existing ones can be loaded, from configurations and headers alone.

    Raises:
        InputError: as loading them would.
    """
    load_chat(name, revision=revision, thinking=thinking)
    path = Path(base_path(name))
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise InputError(f"model {name!r} cannot be loaded: {path} holds no *.safetensors")
    try:
        for file in path.glob("*.safetensors") if path.is_dir() else ():
            with safe_open(file, framework="pt"):
                pass
        config = AutoConfig.from_pretrained(base_path(name), revision=revision, trust_remote_code=False)
        _empty_adapter(config, copy.deepcopy(lora))
    except Exception as error:
        raise InputError(f"model {name!r} with `model.lora` cannot be loaded: {error}") from None
    for adapter in adapters:
        check_adapter(adapter, name)
        try:
            expected = _empty_adapter(config, LoraConfig.from_pretrained(str(adapter)))
        except Exception as error:
            raise InputError(f"{adapter}: does not fit the base model {name!r}: {error}") from None
        found = load_file(adapter / "adapter_model.safetensors")
        shapes = {key: tuple(value.shape) for key, value in found.items()}
        if wrong := sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key)):
            raise InputError(f"{adapter}: does not fit the base model {name!r}: missing or reshaped {wrong[:3]}")
        if not all(tensor.isfinite().all() for tensor in found.values()):
            raise InputError(f"{adapter}: holds weights that are not finite")


def _empty_adapter(config: Any, lora: PeftConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that such an adapter has on such a model; nothing is allocated."""
    lora.base_model_name_or_path = None  # known to fit; PEFT would warn that it is spelt in another way
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config, trust_remote_code=False), lora)
    return {key: tuple(value.shape) for key, value in adapter_tensors(model, "default").items()}


def adapter_tensors(model: torch.nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of an adapter in PEFT's own names; not copied.

    By default PEFT asks the Hub about the base model each time, in case its embeddings belong to the adapter too.
    """
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes())
    return digest.hexdigest()


def _add_adapter(model: Any, folder: Path, adapter: str, base: str) -> PeftModel:
    """Load an adapter under a name, onto the bare base (which gives a PEFT model) or beside others."""
    check_adapter(folder, base)
    try:
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, str(folder), adapter_name=adapter, is_trainable=False)
        loaded = model.load_adapter(str(folder), adapter_name=adapter, is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{folder}: does not fit the base model {base!r}: {error}") from None
    if wrong := [*loaded.missing_keys, *loaded.unexpected_keys]:  # PEFT only warns
        raise InputError(f"{folder}: does not fit the base model {base!r}: missing or unexpected {wrong[:3]}")
    return model


def write_adapters(state: Mapping[str, Tensor], config: LoraConfig, base: str, folder: Path) -> None:
    """What `Policy.state` gives, as adapters that plain PEFT loads: `folder` is one, or `folder/<seat>` for each."""
    places: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        place, _, name = key.rpartition("/")
        places.setdefault(place, {})[name] = value
    for place, weights in places.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_adapter(weights, config, base, folder / place)


def read_adapters(folder: Path) -> dict[str, Tensor]:
    """The reverse of `write_adapters`: a `Policy.state`."""
    state = {}
    for file in sorted(folder.rglob("adapter_model.safetensors")):
        place = file.parent.relative_to(folder).as_posix()
        prefix = "" if place == "." else f"{place}/"
        state |= {f"{prefix}{key}": value for key, value in load_file(file).items()}
    return state


def write_adapter(state: Mapping[str, Tensor], config: LoraConfig, base: str, folder: Path) -> None:
    """`adapter_model.safetensors` and `adapter_config.json`, naming the base model they belong to."""
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / "adapter_model.safetensors")
    record = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    record |= {"base_model_name_or_path": base, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(record, indent=2, default=str) + "\n")


def _means(made_for: Any, base: str) -> bool:
    """Whether an adapter's base model is this one; of a directory it may hold a path from another folder."""
    path = Path(base_path(base)).absolute()
    if made_for in (base, base_path(base)):
        return True
    if not isinstance(made_for, str) or not path.is_dir():
        return False
    if os.path.isabs(made_for):
        return os.path.isdir(made_for) and os.path.samefile(made_for, path)
    end = tuple(part for part in Path(made_for).parts if part != "..")
    return bool(end) and path.parts[-len(end) :] == end


def check_adapter(folder: Path, base: str) -> None:
    """Refuse an adapter that is missing, malformed, not LoRA, or made for another base; reads headers only.

    Raises:
        InputError: with the reason.
    """
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file() or not weights.is_file():
        raise InputError(f"{folder}: no LoRA adapter here (needs adapter_config.json and adapter_model.safetensors)")
    try:
        config = json.loads(config_file.read_text("utf-8"))
        with safe_open(weights, framework="pt") as file:
            keys = list(file.keys())
    except Exception as error:
        raise InputError(f"{folder}: the adapter cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{folder}: the adapter cannot be read (adapter_config.json holds no object)")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder}: only LoRA adapters are supported, this one is {config.get('peft_type')!r}")
    if config.get("init_lora_weights") not in (None, True, False, "gaussian"):  # pissa and the like change the base
        raise InputError(f"{folder}: adapters with init_lora_weights={config['init_lora_weights']!r} are not supported")
    made_for = config.get("base_model_name_or_path")
    if not _means(made_for, base):
        raise InputError(f"{folder}: the adapter was made for the base model {made_for!r}, not for {base!r}")
    if not any("lora_A" in key for key in keys):
        raise InputError(f"{folder}: adapter_model.safetensors holds no LoRA weights")
