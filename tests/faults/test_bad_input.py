"""Bad input: a message that names the place and the fix, exit code 2, and nothing written or overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from atp_rl import pipeline, recipe
from atp_rl.cli import main
from atp_rl.model.policy import TINY, Policy
from atp_rl.scenarios import load, make_env
from atp_rl.scenarios.files import write_jsonl
from atp_rl.tracking.run import Run
from atp_rl.types import InputError
from tests import small_model
from tests.command_line import ROLE_PLAY, atp


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls `atp`, which must refuse and write nothing; its message."""

    def call(*arguments: str | Path) -> str:
        before = sorted(Path().rglob("*"))
        monkeypatch.setattr("sys.argv", ["atp", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert sorted(Path().rglob("*")) == before
        return capsys.readouterr().err

    return call


def run(*overrides: str) -> list[str]:
    return ["run", ROLE_PLAY, "track.wandb=disabled", "run.dir=run", *overrides]


WRONG_RECIPES = {
    "an unknown key": ("evolve.stepps=2", "unknown key `evolve.stepps`", "did you mean `evolve.steps`?"),
    "a wrong type": ("evolve.steps=many", "`evolve.steps` must be an integer", "got 'many'"),
    "an unknown testbed": ("scenarios.testbed=roleplay", "unknown testbed 'roleplay'", "did you mean 'role_play'?"),
    "an unknown defense": ("defenses=[kl_ancor]", "unknown defense 'kl_ancor'", "did you mean `kl_anchor`?"),
    "a defense's option": ("defenses=[{name: gate, max_rat: 1}]", "`defenses[0].max_rat`", "did you mean `max_rate`?"),
    "a defense's value": ("defenses=[{name: kl_anchor, beta: 0.0}]", "kl_anchor: `beta` must be > 0", "leave"),
    "an unknown learner": ("evolve.learner=policy_gradien", "`evolve.learner`", "did you mean 'policy_gradient'?"),
    "an unknown family": ("scenarios.families=[beekeper]", "unknown family 'beekeper'", "did you mean 'beekeeper'?"),
    "an unknown reward": ("evolve.rewards={payof: 1.0}", "unknown reward model 'payof'", "known: payoff, compliance"),
    "an option of TRL": ("align.trl.betta=1.0", "`align.trl.betta` of trl.DPOConfig", "did you mean `beta`?"),
    "a value of TRL's": ("align.trl.learning_rate=fast", "`align.trl.learning_rate`", "'fast'"),
    "a value TRL refuses": ("align.trl.lr_scheduler_type=cosin", "`align.trl` for dpo", "cosin"),
    "a model folder": ("model.name=./nowhere", "`model.name`", "./nowhere"),
    "a model on the Hub": ("model.name=nobody/nothing", "'nobody/nothing'", "cannot be loaded"),
    "a layer": ("model.lora.target_modules=[nope]", "`model.lora`", "nope"),
    "a pattern": ("model.lora.target_modules='(((('", "`model.lora`", "cannot be loaded"),
    "a seed": ("seed=4294967296", "`seed` must be less than 4294967296", "got 4294967296"),
    "nothing to align": ("scenarios.allowed=true", "`align`", "no pairs to learn from"),
    "no adapter": ("evolve.start_from=nowhere", "nowhere: no LoRA adapter here", "adapter_config.json"),
}


@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_a_recipe_that_is_wrong(case, refused):
    override, *expected = WRONG_RECIPES[case]
    message = refused(*run(override))
    for part in expected:
        assert part in message


def test_a_recipe_file_that_is_not_there(refused):
    Path("role_play.yaml").write_text("seed: 1\n")
    assert "no such recipe file; did you mean role_play.yaml?" in refused("run", "roleplay.yaml")


def test_a_file_is_named_with_its_key(refused):
    Path("mine.yaml").write_text("evolve:\n  steps: 2.5\n  group_sise: 4\n")
    lines = refused("run", ROLE_PLAY, "mine.yaml").splitlines()
    assert lines == [
        "atp: mine.yaml: `evolve.steps` must be an integer, got 2.5",
        "unknown key `evolve.group_sise` in mine.yaml; did you mean `evolve.group_size`?",
    ]


@pytest.mark.parametrize("command", ["run", "align", "predict"])
def test_a_study_in_place_of_a_recipe(command, refused):
    Path("grid.yaml").write_text("name: grid\nrecipes: [a.yaml]\narms: {undefended: []}\nseeds: [0]\n")
    expected = "atp: grid.yaml: is a study, not a recipe; `atp study grid.yaml` runs it\n"
    assert refused(command, "grid.yaml") == expected


@pytest.mark.parametrize("command", ["study", "compare"])
def test_a_recipe_in_place_of_a_study(command, refused):
    Path("mine.yaml").write_text("seed: 1\nevolve: {steps: 5}\n")
    expected = "atp: mine.yaml: is a recipe, not a study; `atp run mine.yaml` runs it\n"
    assert refused(command, "mine.yaml") == expected


def test_wandb_online_without_a_key(refused, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    message = refused("run", ROLE_PLAY, "run.dir=run", "track.wandb=online")
    assert "wandb login" in message
    assert "track.wandb=offline" in message


# -- scenario files --------------------------------------------------------------------------------------------------


def scenario_lines() -> list[dict]:
    write_jsonl(
        load({"split": "train", "per_family": 4, "families": ["ferry_pilot", "welder", "beekeeper"]}), Path("ok")
    )
    return [json.loads(line) for line in Path("ok").read_text().splitlines()]


def lacks_a_field(lines):
    del lines[1]["payoffs"]


def half_a_character(lines):
    lines[1]["texts"]["task"] += "\ud800"


def against_its_rule(lines):
    lines[1]["extra"] = {"required": lines[1]["extra"]["tempting"], "tempting": lines[1]["extra"]["required"]}


def equal_options(lines):
    lines[1]["options"] = ["Route A", " route a."]
    lines[1]["payoffs"] = {"Route A": 1, " route a.": 2}


def unknown_testbed(lines):
    lines[1]["testbed"] = "rollplay"


def no_positive_payoff(lines):
    lines[1]["payoffs"] = dict.fromkeys(lines[1]["options"], 0.0)


WRONG_FILES = {
    half_a_character: ["holds text that is not Unicode"],
    against_its_rule: ["`extra.required` must be the rule's option"],
    no_positive_payoff: ["the largest of `payoffs` must be positive"],
    lacks_a_field: ["line 2", "`payoffs`", "required"],
    equal_options: ["needs two different options"],
    unknown_testbed: ["unknown testbed 'rollplay'", "did you mean 'role_play'?"],
    list.clear: ["holds no scenario"],
}


@pytest.mark.parametrize("change", WRONG_FILES, ids=lambda change: change.__name__)
def test_a_scenario_file_that_is_wrong(change, refused):
    lines = scenario_lines()
    change(lines)
    Path("mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = refused(*run("scenarios.file=mine.jsonl"))
    assert "mine.jsonl" in message
    for part in WRONG_FILES[change]:
        assert part in message


@pytest.mark.parametrize("key", ["file", "paper"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [("{not json", "not JSON"), ("[" * 100_000, "nested too deeply"), ("", "not JSON"), (None, "cannot be read")],
)
def test_a_scenario_file_that_is_none(key, content, expected, refused):
    if content is not None:
        Path("mine.json").write_text(content)
    expected = "holds no scenario" if (key, content) == ("file", "") else expected
    message = refused(*run(f"scenarios.{key}=mine.json"))
    assert "mine.json" in message
    assert expected in message


PAPER_ITEM = {
    "id": "a",
    "environment": "baker",
    "system_prompt": "You are a baker.",
    "user_prompt": "Choose. IMPORTANT: end with JSON",
    "supervised_choice": "invest",
    "better_choice": "keep",
    "supervised_text": "s",
    "unsupervised_text": "u",
    "neutral_text": "n",
    "params": {"low_reward": 1.0, "high_reward": 2.0},
}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], ["holds no scenario"]),
        ({}, ["expected a JSON list"]),
        ([PAPER_ITEM, {k: v for k, v in PAPER_ITEM.items() if k != "better_choice"}],
         ["item 1", "`better_choice` must be str"]),
        ([PAPER_ITEM | {"better_choice": "Invest"}], ["needs two different options"]),
        ([PAPER_ITEM | {"params": {"low_reward": 1, "high_reward": 10**400}}], ["item 0", "`params.high_reward`"]),
        ([PAPER_ITEM | {"params": {"low_reward": 1}}], ["item 0", "`params.high_reward`"]),
    ],
)  # fmt: skip
def test_a_file_of_the_paper_that_is_wrong(items, expected, refused):
    Path("paper.json").write_text(json.dumps(items))
    message = refused(*run("scenarios.paper=paper.json"))
    for part in ["paper.json", *expected]:
        assert part in message


# -- what the scenarios of a run must have in common --------------------------------------------------------------


TINY_RECIPES = Path(ROLE_PLAY).parent
COLLUSION = str(TINY_RECIPES / "collusion.yaml")
QUIET = ["track.wandb=disabled", "run.dir=run"]


def questions(seats: list[int]) -> None:
    """Writes a question file of the paper: three families, whose items have so many seats in turn."""
    params = {"cooperation_threshold": 2, "high_reward": 1.5, "normal_reward": 1, "low_reward": 0.5}
    texts = dict.fromkeys(["question", "system_prompt", "user_prompt", "format_example"], "...")
    items = [
        {"environment": f"well {i % 3}", "cooperative_choice": "share", "independent_choice": "keep", **texts}
        | {"params": params | {"n": seats[i % len(seats)]}}
        for i in range(24)
    ]
    Path("paper.json").write_text(json.dumps(items))


def test_a_file_of_another_testbed(refused):
    questions([4])
    message = refused(*run("scenarios.paper=paper.json"))
    assert "paper.json: its scenarios are of collusion; set scenarios.testbed=collusion" in message


def test_a_file_of_several_testbeds(refused):
    both = [*load({"per_family": 4}), *load({"testbed": "collusion", "per_family": 4})]
    write_jsonl(both, Path("mine.jsonl"))
    message = refused(*run("scenarios.file=mine.jsonl"))
    assert "mine.jsonl: its scenarios are of collusion and role_play; give each testbed a file of its own" in message


@pytest.mark.parametrize("learner", ["policy_gradient", "population", "imitation"])
def test_training_games_of_different_sizes(learner, refused):
    questions([4, 4, 4, 6, 6, 6])
    settings = ["scenarios.paper=paper.json", "scenarios.collusion=null", f"evolve.learner={learner}"]
    message = refused("run", COLLUSION, *QUIET, *settings)
    assert f"`evolve.learner`: {learner}" in message
    assert "here are 4 and 6" in message


def test_a_scenario_with_too_few_problems_is_found_wherever_it_is(refused):
    spec = {"testbed": "tool_use", "problems": "sums", "per_family": 4}
    write_jsonl(load(spec), Path("mine.jsonl"))
    lines = [json.loads(line) for line in Path("mine.jsonl").read_text().splitlines()]
    lines[-1]["extra"]["problems"] = lines[-1]["extra"]["problems"][-1:]
    Path("mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ["scenarios.file=mine.jsonl", "scenarios.tool_use=null", "scenarios.rounds=4"]
    message = refused("run", TINY_RECIPES / "tool_use.yaml", *QUIET, *settings)
    assert f"scenario {lines[-1]['id']!r}: 4 rounds need 2 easy and 2 hard problems; it has 0 and 1" in message


def test_every_environment_is_built_once_with_the_rounds_that_it_is_played_with(monkeypatch):
    built = []

    def recorded(scenario, *, rounds, **played):
        built.append((scenario.id, rounds))
        return make_env(scenario, rounds=rounds, **played)

    monkeypatch.setattr(pipeline, "make_env", recorded)
    suites = pipeline.check(recipe.load([ROLE_PLAY, "scenarios.rounds=4", "evaluate.rounds=2", "align.rounds=3"]))
    rounds = {"train": 4, "align": 3, "gate": 2, "held_in": 2, "held_out": 2}
    assert sorted(built) == sorted((s.id, n) for name, n in rounds.items() for s in getattr(suites, name))


@pytest.mark.parametrize("override", ["scenarios.collusion.n=4", "scenarios.collusion.fixed=1"])
def test_a_population_is_not_measured_on_other_seats(override, refused, monkeypatch):
    Path("run/checkpoints/step_0001").mkdir(parents=True)
    trained = recipe.load([COLLUSION, str(TINY_RECIPES / "population.yaml")])
    Path("run/recipe.yaml").write_text(recipe.dump(trained))
    message = refused("evaluate", "run", "--set", "evaluate.rounds=2", "--set", override)
    assert f"`{override}`: the population has an adapter for each of 8 seats" in message
    assert f"have {4 if 'n=4' in override else 7} that learn" in message

    def reached(*_):
        raise InputError("the same seats")

    monkeypatch.setattr(pipeline, "load_policy", reached)
    assert "the same seats" in refused("evaluate", "run", "--set", "scenarios.collusion.peer_history=none")


# -- adapters and run directories ------------------------------------------------------------------------------------


def test_an_adapter_for_another_base_model(refused):
    shutil.copytree(small_model.aligned(), "adapter")
    message = refused(*run("evolve.start_from=adapter"))
    assert "adapter: the adapter was made for the base model" in message
    assert "not for 'tiny'" in message


def test_an_adapter_that_claims_to_fit_and_does_not(refused):
    shutil.copytree(small_model.aligned(), "adapter")
    config = json.loads(Path("adapter/adapter_config.json").read_text()) | {"base_model_name_or_path": "tiny"}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    message = refused(*run("evolve.start_from=adapter"))
    assert "adapter: does not fit the base model 'tiny'" in message


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"target_modules": ["nope"]}, "does not fit the base model"),
        ({"r": "eight"}, "does not fit the base model"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' are not supported"),
    ],
)
def test_an_adapter_with_a_strange_configuration(changed, expected, refused):
    policy = Policy.load(TINY, lora=small_model.lora(), seed=0)
    policy.save_adapter(Path("adapter"))
    config = json.loads(Path("adapter/adapter_config.json").read_text()) | changed
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    assert expected in refused(*run("evolve.start_from=adapter"))


def test_an_adapter_that_is_not_finite(refused):
    policy = Policy.load(TINY, lora=small_model.lora(), seed=0)
    small_model.nudge(policy, float("nan"), seed=0)
    policy.save_adapter(Path("adapter"))
    assert "holds weights that are not finite" in refused(*run("evolve.start_from=adapter"))


def test_an_adapter_of_another_rank_than_the_recipe_records(refused):
    Policy.load(TINY, lora=small_model.lora(), seed=0).save_adapter(Path("adapter"))
    message = refused(*run("evolve.start_from=adapter"))
    assert "adapter: has another shape than `model.lora`" in message
    assert "set model.lora.r=2 model.lora.alpha=4" in message


def test_an_overlay_alone_runs_nothing(refused):
    overlay = Path(ROLE_PLAY).parents[1] / "defenses" / "kl_anchor.yaml"
    assert "nothing to run" in refused("run", overlay, "--dry-run")


def test_a_launcher_that_kept_no_promise(refused, monkeypatch):
    monkeypatch.setenv("ATP_RL_PROMISED", "2 ddp")
    assert "the launch promises 2 process(es) with ddp, but here are 1 with none" in refused(*run())


def test_choice_mode_where_decisions_are_no_names_of_options(refused):
    tools = Path(ROLE_PLAY).with_name("tool_use.yaml")
    message = refused("run", tools, "sampler.mode=choice", "track.wandb=disabled", "run.dir=run")
    assert "`sampler.mode`: choice needs decisions that are names of options" in message
    message = refused("run", ROLE_PLAY, "sampler.mode=choice", "model.thinking=true", "run.dir=run")
    assert "`sampler.mode`: choice is for models that answer at once" in message


def test_weights_that_are_none(refused):
    shutil.copytree(small_model.base(), "m")
    Path("m/model.safetensors").write_bytes(b"garbage")
    assert "model './m'" in refused(*run("model.name=./m"))
    Path("m/model.safetensors").unlink()
    shutil.rmtree("m/x", ignore_errors=True)
    assert "holds no *.safetensors" in refused(*run("model.name=./m"))


def test_a_weight_defense_without_weights_to_defend(refused):
    overlay = Path(ROLE_PLAY).with_name("in_context.yaml")
    message = refused("run", ROLE_PLAY, overlay, "defenses=[kl_anchor]", "track.wandb=disabled", "run.dir=run")
    assert "kl_anchor changes nothing where no weights are updated" in message


def test_two_processes_in_one_run_directory(refused, tmp_path):
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("seed: 0\n")
    with Run.open(Path("run")).locked():
        assert "run: another process is at work here" in refused("resume", "run")


def test_places_for_results_that_are_none(refused):
    Path("file").write_text("mine")
    assert "file: is not a directory" in refused("demo", "--out", "file")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can make a folder")
def test_places_where_nothing_can_be_written(refused):
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("seed: 0\n")
    Path("run/summary.json").write_text("{}")
    for command in (run("run.dir=/proc/x"), ["demo", "--out", "/proc/x"], ["tiny", "build", "/proc/x"]):
        message = refused(*command)
        assert "/proc/x: cannot be " in message
        assert "choose another" in message


def test_a_dry_run_looks_at_the_run_directory_too(refused):
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("seed: 0\n")
    assert "run.dir run: holds a run already" in refused(*run(), "--dry-run")
    Path("file").write_text("mine")
    assert "run.dir file/run: cannot be made" in refused(*run("run.dir=file/run"), "--dry-run")


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_a_scenario_file_that_changed_since_the_run_began(change, refused, tmp_path):
    scenario_lines()
    small = (f"scenarios.file={Path('ok')}", f"model.name={small_model.base()}", "align=null", "evolve.start_from=base")
    with pytest.MonkeyPatch.context() as patch:  # killed before its first step
        patch.setattr(pipeline, "_stages", lambda recipe, directory, suites: directory.path)
        pipeline.run(recipe.load([ROLE_PLAY, *small, "scenarios.families=null", "run.dir=run", "track.wandb=disabled"]))
    before = Path("ok").read_text()
    if change == "edited":
        Path("ok").write_text(before + "\n")
    else:
        Path("ok").rename("moved")
    message = refused("resume", "run")
    assert f"{tmp_path / 'ok'}: " in message
    assert ("has changed since this run began" if change == "edited" else "cannot be read any more") in message


def test_an_adapter_in_pickle_is_not_touched(refused):
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "tiny"}')
    Path("adapter/adapter_model.bin").write_bytes(b"\x80\x04N.")
    assert "needs adapter_config.json and adapter_model.safetensors" in refused(*run("evolve.start_from=adapter"))


def test_an_adapter_without_lora_weights(refused):
    import torch

    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "tiny"}')
    save_file({"x": torch.zeros(1)}, "adapter/adapter_model.safetensors")
    assert "holds no LoRA weights" in refused(*run("evolve.start_from=adapter"))


def test_a_used_run_directory(refused):
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("seed: 0\n")
    message = refused(*run())
    assert "run.dir run: holds a run already; continue it with `atp resume run`" in message
    assert Path("run/recipe.yaml").read_text() == "seed: 0\n"


def test_a_run_directory_that_cannot_be_made(refused):
    Path("file").write_text("mine")
    assert "run.dir file/run: cannot be made" in refused(*run("run.dir=file/run"))
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("command", [["resume"], ["evaluate"], ["report"], ["compare"]])
def test_a_directory_without_a_run(command, refused):
    Path("empty").mkdir()
    message = refused(*command, "empty")
    assert "empty" in message


def test_evolve_alone_needs_an_adapter(refused):
    assert "`evolve.start_from`" in refused("evolve", ROLE_PLAY, "run.dir=run")


def test_align_alone_needs_a_section(refused):
    assert "no `align` section" in refused("align", "seed=1", "run.dir=run")


def test_play_needs_a_scenario_that_exists(refused):
    assert "no scenario has 'zzz' in its id" in refused("play", "zzz")


def test_a_demo_never_writes_over_other_files(refused):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    assert "is not empty and holds no demo" in refused("demo", "--out", "mine")


def test_a_process_of_its_own_says_the_same(tmp_path):
    _, errors = atp(*run("evolve.stepps=2"), cwd=tmp_path, expect=2)
    assert "did you mean `evolve.steps`?" in errors
    assert "Traceback" not in errors
    _, errors = atp("run", ROLE_PLAY, "--no-such-option", cwd=tmp_path, expect=2)
    assert "--no-such-option" in errors
    assert list(tmp_path.iterdir()) == []


def test_the_tiny_models_are_refused_where_they_can_do_nothing(refused):
    tools = ("scenarios.testbed=tool_use", "scenarios.families=null")
    assert "tiny knows no tools; set model.name=tiny_tools" in refused(*run(*tools), "--dry-run")
    assert "tiny_tools can do tool_use with" in refused(*run("model.name=tiny_tools"), "--dry-run")


def test_whom_to_copy_needs_a_learner_that_copies(refused):
    message = refused(*run("evolve.imitation.peers=ring"))
    assert "`evolve.imitation` is for the learner imitation alone" in message
