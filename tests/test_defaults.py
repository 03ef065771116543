"""Defaults of all config keys, options and recipes, against tests/golden/defaults.txt.

A change of a default changes the results of every config that does not set the key, so it must not
happen by accident. After a change on purpose, write the file again and commit it:

    python -m tests.test_defaults
"""

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from glimpse.model.methods import METHODS
from glimpse.run.evals import EVALS
from glimpse.run.lib.config import RunConfig

GOLDEN = Path(__file__).parent / "golden" / "defaults.txt"
HEADER = "# Defaults of all config keys; written by: python -m tests.test_defaults"


def evaluation_modules() -> list[ModuleType]:
    """Return the modules of all evaluations."""
    names = [f"glimpse.run.evals.{file}" for file in EVALS.values()]
    return [importlib.import_module(name) for name in names]


def recipes(module: ModuleType) -> dict[str, Any]:
    """Return {"RECIPES['name']": recipe} of an evaluation; {} if it has no recipes."""
    by_name: dict[str, Any] = {}
    for name, value in getattr(module, "RECIPES", {}).items():
        key = f"RECIPES[{name!r}]"
        # A tuple has one recipe for each size of tower.
        if isinstance(value, tuple):
            by_name.update({f"{key}[{i}]": recipe for i, recipe in enumerate(value)})
        else:
            by_name[key] = value
    return by_name


def nested_dataclasses(cls: type) -> Iterator[type]:
    """Yield a config dataclass and those that its fields have as their type, at any depth."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from nested_dataclasses(inner)


def config_dataclasses() -> set[type]:
    """Return the dataclasses of RunConfig, and those of all options and recipes."""
    classes = set(nested_dataclasses(RunConfig))
    for method in METHODS.values():
        classes.update(nested_dataclasses(method.Options))
    for module in evaluation_modules():
        classes.add(module.Options)
        classes.update(type(recipe) for recipe in recipes(module).values())
    return classes


def default_of(field: dataclasses.Field) -> str:
    """Format a field's default; "required" if it has none."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"


def default_lines() -> list[str]:
    """Return `module.Class.field = default` for every field of every config dataclass."""
    lines = []
    for cls in config_dataclasses():
        name = f"{cls.__module__}.{cls.__qualname__}"
        for field in dataclasses.fields(cls):
            lines.append(f"{name}.{field.name} = {default_of(field)}")
    return lines


def recipe_lines() -> list[str]:
    """Return `module.RECIPES['name'].field = value` for the recipes of every evaluation."""
    lines = []
    for module in evaluation_modules():
        for name, recipe in recipes(module).items():
            for field in dataclasses.fields(recipe):
                value = getattr(recipe, field.name)
                lines.append(f"{module.__name__}.{name}.{field.name} = {value!r}")
    return lines


def golden_lines() -> list[str]:
    lines = [HEADER, *default_lines(), *recipe_lines()]
    return [line.replace("glimpse.", "", 1) for line in sorted(lines)]


def test_defaults_are_the_golden_ones():
    expected = GOLDEN.read_text().splitlines()

    changed = sorted(set(golden_lines()) ^ set(expected))

    assert not changed, (
        "defaults differ from tests/golden/defaults.txt; if this is on purpose, run"
        " `python -m tests.test_defaults` and commit the file:\n" + "\n".join(changed)
    )


def test_every_section_of_a_config_is_compared():
    names = {cls.__name__ for cls in config_dataclasses()}

    sections = {"RunConfig", "DataConfig", "View", "OptimConfig", "ModelConfig"}
    assert names >= sections | {"VisionConfig", "TextConfig", "Size", "Options"}


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(golden_lines()) + "\n")
