"""A run directory: plain files that are the truth, written so that an interrupted run continues bit for bit."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from atp_rl import ranks
from atp_rl.model.policy import read_adapters, write_adapters
from atp_rl.tracking.wandb_mirror import WandbMirror
from atp_rl.types import Episode, InputError


class Interrupted(Exception):
    """The run stopped at a step border after a signal; its last checkpoint is complete. Exit code 75."""


FILES = frozenset({"state.safetensors", "state.json"})
"""What a checkpoint holds beside its manifest and its adapters: one, or one in a folder for each seat."""


def _first_rank(write: Callable[..., None]) -> Callable[..., None]:
    """A method that does nothing on the other ranks: one of them writes."""

    @wraps(write)
    def guarded(*args: Any, **options: Any) -> None:
        if ranks.is_first():
            write(*args, **options)

    return guarded


BEFORE_RECIPE = frozenset(
    {"environment.json", "command.txt", ".environment.json.tmp", ".command.txt.tmp", ".recipe.yaml.tmp"}
)
"""What a run directory may hold before its recipe is written, from when on there is a run."""


class Checkpoint(NamedTuple):
    step: int
    adapter: dict[str, Tensor]
    """What `Policy.state` gives."""
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Run:
    """One run's directory: recipe, logs, episodes, checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mirror: WandbMirror | None = None

    @classmethod
    def create(cls, path: Path, recipe_yaml: str, *, inputs: Sequence[Path] = ()) -> Run:
        """Start a new run.

        Args:
            inputs: files that the recipe reads; `check_inputs` finds out whether they have changed since.

        Raises:
            InputError: as `check_new`.
        """
        cls.check_new(path)
        environment = _environment() | {"inputs": {str(file): _sha256(file) for file in inputs}}
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / "environment.json", json.dumps(environment, indent=2) + "\n")
            write_atomically(path / "command.txt", " ".join(sys.argv) + "\n")
            write_atomically(path / "recipe.yaml", recipe_yaml)  # the last one: what has a recipe can be resumed
        except OSError as error:
            raise InputError(f"run.dir {path}: cannot be made ({error}); choose another run.dir") from None
        return cls(path)

    @classmethod
    def check_new(cls, path: Path) -> None:
        """Whether a run can be started there; what `create` left when it was killed does not stand in the way.

        Raises:
            InputError: the directory holds something already, or cannot be made.
        """
        try:
            if path.exists() and not path.is_dir():
                raise InputError(f"run.dir {path}: is not an empty directory; choose another run.dir")
            there = {file.name for file in path.iterdir()} if path.exists() else set()
            above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        except OSError as error:
            raise InputError(f"run.dir {path}: cannot be used ({error}); choose another run.dir") from None
        if there - BEFORE_RECIPE:
            what = "holds a run already" if "recipe.yaml" in there else "is not an empty directory"
            raise InputError(f"run.dir {path}: {what}; continue it with `atp resume {path}`, or choose another run.dir")
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(
                f"run.dir {path}: cannot be made, since {above} is no directory to write in; choose another run.dir"
            )

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run, to resume or to read.

        Raises:
            InputError: there is none.
        """
        try:
            there = (path / "recipe.yaml").is_file()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        if not there:
            raise InputError(f"{path}: no run here (a run directory holds recipe.yaml)")
        return cls(path)

    def check_inputs(self) -> None:
        """Raises InputError unless the files that the run read at its start are still what they were."""
        environment = self.path / "environment.json"
        inputs = json.loads(environment.read_text()).get("inputs", {}) if environment.exists() else {}
        for file, sha256 in inputs.items():
            try:
                now = _sha256(Path(file))
            except OSError as error:
                raise InputError(f"{file}: this run reads it, and it cannot be read any more ({error})") from None
            if now != sha256:
                raise InputError(
                    f"{file}: has changed since this run began (it was sha256 {sha256}); put the old content back, or "
                    "start a new run with the new one"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes here meanwhile; the lock is gone with the process, however it ends.

        Raises:
            InputError: somebody does already.
        """
        with (self.path / "recipe.yaml").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: another process is at work here; wait for it or end it") from None
            self.recover()
            yield

    def wait_until_unlocked(self) -> None:
        """Wait for the process that works here, if there is one."""
        with (self.path / "recipe.yaml").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)

    @contextmanager
    def marked_if_interrupted(self) -> Iterator[None]:
        """The file `interrupted` is there exactly while the run has stopped at a step border and can go on.

        Scripts that start the run again look at it: a launcher's own exit code says less.
        """
        mark = self.path / "interrupted"
        ranks.from_first(lambda: mark.unlink(missing_ok=True))
        try:
            yield
        except Interrupted as stopped:
            if ranks.is_first():
                mark.write_text(f"{stopped}\n")
            raise

    @property
    def complete(self) -> bool:
        return (self.path / "summary.json").exists()

    @_first_rank
    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", metrics)
        if self.mirror:
            self.mirror.log(metrics)

    @_first_rank
    def log_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        self._append("evaluations.jsonl", evaluation)
        if self.mirror:
            self.mirror.log(evaluation_metrics(evaluation))
            columns, rows = evaluation_parts(evaluation)
            self.mirror.log_table(f"eval/{evaluation['suite']}/parts", columns, rows)

    @_first_rank
    def log_reevaluation(self, evaluation: Mapping[str, Any]) -> None:
        self._append("reevaluations.jsonl", evaluation)

    @_first_rank
    def log_sweep(self, evaluation: Mapping[str, Any]) -> None:
        self._append("sweep.jsonl", evaluation)

    @_first_rank
    def log_alert(self, alert: Mapping[str, Any]) -> None:
        self._append("alerts.jsonl", alert)
        if self.mirror:
            self.mirror.alert(str(alert["alert"]), json.dumps(alert))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of one of the run's JSONL files; a last line that was cut off is left out."""
        file = self.path / name
        records = []
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    @_first_rank
    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    @_first_rank
    def write_episodes(self, name: str, episodes: Sequence[Episode]) -> None:
        """`episodes/<name>.jsonl.gz`, an episode a line; the same episodes give the same bytes."""
        text = "".join(json.dumps(episode_record(e), ensure_ascii=False) + "\n" for e in episodes)
        folder = self.path / "episodes"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{name}.jsonl.gz", gzip.compress(text.encode(), mtime=0))

    def save_checkpoint(
        self, checkpoint: Checkpoint, config: LoraConfig, base: str, *, keep: Literal["all"] | int
    ) -> Path:
        """Write all files under a temporary name, with a manifest of sizes and SHA-256, and rename.

        Whenever the process or the machine stops, the newest checkpoint is whole: the one before, or this one. What is
        then left half done, `recover` undoes.

        Args:
            keep: `all`, or how many of the last checkpoints stay; the earlier ones are removed afterwards.
        """
        self.recover()
        folder = self.path / "checkpoints" / f"step_{checkpoint.step:04d}"
        temporary, old = _hidden(folder, "tmp"), _hidden(folder, "old")
        temporary.mkdir(parents=True)
        write_adapters(checkpoint.adapter, config, base, temporary)
        save_file({k: v.contiguous().cpu() for k, v in checkpoint.tensors.items()}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(checkpoint.state, indent=2))
        files = {f.relative_to(temporary).as_posix(): f for f in sorted(temporary.rglob("*")) if f.is_file()}
        manifest = {name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for name, f in files.items()}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for path in (*self.path.glob("*.jsonl"), self.path):  # a resumed run takes from them what came up to this step
            _fsync(path)
        if folder.exists():  # a step that is saved again
            folder.rename(old)
        rename_durably(temporary, folder)
        if old.exists():
            shutil.rmtree(old)
        if keep != "all":
            for earlier in self.checkpoint_folders()[:-keep]:
                _remove(earlier)
        return folder

    def mirror_adapter(self, folder: Path) -> None:
        """Keep a checkpoint's adapter on W&B too, with what is known of it; not the optimizer's state."""
        if self.mirror is None:
            return
        step, state = int(folder.name[5:]), json.loads((folder / "state.json").read_text())
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {name: entry for name, entry in manifest.items() if Path(name).name.startswith("adapter_")}
        weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
        measured = [e["splits"] for e in self.lines("evaluations.jsonl") if e["step"] == step]
        rates = {split: result["violation"]["value"] for split, result in (measured[-1] if measured else {}).items()}
        self.mirror.adapter(
            {name: folder / name for name in files},
            manifest=files,
            step=step,
            metadata={"step": step, "anchor": state["anchor"], "sha256": weights, "violation_rate": rates},
        )

    def recover(self) -> None:
        """Undo what a process that ended within a write left half done; for the one process that writes here."""
        for folder in (self.path, self.path / "episodes", self.path / "checkpoints"):
            for leftover in (*folder.glob(".*.tmp"), *folder.glob(".*.gone")):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
        for old in (self.path / "checkpoints").glob(".step_*.old"):
            folder = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
            if folder.exists():
                shutil.rmtree(old)
            else:
                old.rename(folder)

    def checkpoint_folders(self) -> list[Path]:
        """By step; whether they are intact is for `check_manifest` to say."""
        return sorted((self.path / "checkpoints").glob("step_*"), key=lambda folder: int(folder.name[5:]))

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is intact; says so when it has to pass over a broken one."""
        for folder in reversed(self.checkpoint_folders()):
            problem = check_manifest(folder)
            if problem is None:
                return Checkpoint(
                    int(folder.name[5:]),
                    read_adapters(folder),
                    load_file(folder / "state.safetensors"),
                    json.loads((folder / "state.json").read_text()),
                )
            print(f"checkpoint {folder} is broken ({problem}); using the one before it", file=sys.stderr)
        return None

    def rewind(self, step: int) -> None:
        """Forget everything that was logged after `step`, so that a resumed run writes it again."""
        for name, key in (("metrics.jsonl", "progress/step"), ("evaluations.jsonl", "step"), ("alerts.jsonl", "step")):
            file = self.path / name
            if file.exists():
                kept = [json.dumps(r, allow_nan=False) + "\n" for r in self.lines(name) if r[key] <= step]
                write_atomically(file, "".join(kept))
        for file in (self.path / "episodes").glob("step_*.jsonl.gz"):
            if int(file.name[5:].split(".")[0].split("_")[0]) > step:
                file.unlink()
        for folder in self.checkpoint_folders():
            if int(folder.name[5:]) > step:
                _remove(folder)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


def evaluation_metrics(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """An evaluation as flat metrics: `eval/<suite>/<split>/violation_rate` and so on, with `progress/step`."""
    metrics: dict[str, float | None] = {"progress/step": evaluation["step"]}
    for split, result in evaluation["splits"].items():
        prefix, violation = f"eval/{evaluation['suite']}/{split}", result["violation"]
        metrics |= {
            f"{prefix}/violation_rate": violation["value"],
            f"{prefix}/ci_low": violation["low"],
            f"{prefix}/ci_high": violation["high"],
            f"{prefix}/n": violation["n"],
            f"{prefix}/compliance_rate": result["compliance"]["value"],
            f"{prefix}/invalid_rate": result["invalid"]["value"],
            f"{prefix}/propensity": result["propensity"],
            f"{prefix}/payoff_mean": result["payoff_mean"],
            f"drift/{split}/kl_to_aligned": result["kl_to_aligned"],
            f"drift/{split}/kl_at_decision": result["kl_at_decision"],
        }
        for k, rates in enumerate(result["by_round"], 1):
            metrics[f"{prefix}/round_{k}"] = rates["violation"]["value"]
        for name, fact in result["facts"].items():
            metrics[f"{prefix}/facts/{name}"] = fact["rate"]["value"]
        seats = result["by_seat"] if len(result["by_seat"]) > 1 else {}
        for seat, rates in seats.items():
            metrics[f"{prefix}/seats/{seat}"] = rates["violation"]["value"]
    return metrics


def evaluation_parts(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of an evaluation's rates by family and by what was told about supervision."""
    rows = [
        [
            split,
            kind,
            part,
            *(rates["violation"][key] for key in ("value", "low", "high", "n")),
            rates["invalid"]["value"],
        ]
        for split, result in evaluation["splits"].items()
        for kind in ("family", "supervision")
        for part, rates in result[f"by_{kind}"].items()
    ]
    return ["split", "by", "part", "violation_rate", "ci_low", "ci_high", "n", "invalid_rate"], rows


def episode_record(episode: Episode) -> dict[str, Any]:
    """An episode as JSON: texts, decisions and payoffs; tokens are left out, texts hold what they say."""
    return {
        "scenario": asdict(episode.scenario),
        "sample": episode.sample,
        "seed": list(episode.seed),
        "messages": episode.messages,
        "turns": [
            {
                "seat": t.seat,
                "player": t.player,
                "round": t.round,
                "text": t.completion.text,
                "stop_reason": t.completion.stop_reason,
            }
            | asdict(t.outcome)
            for t in episode.turns
        ],
        "version": episode.version,
    }


def check_manifest(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when every file is there with its size and hash."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a changed byte can make it anything
        return "no readable manifest.json"
    weights = [name for name in expected if name.endswith("adapter_model.safetensors")]
    configs = [name.replace("adapter_model.safetensors", "adapter_config.json") for name in weights]
    if missing := {*FILES, *configs, *(weights or ["adapter_model.safetensors"])} - expected.keys():
        return f"manifest.json lacks {', '.join(sorted(missing))}"
    for name, (size, sha256) in expected.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or _sha256(file) != sha256:
            return f"{name} is missing or changed"
    return None


def write_atomically(file: Path, content: str | bytes) -> None:
    """The file holds the old content or the new one, also after a power cut."""
    temporary = _hidden(file, "tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    _fsync(temporary)
    temporary.replace(file)
    _fsync(file.parent)


class StopFlag:
    """Whether a signal asked to stop; read at step borders."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_at_step_border() -> Iterator[StopFlag]:
    """While inside, SIGINT, SIGTERM and SIGUSR1 set the flag; a second SIGINT stops at once."""
    flag = StopFlag()

    def handle(number: int, frame: object) -> None:
        if flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.signal = signal.Signals(number).name
        if ranks.is_first():
            note = "finishing this step, then stopping; Ctrl-C again stops at once"
            print(f"{flag.signal}: {note}", file=sys.stderr, flush=True)

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    packages = ("atp-rl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "wandb")
    return {
        "git": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "versions": {name: version(name) for name in packages},
    }


def _git_commit() -> str | None:
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def rename_durably(old: Path, new: Path) -> None:
    """Give a finished folder its name; its files and the name survive a power cut."""
    for path in (*old.rglob("*"), old):
        _fsync(path)
    old.rename(new)
    _fsync(new.parent)


def _hidden(path: Path, suffix: str) -> Path:
    """The name beside a file or folder under which it is written (`tmp`), replaced (`old`) or removed (`gone`)."""
    return path.with_name(f".{path.name}.{suffix}")


def _remove(folder: Path) -> None:
    """Remove a checkpoint; no part of one is ever left under its name."""
    gone = folder.rename(_hidden(folder, "gone"))
    shutil.rmtree(gone)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
