"""Models leave and enter Glimpse: a run, a checkpoint or a foreign model into any of the formats,
each conversion proven.

    python run/convert.py glimpse   runs/quickstart models/quickstart        one safetensors file
                                    and config.json
    python run/convert.py open_clip runs/aclip_b16  models/for_open_clip
    python run/convert.py glimpse   models/CLIP-ViT-B-32 models/b32          in: the format of what
                                    lies there is found out
    python run/convert.py inspect   models/CLIP-ViT-B-32                     what any checkpoint is

docs/converting.md has the formats, what each cannot express, and how training starts from what
comes in.
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
        add_format(commands.add_parser(name, help=f"convert into {name}"), name)
    command = commands.add_parser("inspect", help="tell what lies at a path")
    command.add_argument("path", type=Path)
    command.set_defaults(do=inspect)
    for command in commands.choices.values():
        command.add_argument(
            "--given",
            nargs="+",
            default=[],
            metavar="KEY=VALUE",
            help="what the files do not tell, e.g. config=ViT-B-32",
        )
    options = args.parse_args()
    options.do(options)


def add_format(command: ArgumentParser, name: str) -> None:
    """Add the options of a conversion into a format."""
    command.add_argument(
        "source", type=Path, help="a run folder, a checkpoint, or a model of any format"
    )
    command.add_argument("out", type=Path, help="a folder that is not there yet")
    command.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="of a run; teacher: the moving average",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="what the weights are stored as"
    )
    command.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="resize positions: a side, or height and width",
    )
    command.add_argument(
        "--patch",
        type=int,
        metavar="PIXELS",
        help="resize the patch embedding to this side, as FLIP's L/16 to L/14",
    )
    command.add_argument(
        "--tokenizer",
        metavar="SPEC",
        help="as data.tokenizer, where the source does not tell it",
    )
    if name == "megatron":
        command.add_argument(
            "--tp",
            type=int,
            default=1,
            metavar="N",
            help="tensor-parallel ranks that the weights are split for",
        )
        command.add_argument(
            "--spec",
            choices=("local", "te"),
            default="local",
            help="the layers' kind: te for Transformer Engine's",
        )
    command.set_defaults(do=convert, format=name)


def inspect(args: Namespace) -> None:
    print(describe(args.path, parse_given(args.given)))


def convert(args: Namespace) -> None:
    """Convert the source, verify the result and move it into place."""
    if args.out.exists() or args.out.is_symlink():
        raise ValueError(f"{args.out} exists; name a folder that does not, or remove it")

    # The source, and its own library's model to compare with, unless it is resized.
    given = parse_given(args.given)
    source_format, model = open_any.load_any(args.source, args.weights, given)
    peer = None
    if args.image_size is not None or args.patch is not None:
        model = resize_model(model, parse_image_size(args.image_size), args.patch)
    elif hasattr(FORMATS.get(source_format), "reference_model"):
        peer = partial(FORMATS[source_format].reference_model, args.source, **given)
    model, tokenizer = complete_tokenizer(model, args)

    # Everything is written beside the folder, and renamed only when it is verified.
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(
        prefix=f"{args.out.name}.", suffix=".part", dir=args.out.parent, ignore_cleanup_errors=True
    ) as scratch:
        part = Path(scratch, args.out.name)
        notes = write_model(model, args, tokenizer, part, news=source_format != "glimpse")
        if args.format in FORMATS:
            again = FORMATS[args.format].load(part)
        else:
            again = load_model.open_converted(part)
        notes += verify_conversion(model, again, args, tokenizer, part, peer)
        part.rename(args.out)

    print(
        f"{args.out}: {args.format}, {architecture_summary(again)}, {args.dtype}, {format_size(args.out)}"
    )
    for line in notes:
        print(f"  {line}")


def parse_given(given: list[str]) -> dict:
    """Return {KEY: VALUE} of the arguments of --given."""
    options = {}
    for pair in given:
        key, _, text = pair.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        if value is None:
            raise ValueError(
                f"--given {pair}: no value; it should be as in KEY=3, KEY=word or KEY=[224,448]"
            )
        options[key] = value
    return options


def parse_image_size(given: list[int] | None) -> int | tuple[int, int] | None:
    """Return --image-size as a side, or as (height, width)."""
    if not given:
        return None
    if len(given) > 2:
        raise ValueError(f"--image-size {given}: one side, or height and width")
    return given[0] if len(given) == 1 else tuple(given)


def complete_tokenizer(
    model: PortableModel, args: Namespace
) -> tuple[PortableModel, Tokenizer | None]:
    """Return the model, completed with the tokenizer's settings, and the tokenizer.

    ValueError if it is not the one that the model was trained with.
    """
    if not model.vocab:
        return model, None
    about = model.about
    path = about.source.get("path")
    spec = args.tokenizer or about.tokenizer or tokenizer_files.read(args.source)
    try:
        tokenizer = build_tokenizer(spec, model.context)
    except ValueError as error:
        raise ValueError(f"{error}; --tokenizer SPEC names another") from None
    if tokenizer.vocab_size != model.vocab or about.fingerprint not in ("", tokenizer.fingerprint):
        fingerprint = about.fingerprint or "unnamed"
        raise ValueError(
            f"{path}: trained with a vocabulary of {model.vocab} ({fingerprint}); {spec} has"
            f" {tokenizer.vocab_size} ({tokenizer.fingerprint}); --tokenizer names another"
        )
    end = tokenizer.end[0] if tokenizer.end else None
    if about.eot not in (None, end):
        raise ValueError(
            f"{path}: a caption ends with id {about.eot}; with {end} in {spec}; --tokenizer names"
            " another"
        )
    about = replace(about, tokenizer=spec, fingerprint=tokenizer.fingerprint, eot=end)
    return replace(model, about=about), tokenizer


def write_model(
    model: PortableModel, args: Namespace, tokenizer: Tokenizer | None, folder: Path, news: bool
) -> list[str]:
    """Write the model in its format, with its vocabulary; return notes, one line each.

    news: the notes of the source have not been printed before.
    """
    dtype, source = DTYPES[args.dtype], model.about.source
    notes = source_notes(source, news)

    # A vocabulary of a file of its own is copied into the folder.
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

    # open_clip has CLIP's vocabulary itself; timm's models have no text.
    needs_files = args.format == "hf" or (args.format == "open_clip" and file)
    if tokenizer and needs_files:
        tokenizer_files.write(tokenizer, folder)
    if file and args.format != "timm":
        shutil.copy(file, folder / f"tokenizer{file.suffix}")
    return notes


def source_notes(source: dict, news: bool) -> list[str]:
    """Return notes on the source: the step of a run, and its own notes if they are news."""
    notes = []
    if "step" in source:
        notes.append(
            f"of {source['path']}, after step {source['step']:,}, {source['samples']:,} samples"
        )
    if "notes" in source and news:
        notes.append(f"{source['path']}: {source['notes']}")
    return notes


def verify_conversion(
    model: PortableModel,
    again: PortableModel,
    args: Namespace,
    tokenizer: Tokenizer | None,
    folder: Path,
    source: Callable | None,
) -> Iterator[str]:
    """Verify the conversion; yield a line for each check. ValueError if a check fails.

    again: the written model, read from the folder. source: loads the source in its own library.
    """
    # The same tensors, bit for bit.
    module = FORMATS.get(args.format)
    dtype = DTYPES[args.dtype]
    tensors = model.tensors if again.vocab else select_vision_weights(model.tensors)
    if flaw := prove.find_difference(tensors, again.tensors, dtype):
        raise ValueError(f"{args.source}: {flaw} ({args.format})")
    rounding = f", rounded to {args.dtype}" if prove.loses_precision(tensors, dtype) else ""
    yield (
        f"read again: {len(again.tensors)} tensors, each used once, bit for bit those of the"
        f" source{rounding}"
    )

    # The same embeddings as the other libraries' models.
    if not prove.fits_in_memory(again):
        yield (
            "not run beside another library: two such models do not fit into this machine's memory"
        )
        return
    written = (
        partial(module.reference_model, folder) if hasattr(module, "reference_model") else None
    )
    for path, peer, ours in ((args.source, source, model), (args.out, written, again)):
        if peer:
            yield compare_with_reference(path, peer, ours, tokenizer if ours.vocab else None)
    if module and not written:
        yield f"not run in {args.format}'s own code; the tests do that"


def compare_with_reference(
    whose: Path, peer: Callable, model: PortableModel, tokenizer: Tokenizer | None
) -> str:
    """Return a line about the foreign library's own model beside ours.

    ValueError if its embeddings differ. whose: the path of the foreign model.
    """
    try:
        foreign = peer()
    except ImportError as error:
        return f"not run beside another library: {error}"
    except Exception as error:  # another library's may be of any kind
        raise ValueError(
            f"{whose}: its own library cannot open it ({type(error).__name__}: {first_line(error)})"
        ) from error
    differences = prove.embedding_differences(model, foreign, tokenizer)
    if not all(far <= prove.TOLERANCE for far in differences.values()):  # nan is not
        source = model.about.source
        notes = f" ({source['notes']})" if "notes" in source else ""
        raise ValueError(
            f"{whose}: run in its own library it gives other embeddings: {differences}, more than"
            f" {prove.TOLERANCE}{notes}"
        )
    listed = ", ".join(f"{far:.1e} ({what})" for what, far in differences.items())
    return f"{whose} run in its own library: largest difference {listed}"


if __name__ == "__main__":
    run_script(main)
