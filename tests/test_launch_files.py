"""The files of launch/: accepted by the tools that read them, and the scripts' decisions with those tools faked."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from accelerate.utils.launch import prepare_deepspeed_cmd_env

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / "cpu_2proc.sh", LAUNCH / "slurm/stage.sbatch", LAUNCH / "slurm/study.sbatch"]


# --- Accelerate and DeepSpeed ---------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """What `accelerate launch` makes of a command line before it starts anything."""

    args: Any
    env: dict[str, str]
    """Only what it adds to the environment."""


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launch]:
    def prepare(name: str, *options: str) -> Launch:
        monkeypatch.chdir(ROOT)
        config = f"launch/accelerate/{name}.yaml"
        parser = launch_command_parser()
        args, defaults, mixed = _validate_launch_command(
            parser.parse_args(["--config_file", config, *options, "-m", "atp_rl", "run", "recipe.yaml"])
        )
        if args.use_deepspeed:  # the same lines as in accelerate's launch_command
            assert isinstance(defaults, ClusterConfig)
            assert defaults.deepspeed_config
            fields = [*defaults.deepspeed_config, *(["mixed_precision"] if mixed else [])]
            args.deepspeed_fields_from_accelerate_config = ",".join(fields)
            env = prepare_deepspeed_cmd_env(args)[1]
        elif args.use_fsdp or args.multi_gpu:
            env = prepare_multi_gpu_env(args)
        else:
            env = prepare_simple_launcher_cmd_env(args)[1]
        return Launch(args, {k: v for k, v in env.items() if os.environ.get(k) != v})

    return prepare


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("single_gpu", DistributedType.NO, 1),
        ("ddp", DistributedType.MULTI_GPU, 8),
        ("fsdp2", DistributedType.FSDP, 8),
        ("zero2", DistributedType.DEEPSPEED, 8),
        ("zero3", DistributedType.DEEPSPEED, 8),
    ],
)
def test_accelerate_reads_wrapper_and_processes(launch, name: str, kind: DistributedType, processes: int) -> None:
    config = load_config_from_file(str(LAUNCH / f"accelerate/{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, 1)

    args = launch(name).args
    assert (args.num_processes, args.module) == (processes, True)
    wrapper = (args.multi_gpu, args.use_fsdp, args.use_deepspeed)
    assert wrapper == tuple(
        kind == k for k in (DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED)
    )
    if kind != DistributedType.NO:
        assert args.nproc_per_node == "8"
        assert int(args.master_port) > 0  # a free one was chosen


def test_every_accelerate_file_is_tested() -> None:
    found = {path.stem for path in (LAUNCH / "accelerate").iterdir()}
    assert found == {"single_gpu", "ddp", "fsdp2", "zero2", "zero3"}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_several_machines_by_options_alone(launch, name: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "node1", "--main_process_port", port]
    args = launch(name, "--num_processes", "16", *where).args
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "8")
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", f"node1:{port}")


@pytest.mark.parametrize("name", ["single_gpu", "ddp", "fsdp2"])
def test_computation_is_bf16(launch, name: str) -> None:
    assert launch(name).env["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_fsdp_plugin(launch, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in launch("fsdp2").env.items():
        monkeypatch.setenv(key, value)
    plugin: Any = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # then it takes the model's own `_no_split_modules`
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.activation_checkpointing is False


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_plugin(launch, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in launch(f"zero{stage}").env.items():
        monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()  # raises where the YAML sets what the JSON must
    plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
    assert plugin.zero_stage == stage
    assert plugin.zero3_init_flag == (stage == 3)
    assert plugin.zero3_save_16bit_model == (stage == 3)
    assert plugin.deepspeed_config["bf16"] == {"enabled": True}
    assert plugin.deepspeed_config["fp16"] == {"enabled": False}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_leaves_the_recipe_its_values(stage: int) -> None:
    """Sizes and clipping are the trainer's; "auto" takes them over, and a number would contradict some recipe."""
    config = json.loads((LAUNCH / f"deepspeed/zero{stage}.json").read_text())
    recipes_say = ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size")
    assert [config[key] for key in (*recipes_say, "train_micro_batch_size_per_gpu")] == ["auto"] * 4
    assert "optimizer" not in config
    assert "scheduler" not in config


# --- Scripts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    assert "set -euo pipefail" in script.read_text()


FAKES = {
    # Runs its command once for each node, one after the other.
    "srun": """echo "srun $*" >> "$CALLS"
while [[ "$1" == --* ]]; do shift; done
status=0
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID="$node" "$@" || status=$?; done
exit "$status"
""",
    "scontrol": """echo "scontrol $*" >> "$CALLS"
if [[ "$1" == show ]]; then printf 'node1\\nnode2\\n'; fi
""",
    # Leaves the run directory as the run would have, and exits as accelerate's agent does.
    "accelerate": """printf '%s\\n' "accelerate timeout=$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*" >> "$CALLS"
mkdir -p "$RUN_DIR"; touch "$RUN_DIR/recipe.yaml"
case "$OUTCOME" in
  complete) touch "$RUN_DIR/summary.json" ;;
  interrupted) touch "$RUN_DIR/interrupted"; exit 1 ;;
  failed) exit 3 ;;
  nothing) ;;
esac
""",
    "torchrun": """set="OMP=$OMP_NUM_THREADS IF=$GLOO_SOCKET_IFNAME GPUS=[$CUDA_VISIBLE_DEVICES]"
echo "torchrun $set $*" >> "$CALLS"
""",
}


class Called(NamedTuple):
    code: int
    calls: list[str]
    stderr: str

    def of(self, tool: str) -> list[str]:
        return [call for call in self.calls if call.startswith(tool)]


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Called]:
    """Runs a script as the cluster would, with the tools that it calls replaced by ones that write down their calls."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in FAKES.items():
        (tools / name).write_text("#!/usr/bin/env bash\n" + text)
        (tools / name).chmod(0o755)

    def run(*command: str | Path, outcome: str = "complete", **env: str) -> Called:
        calls = tmp_path / "calls"
        calls.write_text("")
        fixed = {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "OUTCOME": outcome}
        ended = subprocess.run(command, cwd=ROOT, env=fixed | env, capture_output=True, text=True, timeout=60)
        return Called(ended.returncode, calls.read_text().splitlines(), ended.stderr)

    return run


SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "32",
}
DDP = "launch/accelerate/ddp.yaml"


@pytest.fixture
def stage(shell, tmp_path: Path) -> Callable[..., Called]:
    def run(outcome: str, *, stage: str = "run", **env: str) -> Called:
        directory = tmp_path / "a run"
        recipe = ["recipe one.yaml", "evolve.rewards=[payoff, compliance]"]
        command = ["bash", "launch/slurm/stage.sbatch", stage, DDP, str(directory), *recipe]
        return shell(*command, outcome=outcome, **SLURM, RUN_DIR=str(directory), **env)

    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "a run"
    directory.mkdir()
    return directory


def test_fresh_run_on_two_nodes(stage, tmp_path: Path) -> None:
    called = stage("complete")
    assert called.code == 0, called.stderr
    # 10000 + 1234567 % 20000 = 10000 + 14567
    common = (
        f"--config_file {DDP} --num_machines 2 --num_processes 16 --main_process_ip node1 --main_process_port 24567"
    )
    ours = f"-m atp_rl run recipe one.yaml evolve.rewards=[payoff, compliance] run.dir={tmp_path / 'a run'}"
    assert called.of("accelerate") == [
        f"accelerate timeout=270 launch --machine_rank {node} {common} {ours}" for node in (0, 1)
    ]
    [srun] = called.of("srun")
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=32" in srun
    assert called.of("scontrol requeue") == []


def test_one_stage_alone(stage) -> None:
    assert " -m atp_rl align recipe one.yaml " in stage("complete", stage="align").of("accelerate")[0]


def test_interrupted_run_is_requeued(stage) -> None:
    called = stage("interrupted")
    assert called.code == 0, called.stderr
    assert called.calls[-1] == "scontrol requeue 1234567"


def test_begun_run_is_resumed(stage, run_dir: Path) -> None:
    (run_dir / "recipe.yaml").touch()
    (run_dir / "interrupted").touch()
    called = stage("complete")
    assert called.code == 0
    assert called.of("accelerate")[0].endswith(f"-m atp_rl resume {run_dir}")
    assert called.of("scontrol requeue") == []


def test_resumed_run_that_is_interrupted_again_is_requeued_again(stage, run_dir: Path) -> None:
    (run_dir / "recipe.yaml").touch()
    assert stage("interrupted").of("scontrol requeue") == ["scontrol requeue 1234567"]


def test_complete_run_takes_no_gpu(stage, run_dir: Path) -> None:
    (run_dir / "recipe.yaml").touch()
    (run_dir / "summary.json").touch()
    called = stage("failed")
    assert (called.code, called.calls) == (0, [])


def test_failed_run_is_not_requeued(stage) -> None:
    called = stage("failed")
    assert (called.code, called.of("scontrol requeue")) == (3, [])
    assert "failed with exit code 3" in called.stderr


def test_crash_after_an_interruption_is_not_requeued_for_ever(stage, run_dir: Path) -> None:
    (run_dir / "recipe.yaml").touch()
    (run_dir / "interrupted").touch()  # left by the attempt before
    called = stage("failed")
    assert (called.code, called.of("scontrol requeue")) == (3, [])


def test_exit_code_0_without_a_summary_is_a_failure(stage) -> None:
    assert stage("nothing").code == 1


def test_stage_refuses_bad_arguments(shell) -> None:
    script = ["bash", "launch/slurm/stage.sbatch"]
    for arguments in (
        ["run", DDP, "runs/x"],
        ["evaluate", DDP, "runs/x", "r.yaml"],
        ["run", "no.yaml", "runs/x", "r.yaml"],
    ):
        called = shell(*script, *arguments, **SLURM)
        assert (called.code, called.calls) == (2, [])
        assert called.stderr


@pytest.mark.parametrize("name", ["stage", "study"])
def test_sbatch_directives(name: str) -> None:
    lines = (LAUNCH / f"slurm/{name}.sbatch").read_text().splitlines()
    assert lines[0].startswith("#!")
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    found = {line.removeprefix("#SBATCH ") for line in lines[:first_command] if line.startswith("#SBATCH ")}
    # Without `B:` the steps get the signal and the batch shell does not.
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= found
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # Slurm would not read it


def test_workers_may_take_less_time_than_slurm_leaves() -> None:
    text = (LAUNCH / "slurm/stage.sbatch").read_text()
    leaves = int(re.findall(r"--signal=TERM@(\d+)", text)[0])
    takes = int(re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)[0])
    assert 30 < takes < leaves


def study(shell, tmp_path: Path, text: str, task: int, outcome: str = "complete") -> Called:
    listed = tmp_path / "my list.txt"
    listed.write_text(text)
    array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "77", "RUN_DIR": str(tmp_path / "b")}
    command = ["bash", "launch/slurm/study.sbatch", "launch/accelerate/single_gpu.yaml", str(listed)]
    one_gpu = SLURM | {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}
    return shell(*command, outcome=outcome, **one_gpu, **array)


def test_study_runs_its_line(shell, tmp_path: Path) -> None:
    text = f"{tmp_path}/a one.yaml seed=0\n{tmp_path}/b  one.yaml  two.yaml evolve.rewards=[*] seed=1\n"
    called = study(shell, tmp_path, text, task=2)
    assert called.code == 0, called.stderr
    [line] = called.of("accelerate")
    assert "--num_machines 1 --num_processes 1 " in line
    assert line.endswith(f"-m atp_rl run one.yaml two.yaml evolve.rewards=[*] seed=1 run.dir={tmp_path}/b")


def test_study_requeues_its_task_alone(shell, tmp_path: Path) -> None:
    called = study(shell, tmp_path, f"x one.yaml\n{tmp_path}/b one.yaml\n", task=2, outcome="interrupted")
    assert called.calls[-1] == "scontrol requeue 77_2"


@pytest.mark.parametrize("text", ["runs/a one.yaml\n", "runs/a one.yaml\n\n", "runs/a one.yaml\nruns/b\n"])
def test_study_refuses_a_line_that_is_no_run(shell, tmp_path: Path, text: str) -> None:
    called = study(shell, tmp_path, text, task=2)
    assert (called.code, called.calls) == (2, [])
    assert "line 2" in called.stderr


def test_study_and_stage_ask_for_the_same() -> None:
    """study.sbatch hands over to stage.sbatch, whose own directives Slurm never reads there."""

    def directives(name: str) -> set[str]:
        return set(re.findall(r"^#SBATCH (\S+)", (LAUNCH / f"slurm/{name}.sbatch").read_text(), re.MULTILINE))

    differs = {line.split("=")[0] for line in directives("stage") ^ directives("study")}
    assert differs == {"--job-name", "--gpus-per-node", "--cpus-per-task", "--output"}


def test_cpu_2proc(shell) -> None:
    called = shell("launch/cpu_2proc.sh", "recipe one.yaml", "seed=1")
    assert called.code == 0
    assert called.calls == [
        "torchrun OMP=1 IF=lo GPUS=[] --standalone --local_addr 127.0.0.1 --nproc_per_node 2 "
        "-m atp_rl run recipe one.yaml seed=1"
    ]
    assert shell("launch/cpu_2proc.sh").code == 2


# --- SkyPilot -------------------------------------------------------------------------------------------------------

# Keys of SkyPilot 0.14's task schema (sky/utils/schemas.py) that stand for something here; it refuses unknown ones.
TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
RESOURCES = {"accelerators", "use_spot", "disk_size", "job_recovery"}


@pytest.mark.parametrize("name", ["evolve", "study"])
def test_skypilot_keys(name: str) -> None:
    task = yaml.safe_load((LAUNCH / f"skypilot/{name}.yaml").read_text())
    assert set(task) == TASK
    assert set(task["resources"]) == RESOURCES
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert all(isinstance(value, str) for value in (task["envs"] | task["secrets"]).values())
    assert task["file_mounts"] == {"/bucket": {"name": "atp-runs", "mode": "MOUNT_CACHED"}}
    assert (ROOT / task["envs"]["LAUNCH"]).is_file()
    for path in task["envs"].get("RECIPE", "").split():
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", ["evolve", "study"])
@pytest.mark.parametrize(
    ("before", "outcome", "code", "ours"),
    [
        ([], "complete", 0, "run one.yaml seed=0 run.dir=BUCKET/a"),
        ([], "interrupted", 75, "run one.yaml seed=0 run.dir=BUCKET/a"),
        ([], "failed", 3, "run one.yaml seed=0 run.dir=BUCKET/a"),
        (["recipe.yaml", "interrupted"], "complete", 0, "resume BUCKET/a"),
        (["recipe.yaml", "interrupted"], "failed", 3, "resume BUCKET/a"),
        (["recipe.yaml"], "interrupted", 75, "resume BUCKET/a"),
    ],
)
def test_skypilot_run_section(
    shell, tmp_path: Path, name: str, before: list[str], outcome: str, code: int, ours: str
) -> None:
    bucket = tmp_path / "bucket"
    for file in before:
        (bucket / "a").mkdir(parents=True, exist_ok=True)
        (bucket / "a" / file).touch()
    (tmp_path / "atp/bin").mkdir(parents=True)
    (tmp_path / "atp/bin/activate").touch()
    (tmp_path / "list.txt").write_text("a one.yaml seed=0\n")
    task = yaml.safe_load((LAUNCH / f"skypilot/{name}.yaml").read_text())
    env = task["envs"] | {"LIST": str(tmp_path / "list.txt"), "RUN": "a", "RECIPE": "one.yaml seed=0"}
    env |= {"HOME": str(tmp_path), "SKYPILOT_NUM_GPUS_PER_NODE": "4", "RUN_DIR": f"{bucket}/a"}

    called = shell("bash", "-c", task["run"].replace("/bucket", str(bucket)), outcome=outcome, **env)
    assert called.code == code, called.stderr
    launch = f"launch --config_file {task['envs']['LAUNCH']} --num_processes 4 -m atp_rl "
    assert called.calls == [f"accelerate timeout=270 {launch}{ours.replace('BUCKET', str(bucket))}"]


@pytest.mark.parametrize("name", ["evolve", "study"])
def test_skypilot_sections_parse(name: str) -> None:
    task = yaml.safe_load((LAUNCH / f"skypilot/{name}.yaml").read_text())
    for section in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=section, text=True, check=True)
