"""The study file: which runs there are, as strict typed data. `members.plan` makes runs of it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

import atp_rl
from atp_rl.recipe import Recipe, problem, read_mapping
from atp_rl.types import InputError

PACKAGE = Path(atp_rl.__file__).parent
RECIPES = PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else PACKAGE.parent / "recipes"
"""Those of the wheel, or else of the checkout."""
UNDEFENDED = "undefended"
"""The arm that the others are held against, where a file does not say otherwise."""


def _check_name(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"\w[\w.+-]*", value):
        raise ValueError(f"must be letters, digits and . _ + - (it names a folder), got {value!r}")
    return value


Label = Annotated[str, BeforeValidator(_check_name)]
Sources = list[Annotated[str, Field(min_length=1)]]
"""Recipe files and `key.sub=value` overrides; later ones win."""
Key = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.\[\]]*$")]
Knob = str | int | float | bool


class Study(BaseModel):
    """A grid of runs: testbeds x models x arms x knobs x seeds."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    name: Label
    """Names the study; W&B groups its runs by it."""
    dir: Annotated[str, Field(min_length=1)] | None = None
    """Directory of its runs; null is runs/<name>."""
    recipes: Sources = []
    """What every run starts from."""
    testbeds: Annotated[dict[Label, Sources], Field(validate_default=True)] = {}
    """An axis: files and overrides laid over `recipes`."""
    models: dict[Label, Sources] = {}
    """An axis: files and overrides laid over the testbed's."""
    set: Sources = []
    """Files and overrides of every run, laid over the model's."""
    arms: Annotated[dict[Label, Sources], Field(min_length=1)]
    """An axis: the defenses and controls that are compared, laid over `set`."""
    knobs: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z_][\w.\[\]]*$")], Annotated[list[Knob], Field(min_length=1)]
    ] = {}
    """An axis each: a recipe key and its values."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = [0]
    """An axis: roots of a run's random draws. Alignment keeps the recipe's own."""
    primary: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None
    """The contrasts that are tested, fixed before the runs; null is every arm against `undefended`."""

    @field_validator("testbeds")
    @classmethod
    def _starts_somewhere(cls, testbeds: dict[str, Sources], info: ValidationInfo) -> dict[str, Sources]:
        if not testbeds and info.data.get("recipes") == []:
            raise ValueError("or `recipes` must name the files that the runs start from")
        return testbeds

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len({*seeds}) < len(seeds):
            raise ValueError("holds a seed twice; leave one out")
        return seeds

    @field_validator("primary")
    @classmethod
    def _known_arms(cls, primary: list[list[str]] | None, info: ValidationInfo) -> list[list[str]] | None:
        arms = info.data.get("arms", {})
        for pair in primary or []:
            if unknown := [arm for arm in pair if arms and arm not in arms]:
                raise ValueError(f"names the arm {unknown[0]!r}, which is not there; known are {', '.join(arms)}")
            if pair[0] == pair[1]:
                raise ValueError(f"holds {pair[0]!r} against itself")
        return primary

    @property
    def folder(self) -> Path:
        return Path(self.dir or f"runs/{self.name}")

    @property
    def contrasts(self) -> list[tuple[str, str]]:
        """(reference, arm) of every primary contrast."""
        if self.primary is not None:
            return [(a, b) for a, b in self.primary]
        reference = UNDEFENDED if UNDEFENDED in self.arms else next(iter(self.arms))
        return [(reference, arm) for arm in self.arms if arm != reference]


def read_study(path: Path) -> Study:
    """The study in this file; its file names are found as `find_sources` says.

    Raises:
        InputError: one line per problem, each with the file, the key and the fix.
    """
    try:
        value = read_mapping(str(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if Recipe.model_fields.keys() & value.keys() and not Study.model_fields.keys() & value.keys():
        raise InputError(f"{path}: is a recipe, not a study; `atp run {path}` runs it")
    try:
        return Study.model_validate(value)
    except ValidationError as error:
        notes = [(key, str(path)) for key in (*value, *Study.model_fields)]
        raise InputError("\n".join(problem(detail, notes, of=Study) for detail in error.errors())) from None


def find_sources(sources: Sources) -> list[str]:
    """File names as paths that exist: from the current folder, or else among the recipes of the package.

    Overrides, and files that are nowhere, stay as they are: `recipe.load` says what is wrong with them.
    """

    def found(source: str) -> str:
        if os.path.isfile(source) or "=" in source:
            return source
        packaged = RECIPES / source.removeprefix("recipes/")
        return str(packaged) if packaged.is_file() else source

    return [found(source) for source in sources]


def study_folder(path: Path) -> Path | None:
    """The directory of a study that is named by it or by its file (here or in the package); None for anything else."""
    if (path / "study.json").exists():
        return path
    path = Path(find_sources([str(path)])[0])
    return read_study(path).folder if path.is_file() and path.suffix in (".yaml", ".yml") else None
