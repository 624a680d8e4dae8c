"""What alignment's methods and reward models share: TRL's options, one training from the bare base, checks, saving."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from atp_rl import ranks
from atp_rl.model.policy import Quantize, adapter_tensors, hash_tensors, load_base, load_chat, write_adapter
from atp_rl.recipe import check_trl_options, trl_config_class, trl_key
from atp_rl.tracking.progress import Report, progress, silent
from atp_rl.types import InputError

Metrics = dict[str, Any]

# TRL 1.16 calls activation checkpointing by its old name
warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing", category=FutureWarning)


Method = Literal["sft", "dpo", "grpo", "reward"]
"""`reward` trains a reward model; the others align."""


@dataclass(frozen=True)
class Training:
    """How an adapter is trained on the bare base, whatever the method."""

    base: str
    """`tiny`, a Hub id or a local directory, as in `Policy.load`; so are the options of the model below."""
    out: Path
    """Directory of the adapter."""
    lora: LoraConfig
    trl_options: Mapping[str, Any]
    """Of TRL's config for the method."""
    seed: int
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    thinking: bool = False
    quantize: Quantize | None = None
    at_step: Callable[[], None] = lambda: None
    """Called after every step, on every process; what it raises ends the training."""

    def config(self, method: Method) -> Any:
        """As `trl_config`."""
        return trl_config(method, self.trl_options, out=self.out, seed=self.seed, thinking=self.thinking)

    def load_base(self) -> PreTrainedModel:
        return load_base(self.base, revision=self.revision, dtype=self.dtype, quantize=self.quantize)


def trl_config(method: Method, trl_options: Mapping[str, Any], *, out: Path, seed: int, thinking: bool) -> Any:
    """TRL's config for `method`: our defaults, overridden by `trl_options`.

    TRL's own defaults turn bf16 and checkpointing on, cut sequences at 1024 tokens and silently drop longer prompts;
    here the hardware decides, and nothing is cut unless the options say so.

    Raises:
        InputError: unknown or reserved option, or a value that TRL refuses.
    """
    check_trl_options(method, trl_options)

    cuda = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,
        "save_strategy": "no",
        "disable_tqdm": True,  # `_Progress` shows it
    }
    if method == "grpo":
        defaults["chat_template_kwargs"] = {"enable_thinking": thinking}
    else:
        defaults["max_length"] = None
    try:
        return trl_config_class(method)(
            output_dir=str(out), seed=seed, data_seed=seed, report_to="none", **defaults | dict(trl_options)
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"`{trl_key(method)}` for {method}: {error}") from None


def fit(
    trainer_class: type,
    rows: Sequence[Mapping[str, Any]],
    config: Any,
    training: Training,
    *,
    load: Callable[[], PreTrainedModel] | None = None,
    **arguments: Any,
) -> Metrics:
    """Train a fresh adapter on the base model and write it to `training.out`, with TRL's log as `training.jsonl`.

    The trainer gets the base and a LoRA config, never a model that has an adapter, so its reference policy is the base.

    Args:
        rows: the training set, in the format of `trainer_class`.
        config: as `training.config` makes it.
        load: makes the model to train, in place of `training.load_base`.
        arguments: further ones of `trainer_class`.

    Returns:
        `train_loss` (TRL's mean over the steps), `steps`, `seconds`, `trainable_parameters` and `adapter_sha256` (the
        `Policy.adapter_hash` of the adapter once it is loaded).

    Raises:
        InputError: no rows; or training left the adapter as it was, or not finite.
    """
    import datasets

    out = training.out
    if not rows:
        raise InputError(f"there is nothing to train on; what was dropped, and why, is in {out}/statistics.json")
    if config.disable_tqdm:
        datasets.disable_progress_bars()
    begun = time.perf_counter()
    set_seed(config.seed)  # before the adapter is made: its first weights are random
    trainer = trainer_class(
        model=(load or training.load_base)(),
        args=config,
        train_dataset=datasets.Dataset.from_list([dict(row) for row in rows]),
        processing_class=load_chat(training.base, revision=training.revision, thinking=training.thinking).tokenizer,
        peft_config=copy.deepcopy(training.lora),  # PEFT writes into it
        **arguments,
    )
    trainer.remove_callback(PrinterCallback)  # the log goes to a file instead
    shown = ExitStack()
    trainer.add_callback(_Progress(trainer_class.__name__, shown, training.at_step))
    trainer.add_callback(_Wrapped(trainer))
    if set(trainer.model.peft_config) != {"default"} or getattr(trainer, "ref_model", None) is not None:
        raise RuntimeError("the trainer's reference policy is not the base model")
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if trainable == 0:
        raise RuntimeError("the adapter has no trainable parameter")
    before = hash_tensors(_single(adapter_tensors(trainer.model, "default")))
    with shown:
        result = trainer.train()
    adapter = _single(_trained(trainer))
    if not all(tensor.isfinite().all() for tensor in adapter.values()):
        raise InputError("training diverged: the adapter is not finite; lower `learning_rate` in the options of TRL")
    if hash_tensors(adapter) == before:
        raise InputError(
            "training changed nothing: no step was taken, the learning rate was 0, or (grpo) the replies to a prompt "
            "always got the same reward, as those of a model do that never answers in the format"
        )
    if ranks.is_first():
        out.mkdir(parents=True, exist_ok=True)
        write_adapter(adapter, trainer.model.peft_config["default"], training.base, out)
        (out / "training.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history))
    return {
        "train_loss": result.training_loss,
        "steps": result.global_step,
        "seconds": time.perf_counter() - begun,
        "trainable_parameters": trainable,
        "adapter_sha256": hash_tensors(adapter),
    }


def _single(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """In single precision, as PEFT loads it; on a quantized base TRL trains it in bf16."""
    return {name: tensor.float() for name, tensor in adapter.items()}


def _trained(trainer: Any) -> dict[str, Any]:
    """The adapter after training, whole on every rank also where FSDP or ZeRO-3 has spread it over them."""
    if ranks.wrapper() not in ("fsdp2", "zero3"):
        return adapter_tensors(trainer.model, "default")
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # on the first rank; empty on the others
    adapter = get_peft_model_state_dict(trainer.model, state_dict=whole, adapter_name="default") if whole else {}
    return ranks.from_first(lambda: {key: value.cpu() for key, value in adapter.items()})


WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPModule",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


class _Wrapped(TrainerCallback):
    """Looks, before the first step, whether the model is spread as the launcher asked: a plain one would train too."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        wanted = WRAPPERS.get(ranks.wrapper())
        kinds = [kind.__name__ for kind in type(self.trainer.model_wrapped).__mro__]
        if wanted is not None and wanted not in kinds:
            raise RuntimeError(
                f"alignment was launched with {ranks.wrapper()}, but the model is a {kinds[0]} and no {wanted}"
            )


class _Progress(TrainerCallback):
    """Shows the steps of a trainer as every other stage shows its own, and calls `at_step`; ends with `until`."""

    def __init__(self, label: str, until: ExitStack, at_step: Callable[[], None]) -> None:
        self.label, self.until, self.at_step = label, until, at_step
        self.report: Report = silent
        self.news = ""

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        self.report = self.until.enter_context(progress(state.max_steps, self.label))

    def on_log(self, args, state, control, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.news = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args, state, control, **_: Any) -> None:
        self.report(state.global_step, self.news)
        self.at_step()
