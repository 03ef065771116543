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
from glimpse.data.tokenizer import Tokenizer, vocabulary
from glimpse.data.tokenizer import build as build_tokenizer
from glimpse.model import portable
from glimpse.model.convert import FORMATS
from glimpse.model.convert.resize import resized
from glimpse.model.portable import Portable, vision_only
from glimpse.model.safe_unpickler import first_line
from glimpse.run.lib import config
from glimpse.run.lib.cli import run_script
from glimpse.run.train import load_model
from glimpse.run.verify import (
    open_any,
    reference_libs,  # noqa: F401
)
from glimpse.run.verify import proofs as prove
from glimpse.run.verify.describe import architecture, describe, size_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    args = config.parser(__doc__)
    kinds = args.add_subparsers(required=True, metavar="FORMAT|inspect")
    for name in ["glimpse", *(name for name, module in FORMATS.items() if hasattr(module, "save"))]:
        kind = kinds.add_parser(name, help=f"convert into {name}")
        kind.add_argument(
            "source", type=Path, help="a run folder, a checkpoint, or a model of any format"
        )
        kind.add_argument("out", type=Path, help="a folder that is not there yet")
        kind.add_argument(
            "--weights",
            choices=("student", "teacher"),
            default="student",
            help="of a run; teacher: the moving average",
        )
        kind.add_argument(
            "--dtype", choices=DTYPES, default="fp32", help="what the weights are stored as"
        )
        kind.add_argument(
            "--image-size",
            type=int,
            nargs="+",
            metavar="PIXELS",
            help="resize positions: a side, or height and width",
        )
        kind.add_argument(
            "--patch",
            type=int,
            metavar="PIXELS",
            help="resize the patch embedding to this side, as FLIP's L/16 to L/14",
        )
        kind.add_argument(
            "--tokenizer",
            metavar="SPEC",
            help="as data.tokenizer, where the source does not tell it",
        )
        if name == "megatron":
            kind.add_argument(
                "--tp",
                type=int,
                default=1,
                metavar="N",
                help="tensor-parallel ranks that the weights are split for",
            )
            kind.add_argument(
                "--spec",
                choices=("local", "te"),
                default="local",
                help="the layers' kind: te for Transformer Engine's",
            )
        kind.set_defaults(do=convert, format=name)
    kind = kinds.add_parser("inspect", help="tell what lies at a path")
    kind.add_argument("path", type=Path)
    kind.set_defaults(do=lambda found: print(describe(found.path, stated(found.given))))
    for kind in kinds.choices.values():
        kind.add_argument(
            "--given",
            nargs="+",
            default=[],
            metavar="KEY=VALUE",
            help="what the files do not tell, e.g. config=ViT-B-32",
        )
    found = args.parse_args()
    found.do(found)


def convert(args) -> None:
    if args.out.exists() or args.out.is_symlink():
        raise ValueError(f"{args.out} exists; name a folder that does not, or remove it")
    given = stated(args.given)
    format, model = open_any.anything(args.source, args.weights, given)
    peer = (
        partial(FORMATS[format].peer, args.source, **given)
        if hasattr(FORMATS.get(format), "peer")
        else None
    )
    if args.image_size is not None or args.patch is not None:
        model, peer = resized(model, side(args.image_size), args.patch), None
    model, tokenizer = with_tokenizer(model, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(
        prefix=f"{args.out.name}.", suffix=".part", dir=args.out.parent, ignore_cleanup_errors=True
    ) as scratch:
        part = Path(scratch, args.out.name)
        told = write(model, args, tokenizer, part, news=format != "glimpse")
        again = (
            FORMATS[args.format].load(part)
            if args.format in FORMATS
            else load_model.converted(part)
        )
        told += proofs(model, again, args, tokenizer, part, peer)
        part.rename(args.out)
    print(f"{args.out}: {args.format}, {architecture(again)}, {args.dtype}, {size_of(args.out)}")
    for line in told:
        print(f"  {line}")


def stated(given: list[str]) -> dict:
    """{KEY: VALUE} of what --given says."""
    found = {}
    for pair in given:
        key, _, value = pair.partition("=")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[key] = None
        if found[key] is None:
            raise ValueError(
                f"--given {pair}: no value; it should be as in KEY=3, KEY=word or KEY=[224,448]"
            )
    return found


def side(given: list[int] | None) -> int | tuple[int, int] | None:
    if given and len(given) > 2:
        raise ValueError(f"--image-size {given}: one side, or height and width")
    return given and (given[0] if len(given) == 1 else tuple(given))


def with_tokenizer(model: Portable, args) -> tuple[Portable, Tokenizer | None]:
    """The model with what its vocabulary tells, and the tokenizer; ValueError where it is another
    than the model was trained with.
    """
    if not model.vocab:
        return model, None
    about = model.about
    spec = args.tokenizer or about.tokenizer or tokenizer_files.read(args.source)
    try:
        tokenizer = build_tokenizer(spec, model.context)
    except ValueError as error:
        raise ValueError(f"{error}; --tokenizer SPEC names another") from None
    if tokenizer.vocab_size != model.vocab or about.fingerprint not in ("", tokenizer.fingerprint):
        raise ValueError(
            f"{about.source.get('path')}: trained with a vocabulary of {model.vocab}"
            f" ({about.fingerprint or 'unnamed'}); {spec} has {tokenizer.vocab_size}"
            f" ({tokenizer.fingerprint}); --tokenizer names another"
        )
    end = tokenizer.end[0] if tokenizer.end else None
    if about.eot not in (None, end):
        raise ValueError(
            f"{about.source.get('path')}: a caption ends with id {about.eot}; with {end} in {spec};"
            " --tokenizer names another"
        )
    return (
        replace(
            model, about=replace(about, tokenizer=spec, fingerprint=tokenizer.fingerprint, eot=end)
        ),
        tokenizer,
    )


def write(
    model: Portable, args, tokenizer: Tokenizer | None, folder: Path, news: bool
) -> list[str]:
    """The model in its format, with its vocabulary; what one should know of it, a line each.

    news: its notes were not told before.
    """
    dtype, file, source = DTYPES[args.dtype], vocabulary(model.about.tokenizer), model.about.source
    told = (
        [f"of {source['path']}, after step {source['step']:,}, {source['samples']:,} samples"]
        if "step" in source
        else []
    )
    told += [f"{source['path']}: {source['notes']}"] if "notes" in source and news else []
    if file:  # it will lie in the folder
        spec = f"{model.about.tokenizer.partition('(')[0]}(tokenizer{file.suffix})"
        model = replace(model, about=replace(model.about, tokenizer=spec))
    if args.format == "glimpse":
        portable.save(model, folder, dtype)
    else:
        options = {"tp": args.tp, "spec": args.spec} if args.format == "megatron" else {}
        told += FORMATS[args.format].save(model, folder, dtype, **options) or []
    # CLIP's is open_clip's own
    if tokenizer and (args.format == "hf" or args.format == "open_clip" and file):
        tokenizer_files.write(tokenizer, folder)
    if file and args.format != "timm":
        shutil.copy(file, folder / f"tokenizer{file.suffix}")
    return told


def proofs(
    model: Portable,
    again: Portable,
    args,
    tokenizer: Tokenizer | None,
    folder: Path,
    source: Callable | None,
) -> Iterator[str]:
    """What shows that the conversion is right, a line each; ValueError where something shows that
    it is not. again: what was written.
    """
    module = FORMATS.get(args.format)
    kept = model.tensors if again.vocab else vision_only(model.tensors)
    if flaw := prove.flaw(kept, again.tensors, DTYPES[args.dtype]):
        raise ValueError(f"{args.source}: {flaw} ({args.format})")
    rounding = f", rounded to {args.dtype}" * prove.rounded(kept, DTYPES[args.dtype])
    yield (
        f"read again: {len(again.tensors)} tensors, each used once, bit for bit those of the"
        f" source{rounding}"
    )
    if not prove.fits(again):
        yield (
            "not run beside another library: two such models do not fit into this machine's memory"
        )
        return
    made = partial(module.peer, folder) if hasattr(module, "peer") else None
    for whose, peer, ours in ((args.source, source, model), (args.out, made, again)):
        if peer:
            yield compared(whose, peer, ours, tokenizer if ours.vocab else None)
    if module and not made:
        yield f"not run in {args.format}'s own code; the tests do that"


def compared(whose: Path, peer: Callable, model: Portable, tokenizer: Tokenizer | None) -> str:
    """A line on the foreign library's own model beside ours."""
    try:
        theirs = peer()
    except ImportError as error:
        return f"not run beside another library: {error}"
    except Exception as error:  # another library's may be of any kind
        raise ValueError(
            f"{whose}: its own library cannot open it ({type(error).__name__}: {first_line(error)})"
        ) from error
    found = prove.differences(model, theirs, tokenizer)
    if not all(far <= prove.CLOSE for far in found.values()):  # nan is not
        notes = f" ({model.about.source['notes']})" if "notes" in model.about.source else ""
        raise ValueError(
            f"{whose}: run in its own library it gives other embeddings: {found}, more than"
            f" {prove.CLOSE}{notes}"
        )
    return f"{whose} run in its own library: largest difference " + ", ".join(
        f"{far:.1e} ({what})" for what, far in found.items()
    )


if __name__ == "__main__":
    run_script(main)
