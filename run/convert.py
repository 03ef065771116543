"""Convert a run, a checkpoint or a foreign model to another format, and verify the result.

The first argument is the target format; the source format is detected.

    # export a run as one safetensors file and config.json
    python run/convert.py glimpse runs/quickstart models/quickstart
    # export a run for open_clip
    python run/convert.py open_clip runs/aclip_b16 models/for_open_clip
    # import a foreign model
    python run/convert.py glimpse models/CLIP-ViT-B-32 models/b32
    # describe the model at a path
    python run/convert.py inspect models/CLIP-ViT-B-32

docs/converting.md describes the formats, what each cannot express, and how to start training from
an imported model.
"""

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import yaml

from glimpse.data.builders import tokenizer_files
from glimpse.data.tokenizer import Tokenizer, build_tokenizer, vocabulary_file
from glimpse.model import portable
from glimpse.model.convert import FORMATS
from glimpse.model.convert.resize import resize_model
from glimpse.model.portable import PortableModel, select_vision_weights
from glimpse.model.safe_unpickler import first_line
from glimpse.run.lib import config
from glimpse.run.lib.cli import run_script
from glimpse.run.train import load_model
from glimpse.run.verify import (
    open_any,
    reference_libs,  # noqa: F401
)
from glimpse.run.verify import proofs as prove
from glimpse.run.verify.describe import architecture_summary, describe, format_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    args = config.argument_parser(__doc__)
    commands = args.add_subparsers(required=True, metavar="FORMAT|inspect")
    for name in ["glimpse", *(name for name, module in FORMATS.items() if hasattr(module, "save"))]:
        add_format(commands.add_parser(name, help=f"convert a model to {name}"), name)
    command = commands.add_parser("inspect", help="describe the model at a path")
    command.add_argument("path", type=Path)
    command.set_defaults(do=inspect)
    for command in commands.choices.values():
        command.add_argument(
            "--given",
            nargs="+",
            default=[],
            metavar="KEY=VALUE",
            help="settings that the source files do not contain, e.g. config=ViT-B-32",
        )
    options = args.parse_args()
    options.do(options)


def add_format(command: ArgumentParser, name: str) -> None:
    """Add the command-line options of a conversion to a format."""
    command.add_argument(
        "source", type=Path, help="a run folder, a checkpoint, or a model of any format"
    )
    command.add_argument("out", type=Path, help="the folder to write; it must not exist")
    command.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="weights of a run; teacher: the moving average of the student",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="dtype of the stored weights"
    )
    command.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="resize to this image size: one number, or height and width",
    )
    command.add_argument(
        "--patch",
        type=int,
        metavar="PIXELS",
        help="resize the patch embedding to this patch size, e.g. from L/16 to L/14",
    )
    command.add_argument(
        "--tokenizer",
        metavar="SPEC",
        help="tokenizer of the source if its files do not name it; format of data.tokenizer",
    )
    if name == "megatron":
        command.add_argument(
            "--tp",
            type=int,
            default=1,
            metavar="N",
            help="number of tensor-parallel ranks to split the weights for",
        )
        command.add_argument(
            "--spec",
            choices=("local", "te"),
            default="local",
            help="layer spec of the vision tower; te: Transformer Engine",
        )
    command.set_defaults(do=convert, format=name)


def inspect(args: Namespace) -> None:
    print(describe(args.path, parse_given(args.given)))


def convert(args: Namespace) -> None:
    """Convert the source, verify the result and move it into place."""
    if args.out.exists() or args.out.is_symlink():
        raise ValueError(f"{args.out} exists; choose a new folder, or remove this one")

    # Load the source. Unless it is resized, its reference library can verify it.
    given = parse_given(args.given)
    source_format, model = open_any.load_any(args.source, args.weights, given)
    open_reference = None
    if args.image_size is not None or args.patch is not None:
        model = resize_model(model, parse_image_size(args.image_size), args.patch)
    elif hasattr(FORMATS.get(source_format), "reference_model"):
        open_reference = partial(FORMATS[source_format].reference_model, args.source, **given)
    model, tokenizer = complete_tokenizer(model, args)

    # Write to a temporary folder, and move it into place only after verification.
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(
        prefix=f"{args.out.name}.", suffix=".part", dir=args.out.parent, ignore_cleanup_errors=True
    ) as scratch:
        folder = Path(scratch, args.out.name)
        notes = write_model(
            model, args, tokenizer, folder, include_source_notes=source_format != "glimpse"
        )
        if args.format in FORMATS:
            written = FORMATS[args.format].load(folder)
        else:
            written = load_model.open_converted(folder)
        notes += verify_conversion(model, written, args, tokenizer, folder, open_reference)
        folder.rename(args.out)

    summary = f"{architecture_summary(written)}, {args.dtype}, {format_size(args.out)}"
    print(f"{args.out}: {args.format}, {summary}")
    for line in notes:
        print(f"  {line}")


def parse_given(given: list[str]) -> dict:
    """Parse the arguments of --given to {KEY: VALUE}."""
    options = {}
    for pair in given:
        key, _, text = pair.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        if value is None:
            raise ValueError(f"--given {pair}: no value; write KEY=3, KEY=word or KEY=[224,448]")
        options[key] = value
    return options


def parse_image_size(given: list[int] | None) -> int | tuple[int, int] | None:
    """Return --image-size as one number, or as (height, width)."""
    if not given:
        return None
    if len(given) > 2:
        raise ValueError(f"--image-size {given}: give one number, or height and width")
    return given[0] if len(given) == 1 else tuple(given)


def complete_tokenizer(
    model: PortableModel, args: Namespace
) -> tuple[PortableModel, Tokenizer | None]:
    """Return the model, completed with the settings of its tokenizer, and the tokenizer.

    ValueError if the model was trained with another tokenizer.
    """
    if not model.vocab:
        return model, None
    about = model.about
    path = about.source.get("path")
    spec = args.tokenizer or about.tokenizer or tokenizer_files.read(args.source)
    try:
        tokenizer = build_tokenizer(spec, model.context)
    except ValueError as error:
        raise ValueError(f"{error}; choose the tokenizer with --tokenizer SPEC") from None
    if tokenizer.vocab_size != model.vocab or about.fingerprint not in ("", tokenizer.fingerprint):
        fingerprint = about.fingerprint or "unnamed"
        raise ValueError(
            f"{path}: trained with a vocabulary of {model.vocab} ({fingerprint}); {spec} has"
            f" {tokenizer.vocab_size} ({tokenizer.fingerprint}); choose the right tokenizer with"
            " --tokenizer SPEC"
        )
    end = tokenizer.end[0] if tokenizer.end else None
    if about.eot not in (None, end):
        raise ValueError(
            f"{path}: captions end with id {about.eot}, but {spec} ends them with {end}; choose the"
            " right tokenizer with --tokenizer SPEC"
        )
    about = replace(about, tokenizer=spec, fingerprint=tokenizer.fingerprint, eot=end)
    return replace(model, about=about), tokenizer


def write_model(
    model: PortableModel,
    args: Namespace,
    tokenizer: Tokenizer | None,
    folder: Path,
    include_source_notes: bool,
) -> list[str]:
    """Write the model and its vocabulary in the target format; return notes, one line each.

    include_source_notes: also return the notes that the source was loaded with.
    """
    dtype, source = DTYPES[args.dtype], model.about.source
    notes = source_notes(source, include_source_notes)

    # A vocabulary file is copied into the folder, and the spec refers to the copy.
    file = vocabulary_file(model.about.tokenizer)
    if file:
        kind = model.about.tokenizer.partition("(")[0]
        spec = f"{kind}(tokenizer{file.suffix})"
        model = replace(model, about=replace(model.about, tokenizer=spec))

    if args.format == "glimpse":
        portable.save_model(model, folder, dtype)
    else:
        options = {"tp": args.tp, "spec": args.spec} if args.format == "megatron" else {}
        notes += FORMATS[args.format].save(model, folder, dtype, **options) or []

    # open_clip contains CLIP's vocabulary; timm's models have no text tower.
    needs_files = args.format == "hf" or (args.format == "open_clip" and file)
    if tokenizer and needs_files:
        tokenizer_files.write(tokenizer, folder)
    if file and args.format != "timm":
        shutil.copy(file, folder / f"tokenizer{file.suffix}")
    return notes


def source_notes(source: dict, include_load_notes: bool) -> list[str]:
    """Return notes on the source: the step of a run, and optionally its load notes."""
    notes = []
    if "step" in source:
        progress = f"step {source['step']:,}, {source['samples']:,} samples"
        notes.append(f"source: {source['path']}, after {progress}")
    if "notes" in source and include_load_notes:
        notes.append(f"{source['path']}: {source['notes']}")
    return notes


def verify_conversion(
    model: PortableModel,
    written: PortableModel,
    args: Namespace,
    tokenizer: Tokenizer | None,
    folder: Path,
    open_source_reference: Callable | None,
) -> Iterator[str]:
    """Verify the conversion; yield a line for each check. ValueError if a check fails.

    written: the converted model, read back from the folder. open_source_reference: loads the source
    in its reference library.
    """
    # 1. The written tensors equal the source's bit for bit.
    module = FORMATS.get(args.format)
    dtype = DTYPES[args.dtype]
    tensors = model.tensors if written.vocab else select_vision_weights(model.tensors)
    if difference := prove.find_difference(tensors, written.tensors, dtype):
        raise ValueError(f"{args.source}: {difference} ({args.format})")
    rounding = f", rounded to {args.dtype}" if prove.loses_precision(tensors, dtype) else ""
    yield (
        f"read back: {len(written.tensors)} tensors, bit for bit equal to those of the"
        f" source{rounding}"
    )

    # 2. The reference libraries compute the same embeddings.
    if not prove.fits_in_memory(written):
        yield (
            "not compared with the reference library: two such models do not fit into this"
            " machine's memory"
        )
        return
    open_target_reference = None
    if hasattr(module, "reference_model"):
        open_target_reference = partial(module.reference_model, folder)
    for path, open_reference, glimpse_model in (
        (args.source, open_source_reference, model),
        (args.out, open_target_reference, written),
    ):
        if open_reference:
            text_tokenizer = tokenizer if glimpse_model.vocab else None
            yield compare_with_reference(path, open_reference, glimpse_model, text_tokenizer)
    if module and not open_target_reference:
        yield f"not compared with {args.format}'s own code; Glimpse's tests do that"


def compare_with_reference(
    path: Path, open_reference: Callable, model: PortableModel, tokenizer: Tokenizer | None
) -> str:
    """Compare the embeddings with those of the reference library; return a line with the result.

    path: the foreign model. open_reference: loads it. ValueError if the embeddings differ.
    """
    try:
        reference = open_reference()
    except ImportError as error:
        return f"not compared with the reference library: {error}"
    except Exception as error:  # a foreign library may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{path}: its reference library cannot open it ({reason})") from error
    differences = prove.embedding_differences(model, reference, tokenizer)
    if not all(value <= prove.TOLERANCE for value in differences.values()):  # also catches nan
        source = model.about.source
        notes = f" ({source['notes']})" if "notes" in source else ""
        raise ValueError(
            f"{path}: its reference library computes other embeddings: largest differences"
            f" {differences}, allowed {prove.TOLERANCE}{notes}"
        )
    values = ", ".join(f"{value:.1e} ({kind})" for kind, value in differences.items())
    return f"{path} compared with its reference library: largest difference {values}"


if __name__ == "__main__":
    run_script(main)
