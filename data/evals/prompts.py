"""Prompt templates for class names; the mean embedding of a class's prompts represents it.

    load_templates("80")             a list by its name, or a file: one template per line, with {c}
                                     or {} for the class
    split_synonyms("happy;smiling")  the names of a class; each is put into every template

Lists in data/evals/templates/:

    7   the ensemble in CLIP's notebook that FLIP, SLIP, A-CLIP and MaskCLIP use for ImageNet
    80  CLIP's templates for ImageNet, also used by GLIP
    85  the 80 and five about scenes, for MaskCLIP's segmentation

Sources: open_clip's SIMPLE_IMAGENET_TEMPLATES (7) and OPENAI_IMAGENET_TEMPLATES (80), and the code
of "Extract Free Dense Labels from CLIP" (85).
"""

from pathlib import Path

TEMPLATE_FOLDER = Path(__file__).parent / "templates"


def load_templates(name: str | Path) -> list[str]:
    """Return the templates of a list in TEMPLATE_FOLDER, or of a file; {c} stands for the class.

    Raise ValueError if there is neither such a list nor such a file.
    """
    path = TEMPLATE_FOLDER / f"{name}.txt"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        lists = sorted((path.stem for path in TEMPLATE_FOLDER.glob("*.txt")), key=int)
        raise ValueError(
            f"templates: unknown {str(name)!r}; known: {', '.join(lists)}, or a file with one"
            " template per line"
        )
    return read_templates(path)


def read_templates(path: Path) -> list[str]:
    """Read the templates in a file; skip empty lines, and replace {} by {c}."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    templates = [line.replace("{}", "{c}") for line in lines if line]
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"{path}: {template!r} has no {{c}}, which stands for the class")
    if not templates:
        raise ValueError(
            f"{path}: no templates in it; write one per line, with {{c}} for the class"
        )
    return templates


def split_synonyms(line: str) -> list[str]:
    """Split the names of a class at semicolons.

    Unlike commas and slashes, semicolons do not occur in class names of the usual sets.
    """
    return [name.strip() for name in line.split(";") if name.strip()]
