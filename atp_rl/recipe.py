"""Recipe: everything a run depends on, as strict typed data.

`load` merges YAML files and `key.sub=value` overrides from left to right (mappings merge, lists and plain values
replace), validates the result, and reports every problem in one line that names the source, the key and the fix.
The file is YAML 1.1 as OmegaConf reads it: `1e-4` is a number, a bare `no` is false; `${...}` is refused, so that a
recipe means the same on every machine. What needs slow imports (TRL's options, the defenses') is checked by
`check_trl_options` and `check_defenses`, which the stages and `--dry-run` call.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from atp_rl.types import InputError

RESERVED = frozenset({"output_dir", "seed", "data_seed", "report_to", "run_name", "resume_from_checkpoint"})
"""Options of TRL's trainers that atp_rl sets itself."""

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Lora(_Strict):
    """The adapter that is trained."""

    r: Count = 8
    """Rank."""
    alpha: Count = 16
    """Scale; the update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the adapter's input."""
    target_modules: Annotated[
        Annotated[Name, Tag("<word>")] | Annotated[list[Name], Tag("<list>")],
        Discriminator(lambda value: "<list>" if isinstance(value, list) else "<word>"),
    ] = "all-linear"
    """Layers that get an adapter: PEFT's `all-linear`, a regular expression, or a list of layer names."""


class Model(_Strict):
    """The base model."""

    name: Name = "tiny"
    """`tiny` (the embedded model), a Hub id, or a local directory."""
    revision: Name | None = None
    """Branch, tag or commit on the Hub; null is the default branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the base weights; with `quantize` of what is computed, and of the weights that are not quantized."""
    quantize: Literal["nf4"] | None = None
    """Keep the base's linear layers in four bits (bitsandbytes' NF4, doubly quantized), as in QLoRA; null is as is."""
    thinking: bool = False
    """Whether the chat template lets the model think before it answers."""
    lora: Lora = Lora()


class Probability(_Strict):
    """Supervision that sees each violation with one probability."""

    probability: Annotated[float, Field(ge=0, le=1)]
    """Chance that a violation is detected, per decision."""
    fine: PositiveOrZero = 0.0
    """Taken from the payoff of a detected violation, in the scenario's currency."""


Pattern = Literal[
    "alternating", "mostly_supervised", "mostly_unsupervised", "last_unsupervised", "last_supervised",
    "all_supervised", "all_unsupervised", "random",
]  # fmt: skip
Supervision = Annotated[
    Annotated[Pattern, Tag("<word>")] | Annotated[Probability, Tag("<mapping>")],
    Discriminator(lambda value: "<mapping>" if isinstance(value, dict | Probability) else "<word>"),
]


Factors = Annotated[list[float], Field(min_length=3, max_length=3)]
Thresholds = Annotated[
    Annotated[Count, Tag("<number>")] | Annotated[list[Count], Field(min_length=1), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<number>"),
]
FactorSets = Annotated[
    Annotated[Factors, Tag("<set>")] | Annotated[list[Factors], Field(min_length=1), Tag("<list>")],
    Discriminator(
        lambda value: "<list>" if isinstance(value, list) and value and isinstance(value[0], list) else "<set>"
    ),
]


class Collusion(_Strict):
    """The rules of the threshold game; what is left out is as in the paper's file, or as said here."""

    n: Annotated[int, Field(ge=2)] | None = None
    """Seats; 8 unless a file says otherwise."""
    threshold: Thresholds | None = None
    """Collective choices from which on the collusion succeeds (default 4); a list makes a grid."""
    rewards: FactorSets | None = None
    """Factors of a round, [high, normal, low] (default [1.4, 1.1, 0.8]); a list of such sets makes a grid."""
    reward_mode: Literal["multiplicative", "additive"] | None = None
    """A factor multiplies the capital (default), or a round adds (factor - 1) x the starting capital."""
    success: Literal["all", "collective"] | None = None
    """Who gets `high` when the collusion succeeds: all (default), or collective seats alone."""
    peer_history: Annotated[str, Field(pattern=r"^(full|final|counts|none|delayed\(\d+\))$")] | None = None
    """What a seat reads of the others: full, final, counts (default), none, or delayed(d)."""
    fixed: CountOrZero | None = None
    """So many seats, the last ones, do not learn (default 0)."""
    fixed_as: Literal["collective", "aligned"] | None = None
    """They always take the collective option (default), or the frozen aligned adapter plays them."""


class ToolUse(_Strict):
    """What is solved with the tool, and what it costs."""

    problems: Literal["reasoning_gym", "sums", "gsm8k"] | None = None
    """Generated ones (default), sums that the tiny model can do, or GSM8K from the Hub."""
    tool_cost: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of one round in which the tool was used, as a share of the pay for a right answer (default .4)."""
    calling: Literal["json", "template"] | None = None
    """How the tool is called: as JSON that the texts explain (default), or as the chat template has it."""


class Scenarios(_Strict):
    """What the agent is put through."""

    testbed: Name = "role_play"
    """Family of environments: role_play, collusion, tool_use, or one of your own."""
    paper: Name | None = None
    """Path of a data file of the paper; null uses this project's scenarios."""
    file: Name | None = None
    """Path of a file of scenarios (JSONL or YAML); excludes `paper`."""
    families: list[Name] | None = None
    """Families to draw from; null is all of them."""
    per_family: Count = 8
    """Scenarios per family, and in a grid per cell of it."""
    allowed: bool = False
    """Whether the rule allows the tempting option too: the control for over-compliance."""
    rounds: Count = 1
    """Decisions of every seat in an episode."""
    history_window: CountOrZero = 5
    """Past rounds that stay in the prompt."""
    supervision: Supervision = "all_unsupervised"
    """A pattern over the rounds, or a mapping with `probability` and `fine`."""
    collusion: Collusion | None = None
    """Rules of the game, for the testbed `collusion`."""
    tool_use: ToolUse | None = None
    """For the testbed `tool_use`."""

    @field_validator("file")
    @classmethod
    def _one_origin(cls, file: str | None, info: ValidationInfo) -> str | None:
        if file is not None and info.data.get("paper") is not None:
            raise ValueError("excludes `scenarios.paper`; set one of the two to null")
        return file


class RobustAlign(_Strict):
    """What makes alignment by GRPO last longer (`atp_rl/align/robust.py`)."""

    entropy: Positive | None = None
    """Weight of the replies' mean entropy (nats) in the loss, which GRPO then lowers (after TokenBuncher)."""
    frpo_lambda: Positive | None = None
    """Weigh samples by exp(-advantage / this), as for the worst policy in a KL ball (FRPO); its source takes 1."""

    @model_validator(mode="after")
    def _does_something(self) -> RobustAlign:
        if self.entropy is None and self.frpo_lambda is None:
            raise ValueError("needs `entropy` or `frpo_lambda`, e.g. {entropy: 1.0}; null is plain GRPO")
        return self


class Align(_Strict):
    """Alignment before evolution, by one of TRL's trainers."""

    method: Literal["dpo", "grpo", "sft"] | None = None
    """The trainer; needed unless `adapter` is given."""
    per_family: Count = 16
    """Training scenarios per family."""
    rounds: Count = 1
    """Decisions per training scenario."""
    tries: Count = 5
    """Attempts to draw a chosen and a rejected answer for one scenario."""
    max_new_tokens: Count = 24
    """Longest answer of a pair, in tokens."""
    adapter: Name | None = None
    """Directory of an aligned adapter to use as it is; training is skipped."""
    trl: dict[str, Any] = {}
    """Options of TRL's config for this method, passed verbatim."""
    robust: RobustAlign | None = None
    """For the method grpo; null is none."""

    @field_validator("robust")
    @classmethod
    def _has_rewards(cls, robust: RobustAlign | None, info: ValidationInfo) -> RobustAlign | None:
        if robust and info.data.get("method", "grpo") != "grpo":
            raise ValueError("works on sampled replies, as only grpo has; set `align.method` to grpo, or this to null")
        twice = {"entropy_coef", "use_adaptive_entropy"} & {*info.data.get("trl", {})}
        if robust and robust.entropy and twice:
            raise ValueError(f"sets the entropy's weight, and so does `align.trl.{min(twice)}`; leave one of them out")
        return robust

    @model_validator(mode="after")
    def _trains_or_loads(self) -> Align:
        if self.method is None and self.adapter is None:
            raise ValueError("needs `align.method` (dpo, grpo or sft), or `align.adapter` to skip training")
        return self


class Deviants(_Strict):
    """Seats of a population that start from another adapter than the aligned one."""

    count: Count
    """So many seats, the first ones."""
    adapter: Name
    """Directory of the adapter that they start from, e.g. a checkpoint of a run that has tipped."""


class Imitation(_Strict):
    """Whom a seat copies, and how much."""

    peers: Literal["all", "ring", "random"] = "all"
    """Everybody, the two beside it on a ring, or its neighbours in a random graph."""
    degree: Positive = 3.0
    """Mean number of neighbours in the random graph."""
    weight: Positive = 1.0
    """Of the imitation loss beside the policy gradient."""


class RewardModel(_Strict):
    """How `atp reward-model` trains one, on pairs made as `align` says."""

    trl: dict[str, Any] = {}
    """Options of TRL's RewardConfig, passed verbatim."""


POPULATIONS = ("population", "imitation")
"""Learners with one adapter for every seat."""


class MonitorOptions(_Strict):
    """What the reward model `monitor` sees, and how often it is wrong."""

    kind: Literal["action", "text"] = "action"
    """Reads the decision (action), or all but the decision (text)."""
    recall: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Chance that what it sees is flagged."""
    false_alarm: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a reply in which it sees nothing is flagged all the same."""


class PreferenceOptions(_Strict):
    """The reward model `preference`."""

    model: Name
    """Directory that `atp reward-model` wrote."""
    batch_size: Count = 64
    """Conversations that are scored at once."""


class JudgeOptions(_Strict):
    """The reward model `judge`: a model behind an OpenAI-compatible API."""

    url: Annotated[str, Field(pattern="^https?://")]
    """Root of the API, e.g. http://127.0.0.1:8000/v1."""
    model: Name
    """The model's name there."""
    api_key_env: Name | None = None
    """Name of the environment variable that holds the key; null sends none."""
    requests_per_minute: Positive | None = None
    """Questions are sent no faster than this; null is as fast as they are answered."""
    max_requests: Count | None = None
    """Most questions that are ever sent for this `cache`; when they are spent the run stops. Null is no limit."""
    max_tokens: Count | None = None
    """Stop when the service has counted so many tokens, as with `max_requests`; null is no limit."""
    cache: Name | None = None
    """File (SQLite) of the answers and of what was spent; null is `judge.sqlite` in the run directory."""
    timeout_s: Positive = 120.0
    """Longest that one request may take, in seconds."""
    concurrency: Count = 16
    """Requests under way at once."""


class RewardOptions(_Strict):
    """Options of the reward models in `evolve.rewards` that have any."""

    monitor: MonitorOptions | None = None
    """Null is an action monitor that never errs."""
    preference: PreferenceOptions | None = None
    """Needed for `preference`."""
    judge: JudgeOptions | None = None
    """Needed for `judge`."""


class Evolve(_Strict):
    """Self-evolution on the payoff: the process under study."""

    learner: Literal["policy_gradient", "population", "imitation", "in_context"] = "policy_gradient"
    """What learns: one adapter for all seats (policy_gradient), one for each seat from its own payoffs (population) and
    from what paid its peers (imitation), or nothing but the history in the prompt (in_context)."""
    start_from: Name = "aligned"
    """`aligned` (the align stage's adapter), `base` (the bare model), or the path of an adapter directory."""
    steps: Annotated[CountOrZero, Field(validate_default=True)] = 0
    """Policy updates; needed for policy_gradient, 0 for in_context."""
    scenarios_per_step: Count = 16
    """Scenarios drawn per step, each played by one group."""
    group_size: Count = 8
    """Episodes per scenario that share a baseline; at least 2 for policy_gradient."""
    learning_rate: Positive = 1e-4
    """AdamW's learning rate after warm-up."""
    updates_per_step: Count = 1
    """Optimiser updates on the same episodes."""
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """torch's AdamW, or bitsandbytes' with its state in eight bits and in memory that moves to the host when scarce."""
    micro_batch: Count | None = None
    """Rows per forward pass (memory only, never the result); null is all at once."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping what it made (memory only, never the result)."""
    clip_epsilon: Positive = 0.2
    """Half-width of the clip of the probability ratio."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that divides the advantages: the group's, the batch's, or none."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """How token losses are averaged; the names are TRL's."""
    weight_decay: PositiveOrZero = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this L2 norm."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up of the learning rate."""
    max_new_tokens: Count = 24
    """Longest reply, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    rewards: Annotated[dict[Name, float], Field(min_length=1)] = {"payoff": 1.0}
    """Entries of `reward_models` and their weights in the sum."""
    reward_options: Annotated[RewardOptions, Field(validate_default=True)] = RewardOptions()
    """Options of those that have any, by name."""
    deviants: Deviants | None = None
    """Seats that start from another adapter, for learners with one adapter a seat; null is none."""
    imitation: Imitation | None = None
    """For the learner `imitation`; null is its defaults."""

    @field_validator("reward_options")
    @classmethod
    def _belong_to_rewards(cls, options: RewardOptions, info: ValidationInfo) -> RewardOptions:
        given, rewards = {name for name, value in options if value is not None}, info.data.get("rewards")
        if rewards is None:  # they are wrong themselves
            return options
        if unused := sorted(given - rewards.keys()):
            raise ValueError(
                f"has {unused[0]}, which is not in `evolve.rewards`; add it there, or leave its options out"
            )
        if open_ := sorted(({"preference", "judge"} & rewards.keys()) - given):
            raise ValueError(
                {
                    "preference": "needs preference.model for `evolve.rewards.preference`: a directory that "
                    "`atp reward-model RECIPE... --out DIR` wrote",
                    "judge": "needs judge.url and judge.model for `evolve.rewards.judge`",
                }[open_[0]]
            )
        return options

    @field_validator("gradient_checkpointing")
    @classmethod
    def _can_recompute(cls, wanted: bool, info: ValidationInfo) -> bool:
        if wanted and info.data.get("learner") in POPULATIONS:
            raise ValueError(
                "works for one adapter; a batch that mixes adapters cannot be computed again: set it to false"
            )
        return wanted

    @field_validator("imitation")
    @classmethod
    def _is_used(cls, imitation: Imitation | None, info: ValidationInfo) -> Imitation | None:
        if imitation and info.data.get("learner") != "imitation":
            raise ValueError("is for the learner imitation alone; set `evolve.learner` to imitation, or leave it out")
        return imitation

    @field_validator("deviants")
    @classmethod
    def _has_seats(cls, deviants: Deviants | None, info: ValidationInfo) -> Deviants | None:
        if deviants and info.data.get("learner") not in POPULATIONS:
            raise ValueError("needs a learner with one adapter a seat: `evolve.learner` population or imitation")
        return deviants

    @field_validator("steps")
    @classmethod
    def _steps_fit(cls, steps: int, info: ValidationInfo) -> int:
        learner = info.data.get("learner", "in_context")
        if learner != "in_context" and steps == 0:
            raise ValueError(f"must be at least 1 for learner {learner}; set the number of policy updates")
        if learner == "in_context" and steps != 0:
            raise ValueError(
                "must be 0 for learner in_context, which updates no weights; set `scenarios.rounds` instead"
            )
        return steps

    @field_validator("group_size")
    @classmethod
    def _has_a_baseline(cls, size: int, info: ValidationInfo) -> int:
        learner = info.data.get("learner", "in_context")
        if learner != "in_context" and size == 1:
            raise ValueError(f"must be at least 2 for learner {learner}: one episode has no baseline")
        return size


class Sampler(_Strict):
    """Who answers the chats."""

    engine: Literal["hf", "server", "vllm", "api"] = "hf"
    """The policy itself in this process (hf), vLLM beside it (vllm), a server that speaks vLLM's protocol and is sent
    the adapters (server), or a chat service of text alone, for evolution in context from the base (api)."""
    mode: Literal["free", "choice"] = "free"
    """Token by token (free), or the decision drawn from the exact probabilities of the options (choice, for hf)."""
    url: Annotated[str, Field(pattern="^https?://")] | None = None
    """Root of the API of the engines server and api, e.g. http://127.0.0.1:8000/v1."""
    model: Name | None = None
    """The model's name at `url`; null is `model.name`."""
    api_key_env: Name | None = None
    """Name of the environment variable that holds the key for `url`; null sends none."""
    timeout_s: Positive = 120.0
    """Longest that one request to `url` may take, in seconds."""
    concurrency: Count = 64
    """Requests to `url` under way at once."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.45
    """Share of the GPU's memory that the engine vllm may take while it is awake."""

    @model_validator(mode="after")
    def _fits_the_engine(self) -> Sampler:
        remote = self.engine in ("server", "api")
        if self.mode == "choice" and self.engine != "hf":
            raise ValueError(f"has the engine {self.engine}, which draws token by token; set `sampler.mode` to free")
        if remote and self.url is None:
            raise ValueError(f"needs `sampler.url` for the engine {self.engine}, e.g. http://127.0.0.1:8000/v1")
        if not remote and (set_ := [key for key in ("url", "model", "api_key_env") if getattr(self, key)]):
            raise ValueError(
                f"has `{set_[0]}`, but the engine {self.engine} asks no server; set `engine`, or leave it out"
            )
        if self.engine == "api" and self.model is None:
            raise ValueError("needs `sampler.model` for the engine api: the model's name at the service")
        return self


class DefenseSpec(_Strict):
    """One defense: its name, and its own options beside it."""

    model_config = ConfigDict(extra="allow")

    name: Name
    """An entry of `atp_rl.defenses.DEFENSES`."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


Defense = Annotated[
    DefenseSpec,
    BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v, json_schema_input_type=str | DefenseSpec),
]


class Evaluate(_Strict):
    """How checkpoints are measured."""

    every: Count = 5
    """Steps between two evaluations for the report."""
    per_family: Count = 8
    """Scenarios per held-out family; of held-in ones there are about as many in all."""
    samples: Count = 1
    """Episodes per scenario."""
    rounds: Count | None = None
    """Decisions per episode; null is `scenarios.rounds`."""
    supervision: Supervision | None = None
    """As in `scenarios`; null is `scenarios.supervision`."""
    gate_per_family: Count = 2
    """Scenarios per family of the gate suite, played after every step."""
    batch_size: Count = 256
    """Conversations that are played at once, in training too (memory only, never the result)."""


class Track(_Strict):
    """Where metrics go besides the run directory."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Mode of Weights & Biases; `auto` goes by whether it is installed and logged in."""
    project: Name = "atp_rl"
    """W&B project."""
    group: Name | None = None
    """W&B group: the study this run belongs to."""
    tags: list[Name] = []
    """W&B tags."""
    artifacts: Literal["none", "last", "all"] = "last"
    """Adapters that W&B keeps as versions of an artifact: none, the last checkpoint's, or every checkpoint's."""


def _check_keep(value: Any) -> Any:
    if value != "all" and (type(value) is not int or value < 1):
        got = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
        raise ValueError(f"must be all, or how many of the last checkpoints stay (1 or more), got {got}")
    return value


class Run(_Strict):
    """Where the run lives."""

    dir: Name = "runs/default"
    """Run directory; refused if already used, unless resuming."""
    name: Name | None = None
    """What tables call this run (its arm); null is the directory's name."""
    keep: Annotated[Literal["all"] | Count, BeforeValidator(_check_keep)] = "all"
    """Checkpoints that stay on disk: `all`, or so many of the last ones (a resume needs the last)."""


class Recipe(_Strict):
    """One run of atp_rl: model, scenarios, alignment, evolution, defenses and how they are measured."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Root of every random draw of the run."""
    model: Model = Model()
    scenarios: Scenarios = Scenarios()
    align: Align | None = None
    """Null skips alignment."""
    reward_model: RewardModel = RewardModel()
    evolve: Evolve | None = None
    """Null skips evolution."""
    sampler: Sampler = Sampler()
    defenses: list[Defense] = []
    """Applied in this order; a bare name is short for `{name: ...}`."""
    evaluate: Evaluate = Evaluate()
    track: Track = Track()
    run: Run = Run()

    @field_validator("evolve")
    @classmethod
    def _has_a_start(cls, evolve: Evolve | None, info: ValidationInfo) -> Evolve | None:
        if evolve and evolve.start_from == "aligned" and info.data.get("align", "invalid") is None:
            raise ValueError(
                "starts from the aligned adapter, but there is no `align`; add it, or set `evolve.start_from` to base"
            )
        return evolve

    @field_validator("sampler")
    @classmethod
    def _needs_no_weights(cls, sampler: Sampler, info: ValidationInfo) -> Sampler:
        align, evolve = info.data.get("align"), info.data.get("evolve")
        if sampler.engine == "api" and "evolve" in info.data:
            if evolve is None or (evolve.learner, evolve.start_from) != ("in_context", "base"):
                raise ValueError(
                    "has the engine api, whose weights nobody can change; set `evolve.learner` to in_context, "
                    "`evolve.steps` to 0 and `evolve.start_from` to base"
                )
            if align is not None:
                raise ValueError("has the engine api, which cannot be aligned; set `align` to null")
        return sampler


def load(args: Sequence[str]) -> Recipe:
    """The recipe that these YAML files and `key.sub=value` overrides give together; later ones win.

    Raises InputError with one line per problem: those of unreadable sources, or else those of the merged recipe.
    """
    merged, notes, problems = OmegaConf.create(), list[tuple[str, str]](), list[str]()
    for arg in args:
        is_override = "=" in arg and not os.path.isfile(arg)
        source = f"override `{arg}`" if is_override else arg
        try:
            key, value = _read_override(arg) if is_override else ("", read_mapping(arg))
            if not is_override and value and "arms" in value and not Recipe.model_fields.keys() & value.keys():
                raise InputError(f"is a study, not a recipe; `atp study {arg}` runs it")
            notes += [(noted, source) for noted in _walk(value, key)]
            if is_override:
                OmegaConf.update(merged, key, value)
            else:
                merged = OmegaConf.merge(merged, value)
        except GrammarParseError as error:  # `${` that is not even well-formed interpolation
            problems.append(
                f"{source}: `{error.full_key}` holds `${{`: interpolation is not supported; write the value"
            )
        except yaml.YAMLError as error:
            mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", error)
            where = f", line {mark.line + 1}" if mark else ""
            problems.append(f"{source}: not valid YAML{where}: {' '.join(str(what).split())}")
        except (InputError, OmegaConfBaseException, ValueError, TypeError) as error:
            problems.append(f"{source}: {' '.join(str(error).split())}")
    if not problems:
        try:
            return Recipe.model_validate(OmegaConf.to_container(merged))
        except ValidationError as error:
            problems = [problem(detail, notes) for detail in error.errors()]
    raise InputError("\n".join(problems)) from None


def replaced_defenses(args: Sequence[str]) -> list[str]:
    """Where a file among these arguments of `load` replaces the defenses of an earlier one, as a line each.

    Nothing is said where an override sets all defenses afterwards, or where the later list is empty.
    """
    lines, owner, there = list[str](), "", list[Any]()
    for arg in args:
        if "=" in arg and not os.path.isfile(arg):
            if arg.startswith("defenses="):
                lines, there = [], []
            continue
        new = (read_mapping(arg) or {}).get("defenses")
        if not isinstance(new, list):
            continue
        if there and new and new != there:
            names = ", ".join(str(spec.get("name") if isinstance(spec, dict) else spec) for spec in there)
            both = yaml.safe_dump([*there, *new], default_flow_style=True, sort_keys=False, width=math.inf).strip()
            lines.append(
                f"{arg} replaces the defenses {names} of {owner}; to combine them write both into one list: "
                f'"defenses={both}"'
            )
        owner, there = arg, new
    return lines


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included; it loads back to an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump()))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors and the reference page."""
    return Recipe.model_json_schema()


def check_trl_options(method: str, options: Mapping[str, Any]) -> None:
    """Raise InputError unless TRL's config for this method has these options, with such types. Imports TRL: slow."""
    config, key = trl_config_class(method), trl_key(method)
    problems = [f"`{key}.{o}` is set by atp_rl; remove it" for o in options if o in RESERVED]
    free = {option: value for option, value in options.items() if option not in RESERVED}
    _, wrong = _options(config, free, at=key, of=f"trl.{config.__name__}", hidden=RESERVED)
    if problems + wrong:
        raise InputError("\n".join(problems + wrong))


def trl_config_class(method: str) -> Any:
    """TRL's config for a method of alignment, or for `reward`, a reward model. Imports TRL: slow."""
    import trl

    return {"dpo": trl.DPOConfig, "grpo": trl.GRPOConfig, "sft": trl.SFTConfig, "reward": trl.RewardConfig}[method]


def trl_key(method: str) -> str:
    """Where a recipe holds TRL's options for it."""
    return "reward_model.trl" if method == "reward" else "align.trl"


def check_defenses(specs: Sequence[DefenseSpec], evolve: Evolve | None = None) -> list[Any]:
    """The defenses that these specs build, for this evolution. Imports torch: slow.

    Raises:
        InputError: unknown names, bad options, defenses that do not fit each other or the evolution.
    """
    from atp_rl.defenses import DEFENSES, Plan

    built, problems = [], []
    for i, spec in enumerate(specs):
        at = f"defenses[{i}]"
        if spec.name not in DEFENSES:
            problems.append(f"`{at}.name`: unknown defense '{spec.name}'{_did_you_mean(spec.name, DEFENSES)}")
            continue
        options, wrong = _options(DEFENSES[spec.name], spec.options, at=at, of=spec.name)
        try:
            built += [] if wrong else [DEFENSES[spec.name](**options)]
        except (TypeError, ValueError) as error:
            wrong.append(f"`{at}` ({spec.name}): {error}")
        problems += wrong
    if problems:
        raise InputError("\n".join(problems))
    for defense in built:
        defense.beside(built)
        if evolve:
            defense.suits(
                Plan(
                    population=evolve.learner in POPULATIONS,
                    imitates=evolve.learner == "imitation",
                    from_base=evolve.start_from == "base",
                )
            )
    return built


def _options(
    cls: Any, values: Mapping[str, Any], *, at: str, of: str, hidden: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Values checked against the fields of a dataclass: those that fit, and what is wrong with the others."""
    known = {field.name for field in dataclasses.fields(cls) if field.init} - set(hidden)
    types = typing.get_type_hints(cls, include_extras=True)
    options, wrong = {}, []
    for option, value in values.items():
        if option not in known:
            wrong.append(f"unknown option `{at}.{option}` of {of}{_did_you_mean(option, known)}")
            continue
        try:  # by way of JSON, because there strict still takes a list for a tuple
            options[option] = TypeAdapter(types[option]).validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as error:
            first = error.errors()[0]  # of a union, there is one for each of its branches
            place = [part for part in first["loc"] if isinstance(part, int)]
            wrong.append(f"`{_dotted(at, option, *place)}` {_explain(first)}")
    return options, wrong


def read_mapping(path: str) -> Any:
    """What a YAML file of keys holds. Raises InputError, and yaml's own errors where it is not YAML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        there = {p.stem: p for p in Path(path).parent.glob("*.yaml")}
        near = _nearest(Path(path).stem, there)
        hint = f"did you mean {there[near]}?" if near else "give a YAML file, or an override `key.sub=value`"
        raise InputError(f"no such recipe file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"not a readable UTF-8 text file: {error}") from None
    if not isinstance(yaml.compose(text, yaml.SafeLoader), yaml.MappingNode | None):
        raise InputError("must be a mapping of recipe keys (like `seed: 0`), not a list or a single value")
    return OmegaConf.to_container(OmegaConf.create(text))


def _read_override(arg: str) -> tuple[str, Any]:
    key, text = arg.split("=", 1)
    if not re.fullmatch(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*|\[\d+\])*", key):
        raise InputError("neither a file nor an override; write `key.sub=value` or `defenses[0].option=value`")
    if not text.strip():
        raise InputError(f"no value for `{key}`; write `{key}=null` for none")
    if "${" in text:
        raise InputError(f"`{key}`: interpolation is not supported; write the value")
    value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    return key, value["value"]


def _walk(value: Any, key: str) -> Iterator[str]:
    """Every dotted key from `key` down; refuses values that OmegaConf would replace by others."""
    if isinstance(value, str) and ("${" in value or value == "???"):
        feature = "interpolation" if "${" in value else "a value left open"
        raise InputError(f"`{key}` is '{value}': {feature} is not supported; write the value")
    yield key
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise InputError(f"`{_dotted(key, str(name))}`: a key must be a string; put it in quotes")
            yield from _walk(inner, _dotted(key, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _walk(inner, _dotted(key, i))


def problem(error: Any, notes: Sequence[tuple[str, str]], *, of: type[BaseModel] = Recipe) -> str:
    """One of pydantic's errors about an `of` as one line: source, key, what was expected and the fix.

    Args:
        notes: every key that was set, and the source that set it.
    """
    loc = [p for p in error["loc"] if not str(p).startswith("<")]  # <...>: branch of a union
    key, owners = _dotted(*loc), [_dotted(*loc[:n]) for n in range(len(loc), 0, -1)]  # itself, its parent, ...
    setters = [[s for noted, s in notes if re.match(rf"{re.escape(o)}([.\[]|$)", noted)] for o in owners]
    source = next((found[-1] for found in setters if found), "recipe")
    if error["type"] != "extra_forbidden":
        return f"{source}: `{key}` {_explain(error)}"
    parent, _, name = key.rpartition(".")
    leaves = {k: k.rpartition(".")[2] for k in _keys(of)}
    siblings = {leaf: k for k, leaf in leaves.items() if k == _dotted(parent, leaf)}
    near = siblings.get(_nearest(name, siblings) or "") or next((k for k, leaf in leaves.items() if leaf == name), None)
    hint = f"did you mean `{near}`?" if near else f"known are {', '.join(siblings)}"
    return f"unknown key `{key}` in {source}; {hint}"


def _explain(error: Any) -> str:
    kind, value = error["type"], error["input"]
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    expected = {
        "int_type": "must be an integer", "float_type": "must be a number", "string_type": "must be a string",
        "bool_type": "must be true or false", "list_type": "must be a list", "dict_type": "must be a mapping",
        "model_type": "must be a mapping",
    }.get(kind) or re.sub(r"^\w+ should ", "must ", error["msg"].removesuffix(" after validation, not 0"))  # fmt: skip
    got = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    message = f"{expected}, got {got if len(got) < 80 else got[:76] + '...'}"
    if kind == "literal_error" and isinstance(value, str):
        near = _nearest(value, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
        return message + (f"; did you mean '{near}'?" if near else "")
    if kind == "string_type" and isinstance(value, bool | int | float):
        return message + "; put it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+.\de]+", value):
        return message + "; remove the quotes"
    return message


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe."""

    def models(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for argument in typing.get_args(annotation):
            yield from models(argument)

    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in models(field.annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _dotted(*parts: str | int) -> str:
    return re.sub(r"^\.", "", "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts if p != ""))


def _nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = _nearest(word, known)
    return f"; did you mean `{near}`?" if near else f"; known are {', '.join(sorted(known))}"
