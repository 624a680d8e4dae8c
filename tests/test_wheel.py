"""The wheel, built as for a release and installed where no checkout is: all commands that need none work from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest

from atp_rl.recipe import json_schema
from tests.command_line import RECIPES, ROLE_PLAY, SMALL

ROOT = RECIPES.parent


def files_below(folder: Path) -> set[str]:
    """What belongs into a package: everything but caches."""
    found = (file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(ROOT).as_posix() for file in found}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [source], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def atp(built, tmp_path_factory) -> Path:
    """`atp` in a fresh virtual environment, which sees the other packages of this one after its own."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(built[1])]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [own] = folder.glob("lib/python*/site-packages")
    # a line of a .pth file is a folder; the .pth files in there, an editable install's among them, are not read
    here = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (own / "others.pth").write_text("".join(f"{path}\n" for path in sorted(here)))
    where = call([python, "-c", "import atp_rl, reward_models; print(atp_rl.__file__, reward_models.__file__)"], folder)
    assert all(Path(file).is_relative_to(folder) for file in where.split())
    return folder / "bin" / "atp"


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"}


def call(command: list[str | Path], cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages_and_the_recipes(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licenses = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    recipes = {f"atp_rl/{name}" for name in files_below(Path("recipes"))}
    assert names == files_below(Path("atp_rl")) | files_below(Path("reward_models")) | recipes
    for kind in (".yaml", ".json", ".jinja", ".safetensors", "README.md"):  # and the comparison is not of Python alone
        assert any(name.startswith("atp_rl/") and name.endswith(kind) for name in names - recipes)
    assert len(licenses) == 1


def test_the_source_distribution_can_be_tested_and_read(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    folders = ("atp_rl", "reward_models", "recipes", "tests", "docs")
    assert set().union(*(files_below(Path(folder)) for folder in folders)) <= names
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs/", "demo/", ".git/"))]


def test_help_and_schema(atp, tmp_path):
    assert "alignment decay" in call([atp, "--help"], tmp_path)
    assert json.loads(call([atp, "schema"], tmp_path)) == json_schema()


def test_a_run_and_its_report(atp, tmp_path):
    (tmp_path / "mine.yaml").write_text(Path(ROLE_PLAY).read_text())
    assert "run" in call([atp, "run", "mine.yaml", *SMALL, "run.dir=run"], tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["complete"]) == (2, True)
    report = call([atp, "report", "run"], tmp_path).strip()
    assert "<html" in (tmp_path / report).read_text()


def test_the_demo_starts(atp, tmp_path):
    log = tmp_path / "output"
    with log.open("w") as output:
        process = subprocess.Popen(
            [atp, "demo"],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    recipe, deadline = tmp_path / "demo" / "align" / "recipe.yaml", time.monotonic() + 120
    while not recipe.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C
    assert process.wait(timeout=120) == 75, log.read_text()
    assert "method: dpo" in recipe.read_text()
