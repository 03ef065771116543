"""Generate the table of config keys in docs/config.md from the config dataclasses.

    python -m glimpse.run.lib.config_table          print the table
    python -m glimpse.run.lib.config_table --write  replace the table in docs/config.md

The description of a key is the comment above its field, or after it on the same line.
tests/docs/test_config_table.py fails if the table in docs/config.md is out of date.
"""

import argparse
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from typing import Any

import yaml

from glimpse.data.loader import DataConfig
from glimpse.data.transforms import View
from glimpse.model.methods import METHODS
from glimpse.model.text import TextConfig
from glimpse.model.towers import ModelConfig, Size
from glimpse.model.vision import VisionConfig
from glimpse.run.lib.config import ROOT, OptimConfig, RunConfig, tuples_to_lists

PAGE = ROOT / "docs/config.md"
# The lines of the page between which the table is.
BEGIN = "<!-- keys: begin -->\n"
END = "<!-- keys: end -->\n"
# {keys above: dataclass}; the methods' options are added to them.
SECTIONS = {
    "": RunConfig,
    "data": DataConfig,
    "views.NAME": View,
    "model": ModelConfig,
    "model.custom": Size,
    "model.vision": VisionConfig,
    "model.text": TextConfig,
    "optim": OptimConfig,
}


def read_field_comments(cls: type) -> dict[str, str]:
    """Return {field of a dataclass: its comment}, read from the source code."""
    field_comments: dict[str, str] = {}
    above: list[str] = []  # the lines of a comment above a field
    source = inspect.getsource(cls)
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = lines[token.start[0] - 1]
        text = token.string.removeprefix("#").strip()
        is_whole_line = line.lstrip().startswith("#")
        # A comment above a field may have several lines: collect them until the field's line.
        if is_whole_line:
            above.append(text)
            following = lines[token.start[0]].strip()
            if following.startswith("#"):
                continue
            line = following
        name = re.match(r"\s*(\w+):", line)
        if name:
            field_comments[name[1]] = " ".join(above) if is_whole_line else text
        above = []
    return field_comments


def format_default(field: dataclasses.Field) -> str:
    """Format a field's default as YAML; "required" if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return ""
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default == "":
        return '`""`'
    value: Any = tuples_to_lists(field.default)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return f"`{text.removesuffix('...').strip()}`"


def format_type(field: dataclasses.Field) -> str:
    """Format a field's type for readers of YAML: `tuple[float, ...]` -> "list of float"."""
    annotation = field.type
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if "[" in str(annotation):
        name = str(annotation)
    name = re.sub(r"\b[a-z_]+\.(?:[a-z_]+\.)*(?=[A-Z])", "", name)
    name = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", name)
    name = re.sub(r"tuple\[(\w+)(, \1)+\]", lambda m: f"{m[0].count(',') + 1} x {m[1]}", name)
    return name.replace(" | ", " or ").replace(" or None", "")


def table_rows(cls: type) -> Iterator[tuple[str, ...]]:
    """Yield (key, type, default, description) of every field that is not a section.

    Raises ValueError if a field has no comment.
    """
    descriptions = read_field_comments(cls)
    for field in dataclasses.fields(cls):
        is_section = dataclasses.is_dataclass(field.type) or field.name in ("views", "options")
        if cls in (RunConfig, ModelConfig) and is_section:
            continue
        if field.name not in descriptions:
            raise ValueError(
                f"{cls.__name__}.{field.name}: no comment; describe the key in a comment above it"
            )
        description = descriptions[field.name].replace("|", "\\|")
        yield f"`{field.name}`", format_type(field), format_default(field), description


def config_table() -> str:
    """Return the sections of docs/config.md as Markdown tables, one row per key."""
    sections = dict(SECTIONS)
    for name, method in METHODS.items():
        if dataclasses.fields(method.Options):
            sections[f"options, with method: {name}"] = method.Options

    text = ""
    for section, cls in sections.items():
        text += f"\n### {section or 'Top level'}\n\n"
        text += "| key | type | default | meaning |\n|---|---|---|---|\n"
        for cells in table_rows(cls):
            text += f"| {' | '.join(cells)} |\n"
    return text + "\n"


def replace_table(page: str) -> str:
    """Return the text of the page with the current table between BEGIN and END."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"{PAGE}: add the lines {BEGIN.strip()} and {END.strip()}; the table goes between them"
        )
    return before + begin + config_table() + end + after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update docs/config.md")
    if parser.parse_args().write:
        PAGE.write_text(replace_table(PAGE.read_text()))
    else:
        print(config_table())


if __name__ == "__main__":
    main()
