"""recipe: merging, strictness, and what a user reads when a recipe is wrong."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from atp_rl import cli
from atp_rl import recipe as module
from atp_rl.recipe import (
    DefenseSpec,
    Probability,
    Recipe,
    check_defenses,
    check_trl_options,
    dump,
    json_schema,
    load,
    replaced_defenses,
)
from atp_rl.types import InputError
from tests.command_line import ROLE_PLAY

BASE = """
align: {method: dpo}
evolve: {steps: 5}
"""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)


def write(text: str, name: str = "x.yaml") -> str:
    Path(name).write_text(text)
    return name


def problems(*args: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(args)
    return str(caught.value).splitlines()


# -- merging ---------------------------------------------------------------------------------------------------------


def test_no_arguments_give_the_defaults():
    recipe = load([])
    assert recipe == Recipe()
    assert (recipe.model.name, recipe.align, recipe.evolve, recipe.defenses) == ("tiny", None, None, [])


@pytest.mark.parametrize(("text", "keep"), [("all", "all"), ("1", 1), ("3", 3)])
def test_all_checkpoints_stay_or_so_many(text, keep):
    recipe = load([f"run.keep={text}"])
    assert recipe.run.keep == keep
    assert load([write(dump(recipe))]) == recipe


def test_later_arguments_win():
    one = write("seed: 1\nevolve: {steps: 7, rewards: {payoff: 1.0}}", "one.yaml")
    two = write("seed: 2\nevolve: {rewards: {compliance: 0.5}}", "two.yaml")
    assert load(["base.yaml", one, two]).seed == 2
    assert load(["base.yaml", two, one]).seed == 1
    assert load(["base.yaml", one, "seed=3", two]).seed == 2
    recipe = load(["base.yaml", one, two])
    assert recipe.evolve
    assert recipe.evolve.steps == 7
    assert recipe.evolve.rewards == {"payoff": 1.0, "compliance": 0.5}  # mappings merge


def test_lists_are_replaced_not_joined():
    one = write("defenses: [a, b]\ntrack: {tags: [x, y]}")
    recipe = load([one, "defenses=[c]", write("track: {tags: [z]}", "two.yaml")])
    assert recipe.defenses == [DefenseSpec(name="c")]
    assert recipe.track.tags == ["z"]


KL = "defenses:\n  - {name: kl_anchor, beta: 3.0}\n"
REPLAY = "defenses:\n  - {name: replay, batch: 32}\n"


def test_a_file_that_replaces_the_defenses_of_another_is_named_with_the_list_of_both():
    args = ["base.yaml", write(KL, "kl.yaml"), write(REPLAY, "replay.yaml")]
    combined = "defenses=[{name: kl_anchor, beta: 3.0}, {name: replay, batch: 32}]"
    assert replaced_defenses(args) == [
        "replay.yaml replaces the defenses kl_anchor of kl.yaml; to combine them write both into one list: "
        f'"{combined}"'
    ]
    assert [spec.name for spec in load([*args, combined]).defenses] == ["kl_anchor", "replay"]
    assert replaced_defenses([*args, "seed=2"]) == replaced_defenses(args)


@pytest.mark.parametrize(
    "args",
    [
        ["kl.yaml", "base.yaml"],
        ["kl.yaml", "kl.yaml"],
        ["none.yaml", "kl.yaml"],
        ["kl.yaml", "none.yaml"],
        ["kl.yaml", "defenses=[replay]"],
        ["kl.yaml", "replay.yaml", "defenses=[gate]"],
    ],
)
def test_defenses_that_nothing_replaces_by_accident(args: list[str]):
    write(KL, "kl.yaml")
    write(REPLAY, "replay.yaml")
    write("defenses: []", "none.yaml")
    assert replaced_defenses(args) == []


@pytest.mark.parametrize("command", ["run", "align", "predict"])
def test_a_command_warns_once_of_replaced_defenses(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    args = [ROLE_PLAY, write(KL, "kl.yaml"), write(REPLAY, "replay.yaml")]
    monkeypatch.setattr(sys, "argv", ["atp", command, *args, *(["--dry-run"] if command != "predict" else [])])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().err.count("atp: warning: replay.yaml replaces the defenses kl_anchor of kl.yaml") == 1


def test_a_section_can_be_switched_off_and_on():
    assert load(["base.yaml", "evolve=null"]).evolve is None
    recipe = load(["base.yaml", "evolve=null", "evolve.steps=2"])
    assert recipe.evolve
    assert recipe.evolve.steps == 2


def test_overrides_are_typed():
    recipe = load(
        [
            "base.yaml",
            "evolve.steps=20",
            "evolve.learning_rate=3e-5",
            "scenarios.allowed=true",
            "model.revision=null",
            "defenses=[{name: kl_anchor, beta: 3.0}, gate]",
            "defenses[0].beta=2",
            "evaluate.rounds=6",
        ]
    )
    assert recipe.evolve
    assert recipe.evolve.steps == 20
    assert recipe.evolve.learning_rate == 3e-5
    assert recipe.scenarios.allowed is True
    assert recipe.model.revision is None
    assert [(d.name, d.options) for d in recipe.defenses] == [("kl_anchor", {"beta": 2}), ("gate", {})]


def test_an_override_reaches_below_a_plain_value():
    base = write("scenarios: {supervision: alternating}")
    assert load([base]).scenarios.supervision == "alternating"
    args = [base, "scenarios.supervision.probability=0.9"]
    assert load(args).scenarios.supervision == Probability(probability=0.9)
    assert load([*args, "scenarios.supervision.fine=2"]).scenarios.supervision == Probability(probability=0.9, fine=2)
    assert load([*args, "scenarios.supervision=random"]).scenarios.supervision == "random"


def test_an_override_splits_on_its_first_equals_sign():
    assert load(["run.dir=a=b"]).run.dir == "a=b"


def test_a_file_whose_name_holds_an_equals_sign_is_a_file():
    assert load([write("seed: 9", "seed=1")]).seed == 9


def test_an_override_longer_than_a_file_name_may_be():
    assert load(["model.name=" + "m" * 5000]).model.name == "m" * 5000


# -- YAML ------------------------------------------------------------------------------------------------------------


def test_numbers_without_a_dot_are_numbers():
    recipe = load(["base.yaml", write("evolve: {learning_rate: 1e-4, weight_decay: 1}")])
    assert recipe.evolve
    assert recipe.evolve.learning_rate == 1e-4  # PyYAML alone would read the string '1e-4'
    assert recipe.evolve.weight_decay == 1.0  # an integer is a number


@pytest.mark.parametrize(("text", "value"), [("'no'", "no"), ("2026-01-31", "2026-01-31"), ("'7'", "7"), ("'~'", "~")])
def test_strings_that_look_like_something_else(text: str, value: str):
    assert load([write(f"track: {{group: {text}}}")]).track.group == value


def test_an_empty_file_changes_nothing():
    assert load([write("# only a comment\n")]) == Recipe()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: [1", "x.yaml: not valid YAML, line 1: expected ',' or ']'"),
        ("seed: 1\nseed: 2", "x.yaml: not valid YAML, line 2: found duplicate key seed"),
        ("seed: 1\n---\nseed: 2", "x.yaml: not valid YAML, line 2: but found another document"),
        (
            "seed: !!python/name:os.system",
            "x.yaml: not valid YAML, line 1: could not determine a constructor for the tag",
        ),
        ("seed: &a [*a]", "x.yaml: not valid YAML, line 1: YAML recursive aliases are not supported"),
        ("- seed", "x.yaml: must be a mapping of recipe keys (like `seed: 0`), not a list or a single value"),
        ("seed", "x.yaml: must be a mapping of recipe keys"),
        ("3", "x.yaml: must be a mapping of recipe keys"),
        ("yes: 1", "x.yaml: `True`: a key must be a string; put it in quotes"),
        ("run: {dir: '${oc.env:HOME}/x'}", "x.yaml: `run.dir` is '${oc.env:HOME}/x': interpolation is not supported"),
        ("run: {dir: '${x'}", "x.yaml: `run.dir` holds `${`: interpolation is not supported; write the value"),
        ("track: {tags: [a, '${seed}']}", "x.yaml: `track.tags[1]` is '${seed}': interpolation is not supported"),
        ("model: {name: '???'}", "x.yaml: `model.name` is '???': a value left open is not supported; write the value"),
    ],
)
def test_unreadable_files(text: str, expected: str):
    [line] = problems(write(text))
    assert line.startswith(expected)


def test_many_aliases_of_aliases_are_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    [line] = problems(write("\n".join(lines)))
    assert "expansion exceeds" in line


def test_a_file_that_is_not_there_or_not_text():
    assert problems("bass.yaml") == ["bass.yaml: no such recipe file; did you mean base.yaml?"]
    assert problems("q.yaml") == ["q.yaml: no such recipe file; give a YAML file, or an override `key.sub=value`"]
    Path("x.bin").write_bytes(b"\xff\xfe\x00")
    assert problems("x.bin")[0].startswith("x.bin: not a readable UTF-8 text file: ")
    Path("folder").mkdir()
    assert problems("folder")[0].startswith("folder: not a readable UTF-8 text file: ")


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        ("evolve.steps=", "no value for `evolve.steps`; write `evolve.steps=null` for none"),
        ("evolve.steps= ", "no value for `evolve.steps`; write `evolve.steps=null` for none"),
        ("my recipe=3", "neither a file nor an override; write `key.sub=value` or `defenses[0].option=value`"),
        ("defenses.0.beta=3", "neither a file nor an override; write `key.sub=value` or `defenses[0].option=value`"),
        ("run.dir=${oc.env:HOME}", "`run.dir`: interpolation is not supported; write the value"),
        ("run.dir=${x", "`run.dir`: interpolation is not supported; write the value"),
        ("run.dir=???", "`run.dir` is '???': a value left open is not supported; write the value"),
    ],
)
def test_unreadable_overrides(arg: str, expected: str):
    assert problems("base.yaml", arg) == [f"override `{arg}`: {expected}"]


def test_an_override_past_the_end_of_a_list():
    [line] = problems(write("defenses: [a]"), "defenses[3].beta=1")
    assert line.startswith("override `defenses[3].beta=1`: list index out of range")


# -- strictness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evolve.steps=many", "`evolve.steps` must be an integer, got 'many'"),
        ("evolve.steps=true", "`evolve.steps` must be an integer, got true"),
        ("evolve.steps=2.0", "`evolve.steps` must be an integer, got 2.0"),
        ("evolve.steps='8'", "`evolve.steps` must be an integer, got '8'; remove the quotes"),
        ("evolve.steps=-1", "`evolve.steps` must be greater than or equal to 0, got -1"),
        ("evolve.learning_rate=fast", "`evolve.learning_rate` must be a number, got 'fast'"),
        ("evolve.learning_rate='1e-4'", "`evolve.learning_rate` must be a number, got '1e-4'; remove the quotes"),
        ("evolve.learning_rate=true", "`evolve.learning_rate` must be a number, got true"),
        ("evolve.learning_rate=0", "`evolve.learning_rate` must be greater than 0, got 0"),
        ("evolve.learning_rate=.nan", "`evolve.learning_rate` must be a finite number, got NaN"),
        ("evolve.rewards={}", "`evolve.rewards` must have at least 1 item, got {}"),
        ("evolve.rewards.payoff=much", "`evolve.rewards.payoff` must be a number, got 'much'"),
        ("scenarios.allowed=1", "`scenarios.allowed` must be true or false, got 1"),
        ("scenarios.allowed='yes'", "`scenarios.allowed` must be true or false, got 'yes'"),
        ("scenarios.families=baker", "`scenarios.families` must be a list, got 'baker'"),
        (
            "scenarios.supervision.probability=1.5",
            "`scenarios.supervision.probability` must be less than or equal to 1, got 1.5",
        ),
        ("scenarios.supervision.fine=1", "`scenarios.supervision.probability` is required"),
        ("track.group=no", "`track.group` must be a string, got false; put it in quotes"),
        ("model.revision=1234567", "`model.revision` must be a string, got 1234567; put it in quotes"),
        ("model.lora.dropout=1.0", "`model.lora.dropout` must be less than 1, got 1.0"),
        ("model.lora.target_modules=3", "`model.lora.target_modules` must be a string, got 3; put it in quotes"),
        (
            "model.lora.target_modules=[q_proj, 3]",
            "`model.lora.target_modules[1]` must be a string, got 3; put it in quotes",
        ),
        ("model=null", "`model` must be a mapping, got null"),
        ("run.keep=last", "`run.keep` must be all, or how many of the last checkpoints stay (1 or more), got 'last'"),
        ("run.keep=0", "`run.keep` must be all, or how many of the last checkpoints stay (1 or more), got 0"),
        ("run.keep=true", "`run.keep` must be all, or how many of the last checkpoints stay (1 or more), got true"),
        ("run.keep=2.0", "`run.keep` must be all, or how many of the last checkpoints stay (1 or more), got 2.0"),
        ("run.dir.x=3", '`run.dir` must be a string, got {"x": 3}'),
        ("defenses=kl_anchor", "`defenses` must be a list, got 'kl_anchor'"),
        ("defenses=[{beta: 1}]", "`defenses[0].name` is required"),
        ("align.trl=[1]", "`align.trl` must be a mapping, got [1]"),
        (
            "evolve.learner=incontext",
            "`evolve.learner` must be 'policy_gradient', 'population', 'imitation' or 'in_context', got 'incontext'; "
            "did you mean 'in_context'?",
        ),
        ("align.method=ppo", "`align.method` must be 'dpo', 'grpo' or 'sft', got 'ppo'; did you mean 'dpo'?"),
        ("track.wandb=of", "`track.wandb` must be 'auto', 'online', 'offline' or 'disabled', got 'of'"),
    ],
)
def test_wrong_values(override: str, expected: str):
    assert f"override `{override}`: {expected}" in problems("base.yaml", override)


def test_a_misspelt_supervision_lists_the_patterns():
    [line] = problems("scenarios.supervision=alternatng")
    assert line.startswith(
        "override `scenarios.supervision=alternatng`: `scenarios.supervision` must be 'alternating', "
    )
    assert line.endswith("got 'alternatng'; did you mean 'alternating'?")


def test_unknown_keys_name_the_file_and_the_nearest_key():
    path = write("evolve: {stpes: 3}\nsteps: 3\nmodle: {}\nscenarios: {supervision: {probability: 1.0, fines: 2}}")
    assert set(problems("base.yaml", path, "zzz=1", "model.lora.zzz=1")) == {
        "unknown key `evolve.stpes` in x.yaml; did you mean `evolve.steps`?",
        "unknown key `steps` in x.yaml; did you mean `evolve.steps`?",
        "unknown key `modle` in x.yaml; did you mean `model`?",
        "unknown key `scenarios.supervision.fines` in x.yaml; did you mean `scenarios.supervision.fine`?",
        "unknown key `zzz` in override `zzz=1`; known are seed, model, scenarios, align, reward_model, evolve, "
        "sampler, defenses, evaluate, track, run",
        "unknown key `model.lora.zzz` in override `model.lora.zzz=1`; known are r, alpha, dropout, target_modules",
    }


def test_a_problem_names_the_source_that_set_the_key():
    one = write("seed: a\nevolve: {steps: a, group_size: 4}", "one.yaml")
    two = write("evolve: {steps: b}", "two.yaml")
    assert problems("base.yaml", one, two) == [
        "one.yaml: `seed` must be an integer, got 'a'",
        "two.yaml: `evolve.steps` must be an integer, got 'b'",
    ]
    assert problems("base.yaml", two, one)[1] == "one.yaml: `evolve.steps` must be an integer, got 'a'"


def test_all_problems_are_reported_at_once():
    assert len(problems(write("seed: a\ntrack: {wandb: x}\nrun: {dir: 3}"), "evaluate.every=0")) == 4
    assert problems("none=", "q.yaml", "zzz=1") == [  # unreadable sources come first, alone
        "override `none=`: no value for `none`; write `none=null` for none",
        "q.yaml: no such recipe file; give a YAML file, or an override `key.sub=value`",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "evolve: {start_from: base}",
            "`evolve.steps` must be at least 1 for learner policy_gradient; set the number of policy updates",
        ),
        (
            "evolve: {start_from: base, learner: in_context, steps: 2}",
            "`evolve.steps` must be 0 for learner in_context, which updates no weights; set `scenarios.rounds` instead",
        ),
        (
            "evolve: {start_from: base, steps: 2, group_size: 1}",
            "`evolve.group_size` must be at least 2 for learner policy_gradient: one episode has no baseline",
        ),
        (
            "evolve: {steps: 2}",
            "`evolve` starts from the aligned adapter, but there is no `align`; "
            "add it, or set `evolve.start_from` to base",
        ),
        ("align: {tries: 2}", "`align` needs `align.method` (dpo, grpo or sft), or `align.adapter` to skip training"),
        ("scenarios: {paper: a, file: b}", "`scenarios.file` excludes `scenarios.paper`; set one of the two to null"),
    ],
)
def test_fields_that_do_not_fit_together(text: str, expected: str):
    assert problems(write(text)) == [f"x.yaml: {expected}"]


@pytest.mark.parametrize(
    "text",
    [
        "evolve: {start_from: base, steps: 1}",
        "evolve: {start_from: base, learner: in_context, group_size: 1}",
        "evolve: {steps: 1}\nalign: {adapter: some/folder}",
        "evolve: {steps: 1, start_from: some/folder}",
        "scenarios: {paper: a, file: null}",
    ],
)
def test_fields_that_do_fit_together(text: str):
    load([write(text)])


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load([]).seed = 3  # pyright: ignore[reportAttributeAccessIssue]


# -- dump and schema -------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: "${" not in s and s != "???")
scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | names
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=names | st.sampled_from(["no", "1e-4", "~", "null", "2026-01-31", "0x1f", "1_000", "1:30", "=", "<<", " a "]),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    rewards=st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3),
    supervision=st.sampled_from(["random", {"probability": 0.5}, {"probability": 1.0, "fine": 2.5}]),
    trl=st.dictionaries(names, values, max_size=3),
    defenses=st.lists(st.fixed_dictionaries({"name": names, "beta": values}), max_size=2),
)
def test_a_dumped_recipe_loads_back(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    name: str,
    rate: float,
    rewards: dict[str, float],
    supervision: Any,
    trl: dict[str, Any],
    defenses: list[Any],
):
    recipe = Recipe.model_validate(
        {
            "seed": seed,
            "model": {"name": name, "lora": {"target_modules": [name]}},
            "scenarios": {"supervision": supervision},
            "align": {"method": "sft", "trl": trl},
            "evolve": {"steps": 1, "learning_rate": rate, "rewards": rewards},
            "defenses": defenses,
        }
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    assert load([str(path)]) == recipe


def test_a_dump_shows_defaults_and_keeps_defenses_flat():
    shown = yaml.safe_load(dump(load(["base.yaml", "defenses=[{name: kl_anchor, beta: 3}, gate]"])))
    assert list(shown) == list(Recipe.model_fields)
    assert shown["evolve"]["group_size"] == 8
    assert shown["defenses"] == [{"name": "kl_anchor", "beta": 3}, {"name": "gate"}]


def test_the_schema_describes_every_field():
    schema = json_schema()
    assert schema["$defs"]["Evolve"]["properties"]["clip_epsilon"] == {
        "default": 0.2,
        "description": "Half-width of the clip of the probability ratio.",
        "exclusiveMinimum": 0,
        "title": "Clip Epsilon",
        "type": "number",
    }
    for definition in [schema, *schema["$defs"].values()]:
        assert definition["description"]
        for name, field in definition["properties"].items():
            assert "description" in field or "$ref" in field, name  # a section is described by its own definition


# -- checks that import other rooms ----------------------------------------------------------------------------------


class Alone:
    def beside(self, others: list[object]) -> None:
        """Whatever stands beside it is fine."""


@dataclass
class KLAnchor(Alone):
    beta: float = 0.2
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.beta == 0:
            raise ValueError("beta 0 anchors nothing; leave the defense out")

    def beside(self, others) -> None:
        assert self in others


@dataclass
class Gate(Alone):
    n: int

    def beside(self, others) -> None:
        assert self in others


@pytest.fixture
def defenses(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("atp_rl.defenses")
    fake.__dict__.update(DEFENSES={"kl_anchor": KLAnchor, "gate": Gate}, Plan=dict)
    monkeypatch.setitem(sys.modules, "atp_rl.defenses", fake)


@pytest.mark.usefixtures("defenses")
def test_defenses_are_built_in_order():
    specs = load(["defenses=[{name: gate, n: 64}, {name: kl_anchor, beta: 3, layers: [1, 2]}, kl_anchor]"]).defenses
    assert check_defenses(specs) == [Gate(n=64), KLAnchor(beta=3.0, layers=(1, 2)), KLAnchor()]


@pytest.mark.usefixtures("defenses")
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("kl_ancor", "`defenses[0].name`: unknown defense 'kl_ancor'; did you mean `kl_anchor`?"),
        ("zzz", "`defenses[0].name`: unknown defense 'zzz'; known are gate, kl_anchor"),
        ("{name: kl_anchor, betta: 3}", "unknown option `defenses[0].betta` of kl_anchor; did you mean `beta`?"),
        ("{name: kl_anchor, zzz: 3}", "unknown option `defenses[0].zzz` of kl_anchor; known are beta, layers"),
        ("{name: kl_anchor, beta: much}", "`defenses[0].beta` must be a number, got 'much'"),
        ("{name: kl_anchor, beta: true}", "`defenses[0].beta` must be a number, got true"),
        ("{name: kl_anchor, layers: [1, b]}", "`defenses[0].layers[1]` must be an integer, got 'b'"),
        ("{name: kl_anchor, beta: 0}", "`defenses[0]` (kl_anchor): beta 0 anchors nothing; leave the defense out"),
        ("gate", "`defenses[0]` (gate): Gate.__init__() missing 1 required positional argument: 'n'"),
    ],
)
def test_wrong_defenses(spec: str, expected: str):
    with pytest.raises(InputError) as caught:
        check_defenses(load([f"defenses=[{spec}]"]).defenses)
    assert str(caught.value) == expected


@pytest.mark.usefixtures("defenses")
def test_all_wrong_defenses_are_reported_at_once():
    with pytest.raises(InputError) as caught:
        check_defenses(load(["defenses=[zzz, {name: kl_anchor, betta: 1}, {name: gate, n: 1}, gate]"]).defenses)
    assert [line.split("]")[0][-1] for line in str(caught.value).splitlines()] == ["0", "1", "3"]


def test_trl_options():
    pytest.importorskip("trl")
    check_trl_options("dpo", {"beta": 0.1, "learning_rate": 1e-5})
    check_trl_options("grpo", {"num_generations": 4})
    check_trl_options("sft", {"packing": False})
    with pytest.raises(InputError) as caught:
        check_trl_options("dpo", {"betta": 0.1, "output_dir": "x", "zzzzzz": 1})
    lines = str(caught.value).splitlines()
    assert lines[0] == "`align.trl.output_dir` is set by atp_rl; remove it"
    assert lines[1] == "unknown option `align.trl.betta` of trl.DPOConfig; did you mean `beta`?"
    assert lines[2].startswith("unknown option `align.trl.zzzzzz` of trl.DPOConfig; known are accelerator_config, ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"learning_rate": "fast"}, "`align.trl.learning_rate` must be a number, got 'fast'"),
        ({"loss_type": "sigmoid"}, "`align.trl.loss_type` must be a list, got 'sigmoid'"),
        ({"loss_type": ["sigmoid", 1]}, "`align.trl.loss_type[1]` must be a string, got 1; put it in quotes"),
        ({"max_steps": 2.5}, "`align.trl.max_steps` must be an integer, got 2.5"),
    ],
)
def test_values_of_trl_options(options, expected):
    with pytest.raises(InputError) as caught:
        check_trl_options("dpo", options)
    assert str(caught.value) == expected


def test_loading_a_recipe_imports_neither_torch_nor_trl():
    source = Path(module.__file__).read_text()
    top = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not any("torch" in line or "trl" in line or "defenses" in line for line in top)
