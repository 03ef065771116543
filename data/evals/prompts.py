"""Prompts: class names put into templates, whose mean embedding stands for the class.

    templates("80")              the list of that name, or of a file: a template a line, {c} (or {})
                                 is the class
    synonyms("happy;smiling")    the names of a class: each goes into every template

data/evals/templates/: 7, the ensemble of seven from CLIP's notebook that FLIP, SLIP, A-CLIP and
MaskCLIP use for ImageNet; 80, CLIP's for ImageNet (GLIP's too); 85, the 80 and five about scenes,
of MaskCLIP's segmentation. Sources: open_clip's OPENAI_IMAGENET_TEMPLATES and
SIMPLE_IMAGENET_TEMPLATES, and the prompts of the code of "Extract Free Dense Labels from CLIP",
whose 85 these are.
"""

from pathlib import Path

TEMPLATE_FOLDER = Path(__file__).parent / "templates"


def load_templates(which: str | Path) -> list[str]:
    """Return the templates of a list that comes with the code, by its number, or of a file.

    {c} in a template is the class. ValueError: there is neither such a list nor such a file.
    """
    path = TEMPLATE_FOLDER / f"{which}.txt"
    if not path.is_file():
        path = Path(which)
    if not path.is_file():
        known = ", ".join(sorted((p.stem for p in TEMPLATE_FOLDER.glob("*.txt")), key=int))
        raise ValueError(
            f"templates: {str(which)!r}; known: {known}, or a file with a template a line"
        )
    return read_templates(path)


def read_templates(path: Path) -> list[str]:
    """Read the templates of a file; empty lines are skipped, {} is the same as {c}."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    templates = [line.replace("{}", "{c}") for line in lines if line]
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"{path}: {template!r}: no {{c}} in it, where the class goes")
    if not templates:
        raise ValueError(f"{path}: no templates in it; one a line, {{c}} is the class")
    return templates


def split_synonyms(line: str) -> list[str]:
    """Split a class's names, which are separated by semicolons.

    No name of the usual sets holds a semicolon, while commas and slashes occur.
    """
    return [name.strip() for name in line.split(";") if name.strip()]
