"""Prompts: class names put into templates, whose mean embedding stands for the class.

    templates("80")              the list of that name, or of a file: a template a line, {c} (or {})
                                 is the class
    synonyms("happy;smiling")    the names of a class: each goes into every template

data/evals/templates/: 7, the ensemble of seven from CLIP's notebook that FLIP, SLIP, A-CLIP and
MaskCLIP
use for ImageNet; 80, CLIP's for ImageNet (GLIP's too); 85, the 80 and five about scenes, of
MaskCLIP's segmentation. Sources: open_clip's OPENAI_IMAGENET_TEMPLATES and
SIMPLE_IMAGENET_TEMPLATES, and the prompts of the code of "Extract Free Dense Labels from CLIP",
whose 85 these are.
"""

from pathlib import Path

LISTS = Path(__file__).parent / "templates"


def templates(which: str | Path) -> list[str]:
    """The templates of a list that comes with the code, by its number, or of a file; {c} is the
    class.
    """
    path = LISTS / f"{which}.txt"
    if not path.is_file():
        path = Path(which)
    if not path.is_file():
        known = ", ".join(sorted((p.stem for p in LISTS.glob("*.txt")), key=int))
        raise ValueError(
            f"templates: {str(which)!r}; known: {known}, or a file with a template a line"
        )
    return read(path)


def read(path: Path) -> list[str]:
    """The templates of a file."""
    found = [
        line.strip().replace("{}", "{c}") for line in path.read_text().splitlines() if line.strip()
    ]
    for line in found:
        if "{c}" not in line:
            raise ValueError(f"{path}: {line!r}: no {{c}} in it, where the class goes")
    if not found:
        raise ValueError(f"{path}: no templates in it; one a line, {{c}} is the class")
    return found


def synonyms(line: str) -> list[str]:
    """A class's names, separated by semicolons: no name of the usual sets holds one, while commas
    and slashes occur.
    """
    return [name.strip() for name in line.split(";") if name.strip()]
