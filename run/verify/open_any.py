"""Open a model of any format, or a run, as a model that can be converted."""

from dataclasses import dataclass, replace
from pathlib import Path

from glimpse.model import safe_unpickler, tensor_files
from glimpse.model.convert import FORMATS, detect_format
from glimpse.model.portable import CONFIG_FILE, PortableModel, is_glimpse_folder
from glimpse.run.lib.config import build, relocate_tokenizer
from glimpse.run.train.load_model import find_model, open_portable


@dataclass(frozen=True)
class NoOptions:
    """Load options of a format without any."""


def load_any(
    path: Path, weights: str = "student", given: dict | None = None
) -> tuple[str, PortableModel]:
    """Load the model at a path; return (format, model).

    weights: student or teacher of a run. given: options that the files leave open, fields of the
    format's LoadOptions. ValueError, one line that begins with the path or the option, if the path
    holds no model that Glimpse can load, or is damaged.
    """
    try:
        if format_name := detect_format(path):
            return format_name, load_foreign(path, format_name, weights, given or {})
        check_known_format(path)
        folder = find_model(path)
        if given:
            raise ValueError(
                f"--given {' '.join(given)}: {path} needs no further settings; remove --given"
            )
        return "glimpse" if is_glimpse_folder(folder) else "checkpoint of a run", open_portable(
            folder, weights
        )
    except ValueError as error:
        if str(path) in str(error):
            raise error from None
        raise ValueError(f"{path}: {error}") from None
    # A key is missing in the files, or a value has an unexpected type or size.
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = f"{type(error).__name__}: {safe_unpickler.first_line(error)}"
        source = "its format or --given" if given else "its format"
        raise ValueError(f"{path}: damaged, or does not match {source} ({what})") from error


def load_foreign(path: Path, format_name: str, weights: str, given: dict) -> PortableModel:
    """Load a model of a foreign format."""
    if weights != "student":
        raise ValueError(
            f"--weights {weights}: {path} is a model of {format_name}; only a run has a student"
            " and a teacher; remove --weights"
        )
    module = FORMATS[format_name]
    options = build(
        getattr(module, "LoadOptions", NoOptions), given, f"--given for {format_name}: "
    )
    model = module.load(path, **{key: getattr(options, key) for key in given})
    tokenizer = relocate_tokenizer(model.about.tokenizer, path)
    return replace(model, about=replace(model.about, tokenizer=tokenizer))


def check_known_format(path: Path) -> None:
    """Raise ValueError if the path is a file, or a folder whose config.json has no known format."""
    if path.is_file():
        tensor_files.read_tensors(path)  # raises ValueError if it cannot be read
        raise ValueError(
            f"{path}: the tensors belong to no known architecture; `run/convert.py inspect"
            f" {path}` lists them"
        )
    if (path / CONFIG_FILE).is_file() and not is_glimpse_folder(path):
        tree = tensor_files.read_json(path / CONFIG_FILE)
        name = tree.get("model_type") or tree.get("architecture")
        if name is None:
            raise ValueError(
                f"{path / CONFIG_FILE}: unknown format: neither model_type nor architecture"
            )
        raise ValueError(f"{path / CONFIG_FILE}: unknown architecture {name}")
