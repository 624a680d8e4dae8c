"""`--launch FILE`: every stage of a run in an `accelerate launch` of its own; no two trainers share a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from atp_rl import pipeline, ranks
from atp_rl.recipe import Recipe, load
from atp_rl.tracking.run import Interrupted, Run
from atp_rl.types import InputError

SECONDS_TO_STOP = 3600
"""How long torchrun waits for ranks that were told to stop; its own 30 seconds would kill a step on the way."""


def run(recipe: Recipe, file: Path) -> Path:
    """Run all stages of a recipe in a new run directory; returns it.

    Raises:
        InputError: before the directory is made.
        Interrupted: after a signal; `resume` continues.
        SystemExit: a stage failed; what it printed says why.
    """
    promise(file, recipe)
    _check_gpus(file)
    directory, _ = pipeline.start(recipe)
    return _stages(recipe, directory, file)


def resume(path: Path, file: Path) -> Path:
    """Continue an interrupted run; a complete one is left as it is."""
    directory = Run.open(path)
    return path if directory.complete else _stages(load([str(path / "recipe.yaml")]), directory, file)


def _stages(recipe: Recipe, run: Run, file: Path) -> Path:
    count, wrapper = promise(file, recipe)
    _check_gpus(file)
    environment = {ranks.PROMISED: f"{count} {wrapper}", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_STOP)}
    for stage in pipeline.stages(recipe):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
        (run.path / "interrupted").unlink(missing_ok=True)  # what is there afterwards is of this stage
        code = _passing_signals_on([*command, "-m", "atp_rl", "resume", str(run.path), "--stage", stage], environment)
        run.wait_until_unlocked()
        if (run.path / "interrupted").exists():
            raise Interrupted((run.path / "interrupted").read_text("utf-8").strip())
        if code and not run.complete:
            print(f"atp: the stage {stage} of {run.path} failed; the reason is above", file=sys.stderr)
            sys.exit(code if code > 0 else 1)
    return run.path


def promise(file: Path, recipe: Recipe) -> tuple[int, ranks.Wrapper]:
    """How many ranks the launch file says that there will be, and how the base weights are spread over them.

    Raises:
        InputError: it is no launch file of Accelerate's, or its wrapper does not fit the recipe.
    """
    try:
        config: Any = load_config_from_file(str(file))
        count = int(config.num_processes)  # of all machines
        wrapper: ranks.Wrapper = "ddp" if count > 1 else "none"
        if config.distributed_type == DistributedType.DEEPSPEED:
            settings = config.deepspeed_config
            wrapper = ranks.zero(settings.get("zero_stage"), settings.get("deepspeed_config_file"))
        elif config.distributed_type == DistributedType.FSDP:
            wrapper = "fsdp2"
    except Exception as error:
        raise InputError(f"--launch {file}: not a configuration of `accelerate launch` ({error})") from None
    pipeline.check_wrapper(recipe, wrapper)
    return count, wrapper


def _check_gpus(file: Path) -> None:
    """Raises InputError unless there is a GPU for each process, as far as this machine can tell."""
    config: Any = load_config_from_file(str(file))
    here, count = torch.cuda.device_count(), int(config.num_processes)
    if config.distributed_type != DistributedType.NO and config.num_machines == 1 and here != count:
        fix = "make them equal" if here else "on CPUs use launch/cpu_2proc.sh"
        raise InputError(f"--launch {file}: `num_processes` is {count}, but {here} GPUs are visible; {fix}")


def _passing_signals_on(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end; SIGINT, SIGTERM and SIGUSR1 reach its processes as SIGTERM, a second SIGINT kills them.

    Returns:
        Its exit code.
    """
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    asked = False

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked
        os.killpg(process.pid, signal.SIGKILL if asked and number == signal.SIGINT else signal.SIGTERM)
        asked = True

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
