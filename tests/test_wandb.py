"""Real W&B runs, each in a process of its own without input, account or network, read back from their files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from atp_rl.tracking.wandb_mirror import WandbMirror

ROOT = Path(__file__).parents[1]
KEY = "0123456789" * 4  # of the right form, and of nobody
START = """
import sys
from pathlib import Path
from atp_rl.tracking import wandb_mirror
from atp_rl.tracking.wandb_mirror import WandbMirror
from atp_rl.types import InputError
def start(mode, quiet=True):
    return WandbMirror.open(
        mode, run_dir=Path("run"), project="study", group="gates", job_type="evolve", name="tiny-role_play-gate-0",
        tags=["cpu"], config={"seed": 7, "model": {"name": "tiny"}}, quiet=quiet)
"""
FIRST = """
import random
sys.addaudithook(lambda event, _: event == "socket.getaddrinfo" and print("looked for a server", file=sys.stderr))
before = random.getstate()
with start("offline", quiet=False) as mirror:
    mirror.log({"progress/step": 0, "evolve/loss": 0.5, "evolve/entropy": None})
    mirror.log({"progress/step": 10, "evolve/loss": 0.25})
    mirror.log_table("eval/table", ["family", "rate"], [("a", 0.5), ("b", None)])
    mirror.alert("tipping", "rate 0.6")
    mirror.summary({"tipping/step": 10})
    for step in (5, 10):
        Path("weights").write_text(f"of step {step}")
        files = {"adapter_model.safetensors": Path("weights"), "seat_1/adapter_config.json": Path("config")}
        manifest = {"adapter_model.safetensors": {"bytes": 9}}
        metadata = {"step": step, "violation_rate": {"held_out": 0.5}}
        mirror.adapter(files, manifest=manifest, step=step, metadata=metadata)
        Path("weights").unlink()  # as `run.keep` may
assert random.getstate() == before
"""
RESUMED = """
try:
    with start("offline") as mirror:
        mirror.log({"progress/step": 20, "evolve/loss": 0.125})
        raise KeyError
except KeyError:
    pass
"""


def run_python(folder: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in `folder`, which is also its home; whatever this machine knows of W&B is hidden from it."""
    (folder / "run").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if "WANDB" not in name and "XDG" not in name}
    env = {**kept, "HOME": str(folder), "NETRC": str(folder / "netrc"), "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [sys.executable, "-c", START + code],
        cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def read_back(file: Path, *options: str) -> list[dict[str, Any]]:
    """What `wandb leet inspect --json` prints of a .wandb file: records, one a line; with --summary one object."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(out)] if options else [json.loads(line) for line in out.splitlines()]


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was logged offline, failed after its resume, and was offline both times."""
    folder = tmp_path_factory.mktemp("wandb")
    (folder / "config").write_text("{}")
    first = run_python(folder, FIRST)
    assert (first.returncode, first.stderr) == (0, "")
    assert [line.split(" `")[0] for line in first.stdout.splitlines()] == ["W&B: offline; upload with"]
    resumed = run_python(folder, RESUMED)
    assert (resumed.returncode, resumed.stdout, resumed.stderr) == (0, "", "")
    return folder


@pytest.fixture(scope="module")
def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("run/wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)


def test_metrics_are_on_the_axis_of_their_step(files: list[Path]) -> None:
    records = read_back(files[0])
    rows = [row["item"] for row in of_type(records, "history")]
    points = [(row["progress/step"], row["evolve/loss"]) for row in rows if "evolve/loss" in row]
    assert points == [(0, 0.5), (10, 0.25)]
    assert not any("evolve/entropy" in row for row in rows)  # it was None
    assert [(m.get("name") or m["glob_name"], m.get("step_metric")) for m in of_type(records, "metric")] == [
        ("progress/step", None),
        ("*", "progress/step"),
    ]


def test_tables_and_alerts_are_recorded(files: list[Path]) -> None:
    records = read_back(files[0])
    [table] = [row["item"] for row in of_type(records, "history") if "eval/table.path" in row["item"]]
    assert (table["progress/step"], table["eval/table.nrows"]) == (10, 2)
    content = json.loads((files[0].parent / "files" / table["eval/table.path"]).read_text())
    assert content == {"columns": ["family", "rate"], "data": [["a", 0.5], ["b", None]]}
    assert [(a["title"], a["text"]) for a in of_type(records, "alert")] == [("tipping", "rate 0.6")]


def staged(artifact: dict[str, Any]) -> dict[str, str]:
    """The files of an artifact that waits for its upload."""
    return {entry["path"]: Path(entry["local_path"]).read_text() for entry in artifact["manifest"]["contents"]}


def test_every_adapter_is_a_version_of_one_artifact(files: list[Path]) -> None:
    versions = [a for a in of_type(read_back(files[0]), "artifact") if a["type"] == "model"]
    assert [a["name"] for a in versions] == ["tiny-role_play-gate-0-adapter"] * 2
    assert [set(a["aliases"]) for a in versions] == [{"latest", "step-5"}, {"latest", "step-10"}]
    assert [json.loads(a["metadata"]) for a in versions] == [
        {"step": step, "violation_rate": {"held_out": 0.5}} for step in (5, 10)
    ]
    assert [staged(a)["adapter_model.safetensors"] for a in versions] == ["of step 5", "of step 10"]
    assert set(staged(versions[0])) == {"adapter_model.safetensors", "seat_1/adapter_config.json", "manifest.json"}
    assert json.loads(staged(versions[0])["manifest.json"]) == {"adapter_model.safetensors": {"bytes": 9}}
    run_folder = files[0].parents[1]  # alone enough for `wandb sync`
    for entry in versions[0]["manifest"]["contents"]:
        assert Path(entry["local_path"]).is_relative_to(run_folder)


@pytest.fixture(scope="module")
def evolved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a run of four steps, measured at every second, for each choice of `track.artifacts`."""
    folder = tmp_path_factory.mktemp("evolved")
    code = """
from atp_rl import pipeline
from tests.small_model import small_recipe
for choice in ("none", "last", "all"):
    wanted = ["track.wandb=offline", f"track.artifacts={choice}", "run.name=what a/name", "run.keep=3"]
    pipeline.run(small_recipe(Path(choice), *wanted, steps=4))
"""
    done = run_python(folder, code)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return folder


@pytest.mark.parametrize(("choice", "steps"), [("none", []), ("last", [4]), ("all", [0, 2, 4])])
def test_a_run_gives_wandb_the_adapters_that_the_recipe_asks_for(evolved: Path, choice: str, steps: list[int]) -> None:
    run = evolved / choice
    [file] = run.glob("wandb/offline-run-*/run-*.wandb")
    versions = [a for a in of_type(read_back(file), "artifact") if a["type"] == "model"]
    metadata = [json.loads(a["metadata"]) for a in versions]
    assert [each["step"] for each in metadata] == steps
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    rates = {e["step"]: {name: s["violation"]["value"] for name, s in e["splits"].items()} for e in evaluations}
    for artifact, facts in zip(versions, metadata, strict=True):
        checkpoint = run / "checkpoints" / f"step_{facts['step']:04d}"
        weights = {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
        assert set(weights) == {"adapter_model.safetensors", "adapter_config.json", "manifest.json"}
        content = (checkpoint / "adapter_model.safetensors").read_bytes()
        assert weights["adapter_model.safetensors"].read_bytes() == content
        assert facts["sha256"] == {"adapter_model.safetensors": hashlib.sha256(content).hexdigest()}
        assert facts["violation_rate"] == rates[facts["step"]]
        assert facts["anchor"] == json.loads((checkpoint / "state.json").read_text())["anchor"]
        assert artifact["name"].endswith("-what-a-name-seed0-adapter")


def test_config_names_and_summary(files: list[Path]) -> None:
    [summary] = read_back(files[0], "--summary")
    assert summary["config"] == {"seed": 7, "model": {"name": "tiny"}}
    assert (summary["project"], summary["name"], summary["tags"]) == ("study", "tiny-role_play-gate-0", ["cpu"])
    assert summary["summary"]["tipping/step"] == 10
    [run] = of_type(read_back(files[0]), "run")
    assert (run["run_group"], run["job_type"]) == ("gates", "evolve")


def test_resume_keeps_the_id(folder: Path, files: list[Path]) -> None:
    stored = (folder / "run/wandb_id_evolve.txt").read_text().strip()
    summaries = [read_back(file, "--summary")[0] for file in files]
    assert [s["run_id"] for s in summaries] == [stored, stored]
    assert [s["exit_code"] for s in summaries] == [0, 1]  # the second `with` was left by an exception
    assert summaries[1]["summary"]["evolve/loss"] == 0.125


@pytest.mark.parametrize(("mode", "env"), [("disabled", {}), ("auto", {"WANDB_MODE": "disabled"})])
def test_disabled_imports_and_writes_nothing(tmp_path: Path, mode: str, env: dict[str, str]) -> None:
    code = f"""
with start({mode!r}) as mirror:
    mirror.log({{"progress/step": 0}})
    mirror.log_table("t", ["a"], [[1]])
    mirror.alert("a", "b")
    mirror.summary({{"a": 1}})
    mirror.adapter({{"adapter": Path("none")}}, manifest={{}}, step=0, metadata={{}})
print("wandb" in sys.modules)
"""
    done = run_python(tmp_path, code, **env)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert list((tmp_path / "run").iterdir()) == []


def test_auto_without_a_key_is_offline_and_asks_nothing(tmp_path: Path) -> None:
    done = run_python(tmp_path, 'start("auto", quiet=False).finish()')
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("W&B: offline; ")


@pytest.mark.parametrize(
    ("mode", "env", "resolved"),
    [
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "online"),  # the recipe wins
    ],
)
def test_mode_goes_by_key_and_environment(tmp_path: Path, mode: str, env: dict[str, str], resolved: str) -> None:
    done = run_python(tmp_path, f"print(wandb_mirror.resolve_mode({mode!r}))", **env)
    assert (done.stdout, done.stderr) == (resolved + "\n", "")


def test_a_key_in_netrc_is_found(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    done = run_python(tmp_path, "print(wandb_mirror.resolve_mode('auto'))")
    assert (done.stdout, done.stderr) == ("online\n", "")


@pytest.mark.parametrize(
    ("mode", "env", "message"),
    [
        ("online", {}, "no API key; run `wandb login`, or set track.wandb=offline"),
        ("auto", {"WANDB_MODE": "online"}, "no API key; run `wandb login`, or set track.wandb=offline"),
        ("auto", {"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
        ("auto", {"WANDB_MODE": "of"}, "WANDB_MODE is 'of'"),
    ],
)
def test_impossible_modes_are_refused_with_the_fix(
    tmp_path: Path, mode: str, env: dict[str, str], message: str
) -> None:
    code = f"""
try:
    start({mode!r})
except InputError as error:
    print(error)
"""
    done = run_python(tmp_path, code, **env)
    assert message in done.stdout
    assert done.stderr == ""
    assert list((tmp_path / "run").iterdir()) == []


def test_online_without_a_server_goes_on_offline(tmp_path: Path) -> None:
    code = """
wandb_mirror.INIT_SECONDS = 1.0
with start("online") as mirror:
    mirror.log({"progress/step": 3, "evolve/loss": 1.5})
"""
    done = run_python(tmp_path, code, WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: W&B cannot be reached, so it goes on offline: ")
    [file] = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    [summary] = read_back(file, "--summary")
    assert summary["summary"]["evolve/loss"] == 1.5
    assert summary["run_id"] == (tmp_path / "run/wandb_id_evolve.txt").read_text().strip()


def test_a_broken_mirror_warns_once_and_never_raises(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def log(self, row: object) -> None:
            raise ConnectionResetError("Connection lost")

        def finish(self, exit_code: int) -> None:
            raise ConnectionResetError("Connection lost")

    mirror = WandbMirror(cast(Any, Broken()))
    mirror.log({"progress/step": 1})
    mirror.log({"progress/step": 2})
    mirror.finish()
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.endswith("its own files are complete. ConnectionResetError: Connection lost")
