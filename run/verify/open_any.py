"""Open whatever lies at a path as a model that can be converted."""

from dataclasses import dataclass, replace
from pathlib import Path

from glimpse.model import safe_unpickler, tensor_files
from glimpse.model.convert import FORMATS, claimed
from glimpse.model.portable import CONFIG, Portable, is_one
from glimpse.run.lib.config import beside, build
from glimpse.run.train.load_model import find, portable


@dataclass(frozen=True)
class Nothing:
    """What formats can be given that tell everything themselves."""


def anything(
    path: Path, weights: str = "student", given: dict | None = None
) -> tuple[str, Portable]:
    """(format, model) of whatever lies at a path; ValueError, a line that names the path, where it
    is nothing of ours, or damaged.

    given: what a format is told beside its files, as its Given has it.
    """
    try:
        if format := claimed(path):
            if weights != "student":
                raise ValueError(
                    f"--weights {weights}: {path} is a model of {format}; a run has a student and a"
                    " teacher"
                )
            known = build(
                getattr(FORMATS[format], "Given", Nothing), given or {}, f"--given for {format}: "
            )
            model = FORMATS[format].load(path, **{key: getattr(known, key) for key in given or {}})
            return format, replace(
                model, about=replace(model.about, tokenizer=beside(model.about.tokenizer, path))
            )
        if path.is_file():
            tensor_files.read(path)  # tells why it cannot be read
            raise ValueError(
                f"{path}: tensors of no architecture that is known here; `run/convert.py inspect"
                f" {path}` lists them"
            )
        if (path / CONFIG).is_file() and not is_one(path):
            tree = tensor_files.read_json(path / CONFIG)
            says = (
                tree.get("model_type")
                or tree.get("architecture")
                or "neither model_type nor architecture"
            )
            raise ValueError(
                f"{path / CONFIG}: of no architecture that is known here: it says {says}"
            )
        found = find(path)
        if given:
            raise ValueError(
                f"--given {' '.join(given)}: {path} tells everything itself; leave it out"
            )
        return "glimpse" if is_one(found) else "checkpoint of a run", portable(found, weights)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None
    # files hold no such key, type or size
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = f"{type(error).__name__}: {safe_unpickler.first_line(error)}"
        raise ValueError(
            f"{path}: damaged, or not what its format{' or --given' if given else ''} says ({what})"
        ) from error
