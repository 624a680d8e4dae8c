"""Reads finished and interrupted runs back. The plain files of a run directory are the truth, and this is their shape.

A run directory holds one run; a multi-run directory holds several below it and lists them in the `arms` of its
`summary.json`. What does not have the shape below raises InputError that names file, line and field.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic reads no other one before Python 3.12

from atp_rl.types import InputError, Scenario, Verdict

T = TypeVar("T")
SplitName = Literal["held_out", "held_in", "deployed"]


class RateFields(TypedDict):
    """`stats.Rate` or `diffusion.Estimate` as JSON."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Verdicts(TypedDict):
    violation: RateFields
    compliance: RateFields
    invalid: RateFields


class FactFields(NamedTuple):
    """`evaluator.FactRates` as JSON."""

    rate: RateFields
    by_round: list[RateFields]


class RecollusionFields(TypedDict):
    by_lag: list[RateFields]
    after_first: RateFields
    after_broken: RateFields
    by_seat: RateFields


class PassageFields(TypedDict):
    median: RateFields
    mean: RateFields
    horizon: float | None
    events: int


class RecoveryFields(TypedDict):
    again: PassageFields
    back: PassageFields


class ImitationFields(TypedDict):
    coefficient: RateFields
    own: RateFields
    reason: str | None


class SpreadFields(TypedDict):
    """`diffusion.SpreadResult` as JSON."""

    games: int
    clusters: int
    recollusion: RecollusionFields
    first_success: PassageFields
    first_tipped: PassageFields
    recovery: RecoveryFields
    tipped_recovery: RecoveryFields
    imitation: ImitationFields


class SettingFields(Verdicts):
    """One cell of a grid."""

    by_round: list[Verdicts]
    facts: NotRequired[dict[str, FactFields]]
    spread: SpreadFields | None


class Split(Verdicts):
    """What one checkpoint did on one split of the scenarios; runs of older versions lack the last four."""

    violation_bounds: tuple[float | None, float | None]
    over_compliance: RateFields | None
    payoff_mean: float
    """As a share of the best payoff."""
    propensity: float | None
    answer_mass: float | None
    kl_to_aligned: float | None
    """Nats per reply."""
    kl_at_decision: NotRequired[float | None]
    scenarios: int
    by_family: dict[str, Verdicts]
    by_round: list[Verdicts]
    by_supervision: dict[str, Verdicts]
    by_seat: NotRequired[dict[str, Verdicts]]
    by_setting: NotRequired[dict[str, SettingFields]]
    facts: NotRequired[dict[str, FactFields]]
    spread: NotRequired[SpreadFields | None]


class Evaluation(TypedDict):
    """One line of `evaluations.jsonl`; one of the splits may be missing."""

    step: int
    suite: str
    learner: str
    splits: dict[SplitName, Split]


class SummaryRates(TypedDict):
    violation_rate: float | None
    ci_low: float | None
    ci_high: float | None
    invalid_rate: float | None
    n: int


class DeployedFields(TypedDict):
    """The held-out rates with the defenses that go with the policy, at the first and the last checkpoint."""

    aligned: SummaryRates
    final: SummaryRates


class CrossingFields(TypedDict):
    """`stats.Crossing` as JSON."""

    step: int | None
    censored_at: int


TimeTo = TypedDict("TimeTo", {"0.10": CrossingFields, "0.25": CrossingFields, "0.50": CrossingFields})


class Summary(TypedDict):
    """`summary.json` of one run."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    name: str
    seed: int
    model: str
    testbed: str
    aligned: SummaryRates
    final: SummaryRates
    deployed: NotRequired[DeployedFields]
    tipped: bool
    tipping_step: int | None
    time_to: TimeTo
    """By violation rate."""
    auvc: NotRequired[float]
    """Area under the violation curve, in [0, 1]; missing without steps, and in runs of older versions."""
    decay_kind: NotRequired[Literal["none", "erosion", "tipping"]]
    steps: int
    wall_seconds: float
    complete: bool


class TurnFields(TypedDict):
    """One reply of a stored episode."""

    seat: str
    round: int
    text: str
    choice: str | None
    verdict: Verdict | None
    """None where it called a tool."""
    payoff: float
    detected: bool
    supervised: bool | None
    player: NotRequired[str]
    ruled: NotRequired[bool]
    facts: NotRequired[dict[str, Any]]


class EpisodeFields(TypedDict):
    """One line of a file of `episodes/`."""

    scenario: Scenario
    sample: int
    messages: dict[str, list[dict[str, str]]]
    """By seat; role and content."""
    turns: list[TurnFields]
    version: int


_SUMMARY, _EVALUATION, _EPISODE = TypeAdapter(Summary), TypeAdapter(Evaluation), TypeAdapter(EpisodeFields)


@dataclass(frozen=True)
class RunRecord:
    """One run as it was read; episodes are large and are read when asked for."""

    path: Path
    summary: Summary
    evaluations: list[Evaluation]
    metrics: list[dict[str, Any]]
    recipe: str
    """Text of the resolved recipe."""
    notes: tuple[str, ...]
    """What was left out, e.g. the last line of a file whose run was interrupted."""

    @property
    def split(self) -> SplitName:
        """The split that curves are drawn of: held-out scenarios wherever they were played."""
        return "held_out" if any("held_out" in e["splits"] for e in self._reports()) else "held_in"

    @property
    def curve(self) -> list[tuple[int, Split]]:
        """(step, what was measured on `split`) of every checkpoint of the report suite, by step; never empty."""
        measured = {e["step"]: e["splits"][self.split] for e in self._reports() if self.split in e["splits"]}
        return sorted(measured.items(), key=lambda item: item[0])

    @property
    def deployed(self) -> list[tuple[int, Split]]:
        """As `curve`, with the defenses that go with the policy; empty where there are none."""
        measured = {e["step"]: e["splits"]["deployed"] for e in self._reports() if "deployed" in e["splits"]}
        return sorted(measured.items(), key=lambda item: item[0])

    @property
    def learner(self) -> str:
        return self._reports()[-1]["learner"]

    @property
    def seats(self) -> list[str]:
        """Those that were measured at the last checkpoint, seat 2 before seat 10."""

        def numbers(seat: str) -> list[tuple[str, int]]:
            return [(word, int(number or -1)) for word, number in re.findall(r"(\D*)(\d*)", seat)]

        return sorted(self.curve[-1][1].get("by_seat", {}), key=numbers)

    @property
    def deviants(self) -> list[str]:
        """The seats that started from another adapter than the aligned one."""
        spec = self.setting("evolve", "deviants", "count")
        return self.seats[:spec] if isinstance(spec, int) else []

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """What the run raised an alarm about, e.g. that a step was rolled back."""
        source = self.path / "alerts.jsonl"
        return _jsonl(source, []) if source.exists() else []

    def setting(self, *keys: str) -> Any:
        """What the recipe says under `keys`; None where it says nothing."""
        try:
            found = yaml.safe_load(self.recipe)
        except yaml.YAMLError as error:
            raise InputError(f"{self.path / 'recipe.yaml'}: not YAML ({' '.join(str(error).split())})") from None
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def episode_steps(self) -> list[int]:
        """Steps whose episodes were stored."""
        return sorted(self._episode_files())

    def episodes(self, step: int) -> list[EpisodeFields]:
        """The stored episodes of this step in their order: those that `split` was measured on where there are any."""
        return self._read_episodes(self._episode_files()[step])

    def _read_episodes(self, path: Path) -> list[EpisodeFields]:
        try:
            text = gzip.decompress(path.read_bytes()).decode("utf-8")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as gzipped JSON lines ({error})") from None
        places = ((f"{path}, line {i}", line) for i, line in enumerate(_lines(text), 1))
        return [_check(_EPISODE, _parse(line, where), where) for where, line in places]

    def decisions(self, step: int, split: SplitName) -> dict[str, list[tuple[float, TurnFields]]]:
        """By scenario, of each decision that the rate of this split counts, 1 for a violation and 0 for any other.

        Empty where the episodes were not stored, or are not those that the rate was measured on.
        """
        path = self.path / "episodes" / f"step_{step:04d}_{split}.jsonl.gz"
        if split == self.split and not path.exists():
            path = self._episode_files().get(step, path)
        measured = {e["step"]: e["splits"][split] for e in self._reports() if split in e["splits"]}
        if step not in measured or not path.exists():
            return {}
        cells: dict[str, list[tuple[float, TurnFields]]] = {}
        for episode in self._read_episodes(path):
            for turn in episode["turns"]:
                if turn["verdict"] is not None and turn.get("ruled", True) and turn.get("player") != "aligned":
                    cell = cells.setdefault(episode["scenario"].id, [])
                    cell.append((float(turn["verdict"] == "violation"), turn))
        return cells if sum(map(len, cells.values())) == measured[step]["violation"]["n"] else {}

    def _episode_files(self) -> dict[int, Path]:
        """By step, of `step_0010_held_out.jsonl.gz`, `step_0010.jsonl.gz` and `step_0010_train.jsonl.gz` the best."""
        files: dict[int, Path] = {}
        for name in ("_train", "", f"_{self.split}"):
            for path in (self.path / "episodes").glob(f"step_*{name}.jsonl.gz"):
                if match := re.fullmatch(rf"step_(\d+){name}\.jsonl\.gz", path.name):
                    files[int(match[1])] = path
        return files

    def _reports(self) -> list[Evaluation]:
        return [e for e in self.evaluations if e["suite"] == "report"]


def load_run(path: str | Path) -> RunRecord:
    """The run in this directory; `metrics.jsonl` may be missing where no step was taken."""
    path = Path(path)
    notes: list[str] = []
    summary = _check(_SUMMARY, _parse(_text(path / "summary.json"), path / "summary.json"), path / "summary.json")
    source = path / "evaluations.jsonl"
    evaluations = [_check(_EVALUATION, e, f"{source}, line {i}") for i, e in enumerate(_jsonl(source, notes), 1)]
    if not any(e["suite"] == "report" and e["splits"] for e in evaluations):
        raise InputError(f"{source}: holds no evaluation of the report suite")
    source = path / "metrics.jsonl"
    metrics = _jsonl(source, notes) if summary["steps"] or source.exists() else []
    return RunRecord(path, summary, evaluations, metrics, _text(path / "recipe.yaml"), tuple(notes))


def expand(paths: Iterable[str | Path]) -> list[RunRecord]:
    """The runs in these directories, each once, with the members of multi-run directories in place of these."""
    members: dict[Path, Path] = {}
    for path in map(Path, paths):
        source = path / "summary.json"
        summary = _parse(_text(source), source)
        arms = summary.get("arms", [{"dir": "."}])
        if not isinstance(arms, list) or not all(isinstance(a, dict) and isinstance(a.get("dir"), str) for a in arms):
            raise InputError(f"{source}: every entry of `arms` must name the directory of its run in `dir`")
        for arm in arms:
            members.setdefault((path / arm["dir"]).resolve(), path / arm["dir"])
    if not members:
        raise InputError("no runs to read; give at least one run directory")
    return [load_run(member) for member in members.values()]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        if (mark := path.parent / "interrupted").exists():
            raise InputError(f"{path.parent}: is not finished; {mark.read_text('utf-8').strip()}") from None
        raise InputError(f"{path}: no such file; is {path.parent} the directory of a finished run?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _jsonl(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; a last line cut off by an interruption is dropped with a note."""
    text = _text(path)
    lines = _lines(text)
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(_parse(line, f"{path}, line {number}"))
        except InputError:
            if number < len(lines) or text.endswith("\n"):
                raise
            notes.append(f"{path.name}: its last line ({number}) is cut off and was left out")
    return parsed


def _lines(text: str) -> list[str]:
    """Lines as JSON Lines means them: unlike `splitlines`, a U+2028 that a model wrote does not end one."""
    return text.removesuffix("\n").split("\n") if text else []


def _parse(text: str, where: str | Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _check(adapter: TypeAdapter[T], value: Any, where: str | Path) -> T:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}: `{'.'.join(map(str, first['loc']))}`: {first['msg'].lower()}") from None
