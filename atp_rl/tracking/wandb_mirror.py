"""Mirrors a run's metrics to Weights & Biases; the run's own files are the truth, and W&B never stops the run.

Nothing here prompts. An online run that cannot start goes on offline, and what fails later is a warning. A resumed
run keeps its W&B id: online it continues its curves (steps that are played again appear twice), offline it adds a
second folder, which `wandb sync` joins to the first when it is given both.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from atp_rl.types import InputError

if TYPE_CHECKING:
    from wandb import Run  # wandb starts a process of its own: imported only where it is used

Mode = Literal["auto", "online", "offline", "disabled"]

INIT_SECONDS = 30.0
"""How long to wait for the server at the start, before going on offline."""
FINISH_SECONDS = 300.0
"""How long to wait for uploads at the end; what is left stays on disk for `wandb sync`.

An alert that a vanished server never took is retried first, for 16 minutes: W&B's own limit."""


def resolve_mode(mode: Mode) -> Literal["online", "offline", "disabled"]:
    """What `auto` means here: the variable WANDB_MODE, else online when logged in, else offline.

    Looks at the environment, netrc and W&B's settings files; asks neither the user nor the network.

    Raises:
        InputError: online without an API key, an API key that cannot be one, or an unknown WANDB_MODE.
    """
    wanted = os.environ.get("WANDB_MODE") or mode if mode == "auto" else mode
    if wanted == "offline" or wanted == "disabled":
        return wanted
    if wanted not in ("auto", "online"):
        raise InputError(f"WANDB_MODE is '{wanted}'; set it to online, offline or disabled, or unset it")
    import wandb
    from wandb.errors import AuthenticationError

    # An explicit `online` also overrules an earlier `wandb offline`; `auto` goes by it.
    wandb.setup(wandb.Settings(silent=True, mode="online") if wanted == "online" else wandb.Settings(silent=True))
    fix = "run `wandb login`, or set track.wandb=offline"
    try:
        if wandb.login(prompt=False, verify=False):
            return "online"
    except AuthenticationError as error:
        raise InputError(f"W&B: {error} {fix}") from None
    if wanted == "online":
        raise InputError(f"W&B is to be online, but there is no API key; {fix}")
    return "offline"


class WandbMirror:
    """One stage of a run on W&B, or nothing at all when disabled. A context manager: leaving it finishes the run."""

    def __init__(self, run: Run | None) -> None:
        self._run = run
        self._warned = set[str]()

    @classmethod
    def open(
        cls,
        mode: Mode,
        *,
        run_dir: Path,
        project: str,
        group: str | None,
        job_type: str,
        name: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
        quiet: bool,
    ) -> WandbMirror:
        """Start, or on resume continue, the W&B run of this stage (`job_type`) of the run directory.

        Args:
            quiet: do not print where the W&B run is; warnings are printed regardless.

        Raises:
            InputError: as `resolve_mode`, before anything is written.
        """
        resolved = resolve_mode(mode)
        if resolved == "disabled":
            return cls(None)
        import wandb

        # Tables and artifacts are copied there until they are uploaded; W&B's default is in the home directory.
        os.environ.setdefault("WANDB_DATA_DIR", str(run_dir.resolve() / "wandb"))
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        run_id = _stored_id(run_dir / f"wandb_id_{job_type}.txt")

        def start(mode: Literal["online", "offline"]) -> Run:
            # Settings of the process, not of the run alone: or W&B's own telemetry looks for its server when offline.
            wandb.setup(wandb.Settings(mode=mode, silent=True))
            return wandb.init(
                dir=run_dir.resolve(),  # the process that writes there may have been started elsewhere
                id=run_id,
                resume="allow",
                project=project,
                group=group,
                job_type=job_type,
                name=name,
                tags=tags,
                config=dict(config),
                reinit="create_new",
                settings=settings,
            )

        try:
            run = start(resolved)
        except Exception as error:
            if resolved == "offline":
                raise
            _warn(f"W&B cannot be reached, so it goes on offline: {error}")
            wandb.teardown()  # or the id of the failed start is "in use"
            run = start("offline")
        run.define_metric("progress/step")
        run.define_metric("*", step_metric="progress/step")
        if not quiet:
            sync = f"wandb sync {run_dir}/wandb/offline-run-*-{run_id}"
            print(f"W&B: offline; upload with `{sync}`" if run.offline else f"W&B: {run.url}")
        return cls(run)

    def log(self, metrics: Mapping[str, float | None]) -> None:
        """One row of metrics with its `progress/step`; None is left out."""
        self._send(lambda run: run.log({name: value for name, value in metrics.items() if value is not None}))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table at the last logged `progress/step`; the values of a column are of one type, or None."""

        def send(run: Run) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._send(send)

    def alert(self, title: str, text: str) -> None:
        self._send(lambda run: run.alert(title=title, text=text))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Results of the whole run."""
        self._send(lambda run: run.summary.update(dict(values)))

    def adapter(
        self, files: Mapping[str, Path], *, manifest: Mapping[str, Any], step: int, metadata: Mapping[str, Any]
    ) -> None:
        """The adapter of a checkpoint: a version of the run's one artifact of type `model`, with the alias `step-N`.

        Args:
            files: by their names in the artifact.
            manifest: their sizes and hashes, which becomes `manifest.json`.
        """

        def send(run: Run) -> None:
            import wandb

            name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{run.name}-adapter")[-128:]  # what W&B allows
            artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
            for place, file in files.items():
                artifact.add_file(str(file), name=place, skip_cache=True)
            with artifact.new_file("manifest.json") as file:
                json.dump(manifest, file, indent=2)
            run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

        self._send(send)

    def finish(self, exit_code: int = 0) -> None:
        """Upload what is left; anything but 0 marks the run as failed. A second call does nothing."""
        self._send(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *error: object) -> None:
        self.finish(0 if error_type is None else 1)

    def _send(self, send: Callable[[Run], object]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:  # its process may die, its server vanish, and some of its errors are private types
            problem = type(error).__name__
            if problem not in self._warned:
                _warn(f"W&B lacks something of this run, which goes on; its own files are complete. {problem}: {error}")
            self._warned.add(problem)


def _stored_id(file: Path) -> str:
    """The W&B id in this file; a new one is stored if there is none."""
    if file.exists() and (stored := file.read_text().strip()):
        return stored
    new = secrets.token_hex(4)
    file.write_text(new + "\n")
    return new


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
