"""Studies: what a file expands to, what is refused, and how runs are started, resumed, recorded and submitted.

The runs themselves are stand-ins here (`FAKE`), which take no time; `tests/faults/test_study_kill.py` has real ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from atp_rl import cli
from atp_rl.recipe import load
from atp_rl.studies import local, record, slurm
from atp_rl.studies.file import Study, find_sources, read_study, study_folder
from atp_rl.studies.members import Job, Member, Plan, fingerprint, plan
from atp_rl.studies.show import plan_lines, too_few_seeds
from atp_rl.types import InputError
from tests.command_line import RECIPES

STUDIES = sorted((RECIPES / "studies").glob("*.yaml"))
ROLE_PLAY = "recipes/tiny/role_play.yaml"
KL = "recipes/defenses/kl_anchor.yaml"
FAKE = '''
"""In place of `atp`: writes what a run leaves behind; what it does is said in fake.json, by run."""
import json, os, signal, sys, time
from pathlib import Path
import yaml

command, path = sys.argv[1], Path(sys.argv[2])
recipe = yaml.safe_load((path / "recipe.yaml" if command == "resume" else path).read_text())
folder = Path(recipe["run"]["dir"])
behave = json.loads(Path("fake.json").read_text()).get(folder.name, "complete")
with open("calls.txt", "a") as calls:
    calls.write(f"{command} {folder.name} {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
if behave == "fails at once":
    print("what went wrong")
    sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
(folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
if behave == "fails":
    print("what went wrong")
    sys.exit(1)
if behave == "is interrupted":
    sys.exit(75)
if behave == "waits":
    def saves(number, frame):
        (folder / "saved").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, saves)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / "waits").touch()
    time.sleep(60)
if recipe["evolve"] is None:
    (folder / "aligned").mkdir()
else:
    rates = {"violation_rate": 0.02, "ci_low": 0.0, "ci_high": 0.1, "n": 50, "invalid_rate": 0.0}
    (folder / "summary.json.new").write_text(json.dumps(
        {"name": recipe["run"]["name"], "seed": recipe["seed"], "aligned": rates, "final": rates, "tipped": False}))
    (folder / "summary.json.new").rename(folder / "summary.json")  # as `atp`: nobody ever reads half of it
'''


def small(**changes: Any) -> Study:
    """Two arms, two seeds."""
    arms = {"undefended": [], "kl_3": [KL]}
    return Study(**{"name": "small", "recipes": [ROLE_PLAY], "arms": arms, "seeds": [0, 1]} | changes)


def write(study: Study, folder: Path) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study.model_dump(), sort_keys=False))
    return path


def refused(study: Study) -> list[str]:
    with pytest.raises(InputError) as error:
        plan(study)
    return str(error.value).splitlines()


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- what a file says


def test_a_grid_expands_to_named_runs():
    made = plan(small(
        testbeds={"role_play": [], "watched": ["scenarios.supervision.probability=0.5"]},
        knobs={"evolve.learning_rate": [1e-3, 2e-3], "evolve.warmup_steps": [4]},
    ))  # fmt: skip
    assert [job.name for job in made.alignments] == ["align-role_play", "align-watched"]
    assert len(made.members) == 2 * 2 * 2 * 2
    assert [m.name for m in made.members[:5]] == [
        "role_play-undefended-learning_rate_0.001-seed0",
        "role_play-undefended-learning_rate_0.001-seed1",
        "role_play-undefended-learning_rate_0.002-seed0",
        "role_play-undefended-learning_rate_0.002-seed1",
        "role_play-kl_3-learning_rate_0.001-seed0",
    ]
    last = made.members[-1]
    evolve = last.recipe.evolve
    assert evolve is not None
    assert (evolve.learning_rate, evolve.warmup_steps) == (2e-3, 4)
    assert evolve.start_from == str(Path("runs/small/align-watched/aligned").absolute())
    assert (last.arm, last.testbed, last.model, last.seed) == ("kl_3", "watched", "", 1)
    assert last.recipe.run.dir == "runs/small/watched-kl_3-learning_rate_0.002-seed1"
    assert last.recipe.run.name == "watched-kl_3-learning_rate_0.002"
    assert last.recipe.track.group == "small"
    assert [d.name for d in last.recipe.defenses] == ["kl_anchor"]


def test_axes_of_one_value_are_not_named():
    made = plan(small(testbeds={"role_play": []}, models={"tiny": []}, knobs={"evolve.learning_rate": [1e-3]}))
    assert [job.name for job in made.jobs] == [
        "align", "undefended-seed0", "undefended-seed1", "kl_3-seed0", "kl_3-seed1",
    ]  # fmt: skip


def test_arms_share_one_alignment_unless_they_align_otherwise():
    made = plan(small(arms={"undefended": [], "kl_3": [KL], "longer": ["align.trl.max_steps=90"]}, set=["seed=7"]))
    assert [job.name for job in made.alignments] == ["align", "align-longer"]
    starts = {member.arm: member.alignment for member in made.members}
    assert starts == {"undefended": "align", "kl_3": "align", "longer": "align-longer"}
    assert {job.recipe.seed for job in made.alignments} == {7}  # not the members'
    assert {member.recipe.seed for member in made.members} == {0, 1}
    assert all(job.recipe.evolve is None and not job.recipe.defenses for job in made.alignments)
    longer = made.alignments[1].recipe.align
    assert longer is not None
    assert longer.trl["max_steps"] == 90


def test_an_arm_that_starts_from_another_adapter_says_so():
    arms = {"undefended": [], "kl_3": [KL], "longer": ["align.trl.max_steps=90"], "base": ["evolve.start_from=base"]}
    differs = {member.arm: member.differs for member in plan(small(arms=arms)).members}
    assert differs == {"undefended": (), "kl_3": (), "longer": ("align",), "base": ("evolve.start_from",)}


def test_fingerprints_hold_the_adapter_but_not_the_place_of_the_study():
    own, moved = (plan(small(), folder).members[0].recipe for folder in (None, Path("/mnt/moved")))
    assert own.evolve is not None
    assert moved.evolve is not None
    assert moved.evolve.start_from == "/mnt/moved/align/aligned"
    assert fingerprint(moved) == fingerprint(own)
    prints = {
        fingerprint(own.model_copy(update={"evolve": own.evolve.model_copy(update={"start_from": adapter})}))
        for adapter in ("/a/align/aligned", "/b/align/aligned", "/b/small/align/aligned", "align/aligned")
    }
    assert len(prints) == 4
    resolved = own.model_dump(exclude={"run", "track"})
    resolved["evolve"]["start_from"] = "align/aligned"  # as studies that are under way have it
    assert fingerprint(own) == hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def test_a_study_that_starts_from_the_base_aligns_nothing():
    made = plan(small(set=["align=null", "evolve.start_from=base"]))
    assert (made.alignments, {member.alignment for member in made.members}) == ([], {None})


def test_files_are_found_here_first_and_then_in_the_package(tmp_path):
    assert find_sources([KL, "seed=1", "nowhere.yaml"]) == [str(RECIPES / "defenses" / "kl_anchor.yaml"), "seed=1",
                                                          "nowhere.yaml"]  # fmt: skip
    (tmp_path / "recipes" / "defenses").mkdir(parents=True)
    (tmp_path / KL).write_text("seed: 1")
    assert find_sources([KL]) == [KL]


def test_a_study_of_the_package_is_compared_from_any_folder(tmp_path):
    assert study_folder(Path("recipes/studies/smoke.yaml")) == Path("runs/smoke")
    assert study_folder(Path("recipes/studies/nowhere.yaml")) is None


WRONG_FILES = {
    "an unknown key": ("recpes: [a.yaml]\narms: {a: []}", "unknown key `recpes`", "did you mean `recipes`?"),
    "no arms": ("recipes: [a.yaml]", "`arms` is required", ""),
    "no recipes": ("arms: {a: []}", "`testbeds` or `recipes` must name the files", ""),
    "an arm of one word": ("recipes: [a.yaml]\narms: {a: b.yaml}", "`arms.a` must be a list", "'b.yaml'"),
    "a name with a slash": ("recipes: [a.yaml]\narms: {a/b: []}", "it names a folder", "'a/b'"),
    "a seed twice": ("recipes: [a.yaml]\narms: {a: []}\nseeds: [1, 1]", "`seeds` holds a seed twice", ""),
    "a seed in words": ("recipes: [a.yaml]\narms: {a: []}\nseeds: [one]", "`seeds[0]` must be an integer", "'one'"),
    "an unknown arm": ("recipes: [a.yaml]\narms: {a: []}\nprimary: [[a, b]]", "`primary` names the arm 'b'", "are a"),
    "not YAML": ("recipes: [", "not valid YAML", ""),
    "a list": ("- a", "must be a mapping", ""),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_file_that_is_wrong(case, tmp_path):
    text, *expected = WRONG_FILES[case]
    path = tmp_path / "wrong.yaml"
    path.write_text(text if case == "a list" else f"name: x\n{text}")
    with pytest.raises(InputError) as error:
        read_study(path)
    for part in (*expected, "wrong.yaml"):
        assert part in str(error.value)


def test_a_problem_names_the_member_the_file_and_the_key(tmp_path):
    (tmp_path / "bad.yaml").write_text("evolve: {stepps: 3}\n")
    arms = {"undefended": [], "typo": ["bad.yaml"], "unknown": ["defenses=[kl_ancor]"], "gone": ["missing.yaml"]}
    problems = refused(small(arms=arms))
    assert len(problems) == 2  # of the files; what they mean is looked at when they can be read
    assert problems[0] == "typo: unknown key `evolve.stepps` in bad.yaml; did you mean `evolve.steps`?"
    assert problems[1].startswith("gone: missing.yaml: no such recipe file")
    [problem] = refused(small(arms={"undefended": [], "unknown": ["defenses=[kl_ancor]"]}))
    assert problem.startswith("unknown: `defenses[0].name`: unknown defense 'kl_ancor'; did you mean `kl_anchor`?")
    assert "role_play.yaml, defenses=[kl_ancor]" in problem
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("scenarios.per_family=4", "scenarios.per_family"),
        ("evolve.steps=35", "evolve.steps x scenarios_per_step x group_size (8960 and 9216 episodes)"),
        ("evaluate.every=2", "evaluate.every"),
    ],
)
def test_an_arm_that_is_no_fair_match_is_refused(override, named):
    [problem] = refused(small(arms={"undefended": [], "other": [override]}))
    assert problem.startswith(f"other: is no fair match for undefended: differs in {named}")


def test_two_arms_of_one_recipe_are_refused():
    arms = {"undefended": [], "kl_3": [KL], "again": [KL, "defenses[0].beta=3.0"], "kl_1": [KL, "defenses[0].beta=1.0"]}
    (problem,) = refused(small(arms=arms))
    assert problem.startswith("again: is the same recipe as kl_3: the arms `kl_3` and `again` differ in nothing")


def test_two_arms_that_a_knob_makes_alike_are_refused_at_each_of_its_values():
    arms = {"undefended": [], "slow": ["evolve.learning_rate=1e-5"]}
    problems = refused(small(arms=arms, knobs={"evolve.learning_rate": [1e-3, 2e-3]}))
    assert [line.partition(":")[0] for line in problems] == ["slow-learning_rate_0.001", "slow-learning_rate_0.002"]


def test_what_a_defense_has_to_change_is_shown():
    made = plan(small(arms={"undefended": [], "watched": ["recipes/tiny/detection_0.9.yaml"]}))
    differs = {member.arm: member.differs for member in made.members}
    assert differs == {"undefended": (), "watched": ("scenarios.supervision.probability",)}
    assert any(line.endswith("differs in scenarios.supervision.probability") for line in plan_lines(made))


def test_the_same_steps_in_other_portions_are_a_fair_match():
    arms = {"undefended": [], "other": ["evolve.steps=72", "evolve.scenarios_per_step=16"]}
    assert len(plan(small(arms=arms)).members) == 4


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_is_in_order(path):
    study = read_study(path)
    assert path.stem in study.name
    made = plan(study)
    assert len({job.name for job in made.jobs}) == len(made.jobs)
    assert study.contrasts
    assert path.read_text().startswith("# ")


def test_shipped_studies_keep_their_runs_apart():
    folders = [read_study(path).folder for path in STUDIES]
    assert len({*folders}) == len(folders)


def test_default_contrasts_are_against_undefended():
    arms = {"kl_3": [KL], "undefended": [], "kl_1": [KL, "defenses[0].beta=1.0"]}
    assert small(arms=arms).contrasts == [("undefended", "kl_3"), ("undefended", "kl_1")]
    assert small(arms=arms, primary=[["kl_1", "kl_3"]]).contrasts == [("kl_1", "kl_3")]


@pytest.mark.parametrize(
    ("pairs", "seeds", "says"),
    [
        (1, 6, "with 6 seeds: over 2 tests (2 measures, contrasts: 1) the least p-value is 0.062 after Holm's "
               "correction; take 7 seeds or more"),
        (1, 7, None),
        (6, 8, "over 12 tests (2 measures, contrasts: 6) the least p-value is 0.094 after Holm's correction; take 9 "
               "seeds or more or name at most 3 in `primary`"),
        (6, 9, None),
        (31, 1, "with 1 seed: over 62 tests (2 measures, contrasts: 31) the least p-value is 1 after Holm's "
                "correction; take 12 seeds or more"),
        (126, 14, "the least p-value is 0.05 after Holm's correction; name at most 125 in `primary`"),
    ],
)  # fmt: skip
def test_too_few_seeds_for_the_primary_contrasts(pairs, seeds, says):
    arms = {"undefended": [], **{f"arm_{i}": [] for i in range(pairs)}}
    said = too_few_seeds(small(arms=arms, seeds=[*range(seeds)]))
    assert said is None if says is None else said is not None and said.endswith(says)


def test_every_block_of_a_study_has_its_tests():
    said = too_few_seeds(small(knobs={"evolve.learning_rate": [1e-3, 2e-3]}, testbeds={"a": [], "b": []}, seeds=[0]))
    assert said is not None
    assert "over 8 tests (2 measures, contrasts: 1, blocks: 4)" in said
    assert too_few_seeds(small(primary=[])) is None


def test_confirm_has_the_arms_of_defenses_and_enough_new_seeds():
    confirm, defenses = (read_study(RECIPES / "studies" / f"{name}.yaml") for name in ("confirm", "defenses"))
    assert (confirm.recipes, confirm.set) == (defenses.recipes, defenses.set)
    assert confirm.arms.items() <= defenses.arms.items()
    assert not {*confirm.seeds} & {*defenses.seeds}
    assert too_few_seeds(confirm) is None
    assert len(confirm.primary or []) == 4


def test_robust_alignment_has_a_control_that_differs_in_nothing_else():
    more = plan(read_study(RECIPES / "studies" / "more_defenses.yaml"))
    aligns = {job.name: job.recipe.align for job in more.alignments}
    plain = aligns["align-align_grpo"]
    for name in ("robust_entropy", "robust_frpo"):
        robust = aligns[f"align-{name}"]
        assert robust is not None
        assert robust.robust is not None
        assert robust.model_copy(update={"robust": None}) == plain


# --- running


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts FAKE in place of `atp`; sets what runs do and reads what was started."""

    class Fake:
        def behave(self, **runs: str) -> None:
            (tmp_path / "fake.json").write_text(json.dumps({name.replace("__", "-"): b for name, b in runs.items()}))

        def calls(self) -> list[str]:
            """Since the last time."""
            file = tmp_path / "calls.txt"
            lines = file.read_text().splitlines() if file.exists() else []
            file.unlink(missing_ok=True)
            return [" ".join(line.split()[:2]) for line in lines]

    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "fake.json").write_text("{}")
    monkeypatch.setattr(local, "ATP", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.setattr(local, "POLL_SECONDS", 0.01)
    return Fake()


@pytest.fixture
def atp(monkeypatch, capsys, tmp_path):
    """`atp study` on the small study; its exit code, output and errors."""

    def call(*arguments: str, study: Study | None = None) -> tuple[int, str, str]:
        path = write(study or small(), tmp_path)
        monkeypatch.setattr("sys.argv", ["atp", "study", str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


def listed(folder: Path = Path("runs/small")) -> dict[str, str]:
    """State by run."""
    study = json.loads((folder / "study.json").read_text())
    return {entry["name"]: entry["state"] for entry in (*study["alignments"], *study["members"])}


EVERYTHING = ["align", "undefended-seed0", "undefended-seed1", "kl_3-seed0", "kl_3-seed1"]


def test_the_next_command_names_the_directory_where_the_study_is_elsewhere(fake, atp):
    assert atp("--out", "else where")[1].splitlines()[-2:] == ["else where", "next: atp compare 'else where'"]


def test_a_study_that_has_not_been_started_is_not_compared(tmp_path, monkeypatch, capsys):
    path = write(small(), tmp_path)
    monkeypatch.setattr("sys.argv", ["atp", "compare", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    started = f"atp: {path}: this study has not been started; `atp study {path}` runs it"
    assert capsys.readouterr().err.startswith(started)


def test_everything_runs_once_alignment_first(fake, atp, tmp_path):
    code, output, errors = atp("--workers", "1")
    assert code == 0
    assert "atp: warning: no primary contrast can become significant" in errors
    assert fake.calls() == [f"run {name}" for name in EVERYTHING]
    assert listed() == dict.fromkeys(EVERYTHING, "complete")
    assert output.splitlines()[-3].startswith("small 148/148  ETA 0:00:00  kl_3-seed1: violations 2% -> 2%")
    assert output.splitlines()[-2:] == ["runs/small", f"next: atp compare {tmp_path}/study.yaml"]
    summary = json.loads(Path("runs/small/summary.json").read_text())
    assert [arm["dir"] for arm in summary["arms"]] == EVERYTHING[1:]
    entry = json.loads(Path("runs/small/study.json").read_text())["members"][2]
    assert entry["recipe"] == fingerprint(load(["runs/small/kl_3-seed0/recipe.yaml"]))

    assert atp()[0] == 0
    assert fake.calls() == []


def test_arms_and_seeds_that_are_added_are_run_alone(fake, atp):
    atp()
    fake.calls()
    arms = {"undefended": [], "kl_3": [KL], "kl_1": [KL, "defenses[0].beta=1.0"]}
    assert atp(study=small(arms=arms, seeds=[0, 1, 2]))[0] == 0
    new = ["undefended-seed2", "kl_3-seed2", "kl_1-seed0", "kl_1-seed1", "kl_1-seed2"]
    assert sorted(fake.calls()) == sorted(f"run {name}" for name in new)


def test_a_member_that_fails_does_not_stop_the_others(fake, atp):
    fake.behave(undefended__seed1="fails", kl_3__seed0="fails at once")
    code, output, errors = atp()
    assert code == 1
    states = dict.fromkeys(EVERYTHING, "complete") | {"undefended-seed1": "failed", "kl_3-seed0": "failed"}
    assert listed() == states
    assert "undefended-seed1 failed (exit code 1), see runs/small/undefended-seed1.log" in output
    assert "atp: undefended-seed1 failed: exit code 1; its last lines, from runs/small/undefended-seed1.log" in errors
    assert errors.count("what went wrong") == 2
    failed = json.loads(Path("runs/small/study.json").read_text())["members"][1]
    assert "what went wrong" in failed["error"]

    fake.calls()
    fake.behave()
    assert atp()[0] == 0  # what has a recipe is resumed, what has none is run
    assert sorted(fake.calls()) == ["resume undefended-seed1", "run kl_3-seed0"]
    assert listed() == dict.fromkeys(EVERYTHING, "complete")
    assert json.loads(Path("runs/small/study.json").read_text())["members"][1]["error"] is None


def test_without_an_alignment_nothing_starts_from_it(fake, atp):
    fake.behave(align="fails at once")
    code, _, errors = atp()
    assert (code, fake.calls()) == (1, ["run align"])
    assert "not started, for want of an alignment: undefended-seed0, undefended-seed1, kl_3-seed0" in errors


def test_a_run_that_is_interrupted_by_itself_is_left_for_the_next_time(fake, atp):
    fake.behave(kl_3__seed0="is interrupted")
    code, _, errors = atp()
    assert code == 75
    assert "1 of 4 runs are not complete; the same command continues" in errors
    assert listed()["kl_3-seed0"] == "interrupted"
    assert listed()["kl_3-seed1"] == "complete"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_runs_save(fake, atp, number, monkeypatch):
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.2)
    fake.behave(undefended__seed0="waits", undefended__seed1="waits")
    folder = Path("runs/small").absolute()

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not all((folder / f"undefended-seed{seed}" / "waits").exists() for seed in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, _, errors = atp()
    thread.join()
    assert code == 75
    assert f"{number.name}: the runs finish their step and save" in errors
    assert [(folder / f"undefended-seed{seed}" / "saved").exists() for seed in (0, 1)] == [True, True]
    states = listed()
    assert [states[name] for name in EVERYTHING] == ["complete", "interrupted", "interrupted", "waiting", "waiting"]
    fake.behave()
    fake.calls()
    assert atp()[0] == 0
    assert "resume undefended-seed0" in fake.calls()


def test_a_directory_of_another_recipe_is_refused_and_left_alone(fake, atp):
    atp()
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    fake.calls()
    code, _, errors = atp(study=small(set=["evolve.learning_rate=0.01"]))
    assert (code, fake.calls()) == (2, [])
    assert "runs/small/kl_3-seed1: was made with another recipe (evolve.learning_rate); give the arm another" in errors
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_a_study_may_be_moved(fake, atp):
    atp()
    fake.calls()
    Path("runs/small").rename("elsewhere")
    assert atp("--out", "elsewhere")[0] == 0
    assert fake.calls() == []


def test_a_second_runner_is_refused(fake, atp):
    Path("runs/small").mkdir(parents=True)
    with Path("runs/small/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, errors = atp()
    assert (code, fake.calls()) == (2, [])
    assert "runs/small: another `atp study` is at work here" in errors


def test_a_run_that_another_process_still_works_at_is_waited_for(fake, atp, monkeypatch):
    atp()
    fake.calls()
    run = Path("runs/small/kl_3-seed1")
    summary = (run / "summary.json").read_text()
    (run / "summary.json").unlink()
    with (run / "recipe.yaml").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def found_at_work(job: Job) -> bool:
            """The other process ends right after it was found."""
            found = record.at_work(job)
            if found:
                (run / "summary.json").write_text(summary)
                held.close()
            return found

        monkeypatch.setattr(local, "at_work", found_at_work)
        code, output, _ = atp()
    assert (code, fake.calls()) == (0, [])
    assert "kl_3-seed1 is at work in another process; waiting for it" in output


def test_only_some_arms(fake, atp):
    assert atp("--only", "kl_3")[0] == 0
    assert sorted(fake.calls()) == ["run align", "run kl_3-seed0", "run kl_3-seed1"]
    assert listed()["undefended-seed0"] == "waiting"
    code, _, errors = atp("--only", "kl_4")
    assert code == 2
    assert "--only kl_4: no such arm; known are undefended, kl_3" in errors


def test_one_member(fake, atp):
    code, _, errors = atp("--member", "kl_3-seed0")
    assert code == 2
    assert "starts from align, which is not complete" in errors
    assert atp("--member", "align")[0] == 0
    assert atp("--member", "kl_3-seed0")[0] == 0
    assert fake.calls() == ["run align", "run kl_3-seed0"]
    assert listed()["kl_3-seed0"] == "complete"
    assert listed()["kl_3-seed1"] == "waiting"
    assert atp("--member", "kl_3")[0] == 2


def test_a_dry_run_writes_nothing(fake, atp):
    code, output, errors = atp("--dry-run")
    assert (code, fake.calls(), Path("runs").exists()) == (0, [], False)
    assert errors.startswith("atp: warning: no primary contrast can become significant with 2 seeds: over 2 tests")
    assert "study small in runs/small: 4 members, 1 alignments" in output
    assert "  kl_3-seed1        to run, from align" in output
    assert "primary contrasts: kl_3 against undefended" in output
    atp()
    Path("runs/small/kl_3-seed1/summary.json").unlink()
    _, output, _ = atp("--dry-run")
    assert "  kl_3-seed1        to resume, from align" in output
    assert "  kl_3-seed0        is complete, from align" in output


def test_cores_are_shared(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "available_cores", lambda: 8)
    local.run_study(plan(small()), workers=4)
    threads = {line.split()[1]: line.split()[2] for line in (tmp_path / "calls.txt").read_text().splitlines()}
    assert threads == dict.fromkeys(EVERYTHING, "2") | {"align": "8"}  # one alignment has them all


def test_each_worker_has_a_gpu_of_its_own(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    fake.behave(**{name.replace("-", "__"): "complete" for name in EVERYTHING})
    local.run_study(plan(small()), workers=2)
    gpus = [line.split()[3] for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert set(gpus) <= {"2", "5"}
    assert gpus[0] == "2"
    assert local._devices(3) == [(0, "2"), (1, "5"), (2, "2")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert local._devices(2) == [(0, None), (1, None)]


def made(folder: Path) -> Plan:
    return plan(small(), folder)


def test_steps_of_runs_at_work_count_for_the_time_left(tmp_path):
    study = made(tmp_path / "s")
    assert local.total_steps(study.members) == 4 * (36 + 1)
    first = study.members[0]
    assert local.steps_done(first) == 0
    first.folder.mkdir(parents=True)
    (first.folder / "metrics.jsonl").write_text("{}\n{}\n{}")  # the third line is still being written
    assert local.steps_done(first) == 2


def test_the_news_come_when_a_step_was_taken(tmp_path):
    study, told = made(tmp_path / "s"), list[tuple[int, str]]()
    news = local._News(study.members, lambda step, text, important=False: told.append((step, text)))
    news.tell([])
    news.tell([])
    first = study.members[0]
    first.folder.mkdir(parents=True)
    (first.folder / "metrics.jsonl").write_text("{}\n" * 36)
    (first.folder / "summary.json").write_text("{}")
    news.tell([])
    assert told == [(0, "0 of 4 runs complete"), (37, "1 of 4 runs complete")]


def test_the_state_of_other_runs_is_kept(tmp_path):
    study = made(tmp_path / "s")
    first = record.Record(study)
    first.begin(study.jobs)
    first.update({"kl_3-seed0": "failed"}, error="why")
    record.Record(study).update({"kl_3-seed1": "running"})
    assert listed(tmp_path / "s") == dict.fromkeys(EVERYTHING, "waiting") | {
        "kl_3-seed0": "failed", "kl_3-seed1": "running",
    }  # fmt: skip
    assert not (tmp_path / "s" / "summary.json").exists()  # nothing to read yet


# --- Slurm


SBATCH = """#!/bin/bash
echo "$@" >> "$CALLS"
echo "$((40 + $(wc -l < "$CALLS")));cluster"
"""


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """A stand-in that gives jobs the numbers 41, 42, ...; the file of what it was called with."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "sbatch.txt"))
    return tmp_path / "sbatch.txt"


def test_two_arrays_are_submitted_one_after_the_other(sbatch, atp, tmp_path):
    code, output, _ = atp("--launcher", "slurm")
    assert code == 0
    folder = tmp_path / "runs" / "small" / "slurm"
    assert sbatch.read_text().splitlines() == [
        f"--parsable --array=1-1 {folder}/array.sbatch {folder}/alignments.txt",
        f"--parsable --dependency=afterok:41 --kill-on-invalid-dep=yes --array=1-4 {folder}/array.sbatch "
        f"{folder}/members.txt",
    ]
    assert output.splitlines() == ["alignments: 1 tasks of job 41", "members: 4 tasks of job 42"]
    subprocess.run(["bash", "-n", str(folder / "array.sbatch")], check=True)
    lines = [line.split() for line in (folder / "members.txt").read_text().splitlines()]
    assert [Path(run).name for run, _ in lines] == EVERYTHING[1:]
    for run, recipe in lines:  # as launch/slurm/study.sbatch reads them
        assert load([recipe]).run.dir == str(Path(run).relative_to(tmp_path))


def test_what_is_complete_is_not_submitted(sbatch, fake, atp):
    atp("--only", "kl_3")
    atp("--launcher", "slurm")
    [call] = sbatch.read_text().splitlines()
    assert "--array=1-2 " in call
    assert "--dependency" not in call
    atp()
    assert "everything is complete" in atp("--launcher", "slurm")[1]


def queue(tmp_path: Path, *tasks: str) -> None:
    """A stand-in for squeue that lists these tasks, and only if it is asked for all of this user's one by one."""
    arguments = "--me --noheader --array --format=%i"
    script = f'#!/bin/bash\n[ "$*" = "{arguments}" ] || exit 1\nprintf "%s\\n" {" ".join(tasks)}\n'
    (tmp_path / "bin" / "squeue").write_text(script)
    (tmp_path / "bin" / "squeue").chmod(0o755)


def test_what_waits_or_runs_in_the_queue_is_not_submitted_again(sbatch, fake, atp, tmp_path):
    atp("--launcher", "slurm")
    first = (tmp_path / "runs/small/slurm/members.txt").read_bytes()
    sbatch.unlink()
    queue(tmp_path, "7_1", "41_1", "42_2", "42_3", "42_4")
    code, output, _ = atp("--launcher", "slurm")
    folder = tmp_path / "runs" / "small" / "slurm"
    assert code == 0
    assert output.splitlines() == [
        "align is at work, as task 41_1",
        "undefended-seed1 is at work, as task 42_2",
        "kl_3-seed0 is at work, as task 42_3",
        "kl_3-seed1 is at work, as task 42_4",
        "members: 1 tasks of job 41",
    ]
    assert sbatch.read_text().splitlines() == [
        "--parsable --dependency=afterok:41_1 --kill-on-invalid-dep=yes --array=1-1 "
        f"{folder}/array.sbatch {folder}/members-2.txt"
    ]
    assert (folder / "members.txt").read_bytes() == first  # tasks that wait have yet to read it
    assert Path((folder / "members-2.txt").read_text().split()[0]).name == "undefended-seed0"

    atp("--member", "align")  # a task does not forget which one it is
    study = json.loads(Path("runs/small/study.json").read_text())
    assert study["alignments"][0]["task"] == "41_1"
    assert [entry["task"] for entry in study["members"]] == ["41_1", "42_2", "42_3", "42_4"]
    queue(tmp_path, "41_1", "42_2", "42_3", "42_4")
    assert "everything is complete or at work; nothing to submit" in atp("--launcher", "slurm")[1]


def test_without_a_queue_to_ask_what_a_process_holds_is_not_submitted(sbatch, fake, atp):
    atp("--member", "align")
    fake.behave(kl_3__seed0="fails")
    atp("--member", "kl_3-seed0")
    with Path("runs/small/kl_3-seed0/recipe.yaml").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        _, output, _ = atp("--launcher", "slurm")
    assert output.splitlines() == ["kl_3-seed0 is at work", "members: 3 tasks of job 41"]
    assert listed()["kl_3-seed0"] == "failed"  # as it was


def test_members_cannot_wait_for_an_alignment_outside_of_slurm(sbatch, fake, atp):
    fake.behave(align="fails")
    atp("--member", "align")
    with Path("runs/small/align/recipe.yaml").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, errors = atp("--launcher", "slurm")
    assert (code, sbatch.exists()) == (2, False)
    assert "runs/small/align: is at work, and not as a task in Slurm's queue; wait for it" in errors


def test_a_queue_that_does_not_answer_submits_nothing(sbatch, atp, tmp_path):
    atp("--launcher", "slurm")
    sbatch.unlink()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\necho no controller >&2\nexit 1\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    code, _, errors = atp("--launcher", "slurm")
    assert (code, sbatch.exists()) == (2, False)
    assert "was refused: no controller" in errors


def test_nothing_is_submitted_while_the_study_runs_here(sbatch, atp):
    Path("runs/small").mkdir(parents=True)
    with Path("runs/small/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, errors = atp("--launcher", "slurm")
    assert (code, sbatch.exists()) == (2, False)
    assert "another `atp study` is at work here" in errors


def test_a_dry_run_of_slurm_prints_all_and_writes_nothing(atp):
    code, output, _ = atp("--launcher", "slurm", "--dry-run")
    assert (code, Path("runs").exists()) == (0, False)
    assert "#SBATCH --requeue" in output
    assert "sbatch --parsable --dependency=afterok:ALIGNMENTS --kill-on-invalid-dep=yes --array=1-4" in output


def test_without_sbatch_nothing_is_written(atp, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, errors = atp("--launcher", "slurm")
    assert (code, Path("runs").exists()) == (2, False)
    assert "there is no `sbatch` on this machine" in errors


def task(folder: Path, tmp_path: Path, status: int) -> tuple[int, str]:
    """Run the script as the array's second task with stand-ins for srun and scontrol."""
    bin = tmp_path / "bin"
    for name, body in (
        ("srun", f'echo "srun $@" >> "$CALLS"\nexit {status}'),
        ("scontrol", 'echo "scontrol $@" >> "$CALLS"'),
    ):
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    (tmp_path / "sbatch.txt").unlink()
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "77"}
    done = subprocess.run(["bash", folder / "array.sbatch", folder / "members.txt"], env=environment, cwd="/")
    return done.returncode, (tmp_path / "sbatch.txt").read_text()


@pytest.mark.parametrize(("status", "code", "requeues"), [(0, 0, False), (75, 0, True), (1, 1, False)])
def test_a_task_runs_its_member_and_requeues_itself_when_interrupted(sbatch, atp, tmp_path, status, code, requeues):
    atp("--launcher", "slurm")
    ended, calls = task(tmp_path / "runs" / "small" / "slurm", tmp_path, status)
    assert ended == code
    first, *others = calls.splitlines()
    assert first.endswith(f"-m atp_rl study {tmp_path}/study.yaml --out runs/small --member undefended-seed1")
    assert others == (["scontrol requeue 77_2"] if requeues else [])


def test_only_models_that_need_one_ask_for_a_gpu():
    tiny = made(Path("runs/small"))
    assert "--gpus" not in slurm.script_text(tiny, Path("s.yaml"))
    member = tiny.members[0]
    large = member.recipe.model_copy(update={"model": member.recipe.model.model_copy(update={"name": "Qwen/Qwen3-8B"})})
    job = Member(**{**vars(member), "recipe": large})
    assert "#SBATCH --gpus-per-node=1" in slurm.script_text(Plan(tiny.study, tiny.folder, [], [job]), Path("s.yaml"))


def test_a_folder_that_a_list_cannot_name_is_refused(sbatch, atp):
    code, _, errors = atp("--launcher", "slurm", "--out", "a b")
    assert code == 2
    assert "choose a folder without blanks" in errors
    assert not Path("a b").exists()
