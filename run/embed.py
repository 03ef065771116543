"""Embed images and their captions, or texts, with a run or a converted model.

Embeddings are unit vectors, written as npy or parquet.

    python run/embed.py runs/quickstart photos/ --out embeddings
        a folder of any depth; NAME.jpg, NAME.txt
    python run/embed.py models/b32 /data/laion400m --out embeddings --format parquet
        tar shards
    python run/embed.py models/b32 --texts prompts.txt --out embeddings
        a text a line
    deepspeed --num_accelerators 8 run/embed.py models/b32 /data/laion400m --out embeddings \\
        --batch 256 --workers 12

Row i is the same on any number of ranks. docs/evaluating.md ("Embeddings") has the files, which
clip-retrieval and autofaiss read.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import time

from glimpse.data.evals.gallery import TextGallery, open_gallery
from glimpse.run.evals.embed import BATCH, Embedder
from glimpse.run.evals.embeddings import (
    DTYPES,
    FORMATS,
    PART_SIZE,
    EmbeddingFolder,
    EmbeddingsInfo,
    check_ranks_agree,
    write_embeddings,
)
from glimpse.run.lib import config, distributed
from glimpse.run.train import load_model


def main() -> None:
    args = parse_arguments()
    path = load_model.find_model(Path(args.model).resolve())
    distributed.start()

    # What is embedded, and with which weights: all ranks, and a run that is resumed, must agree.
    gallery = distributed.rank0_first(
        lambda: TextGallery(args.texts) if args.texts else open_gallery(args.images)
    )
    cfg, tokenizer, method = load_model.open_model(path)
    checksum = load_model.checksum(method.eval_towers(args.weights), cfg, tokenizer)
    source = args.texts or args.images
    about = check_ranks_agree(
        EmbeddingsInfo(
            str(path),
            args.weights,
            checksum,
            str(source),
            len(gallery),
            gallery.name(len(gallery) - 1),
            args.format,
            args.dtype,
            args.part,
        )
    )
    out = EmbeddingFolder(args.out, about)

    # The parts that are left to do, as rank 0 finds them.
    todo = json.loads(distributed.broadcast_from_rank0(lambda: json.dumps(out.begin(args.resume))))
    model = Embedder(
        method,
        cfg,
        tokenizer,
        results_folder=load_model.results_folder(path),
        tag=path.name,
        weights=args.weights,
    )
    workers = args.workers
    if workers is None:
        workers = min(cfg.data.workers, len(os.sched_getaffinity(0)))
    begin = time.perf_counter()
    write_embeddings(model, gallery, out, todo, args.batch, workers)
    distributed.barrier()
    if distributed.rank() == 0:
        seconds = time.perf_counter() - begin
        print_report(out, cfg.model.shape.embed, todo, seconds, not args.texts)


def parse_arguments() -> argparse.Namespace:
    """Return the checked command line."""
    parser = config.argument_parser(__doc__)
    parser.add_argument(
        "model", help="a run folder, one of its checkpoints, or a folder that run/convert.py wrote"
    )
    parser.add_argument("images", nargs="?", type=Path, help="a folder of images, or of tar shards")
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="instead of images: a text a line"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on with what was begun there")
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="teacher: the moving average",
    )
    parser.add_argument("--format", choices=FORMATS, default="npy")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="what embeddings are stored as"
    )
    parser.add_argument(
        "--batch", type=int, default=BATCH, metavar="N", help="images that a rank embeds at once"
    )
    parser.add_argument(
        "--part",
        type=int,
        default=PART_SIZE,
        metavar="N",
        help=f"images to a part file, {PART_SIZE}",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="loader processes a rank; default: data.workers, at most one a core",
    )
    parser.add_argument("--local_rank", type=int, help="from the launcher")
    args = parser.parse_intermixed_args()  # the images may stand behind options
    if (args.images is None) == (args.texts is None):
        raise ValueError("give a folder of images, or --texts FILE")
    for name, least in (("batch", 1), ("part", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: it must be at least {least}")
    return args


def print_report(
    out: EmbeddingFolder, width: int, todo: list[int], seconds: float, images: bool
) -> None:
    """Print what was written, how fast, and Python lines that read it.

    todo: the parts that this run embedded; images: whether the rows are images or texts.
    """
    rows, left_out = out.written()
    what = "images" if images else "texts"
    several = "s" if out.parts > 1 else ""
    print(
        f"{out.folder}: {rows:,} {what}, {width} numbers each in {out.about.dtype},"
        f" {out.parts} part{several}"
    )
    if left_out:
        names = out.folder / "left_out"
        print(f"{left_out:,} images could not be read and have no row: {names} names them")
    if todo:
        spans = [out.span(part) for part in todo]
        count = sum(last - first for first, last in spans)
        print(f"{count:,} {what} now, in {seconds:.1f} s: {count / seconds:,.1f} a second")

    # How the first part is read, and the nearest neighbors of its first row.
    name, column = ("image", "image_path") if images else ("text", "caption")
    table = f'pq.read_table("{out.file(0)}")'
    if out.about.format == "npy":
        kind = "img_emb" if images else "text_emb"
        print(f'  x, names = np.load("{out.file(0, kind, "npy")}"), {table}["{column}"]')
    else:
        embedding = f'np.stack(t["{name}_embedding"].to_numpy())'
        print(f'  t = {table}; x, names = {embedding}, t["{column}"]')
    nearest = "the nearest of part 0 to row 0" if out.parts > 1 else "the nearest to row 0"
    print(f"  [str(names[i]) for i in np.argsort(-(x @ x[0]))[:10].tolist()]    # {nearest}")


if __name__ == "__main__":
    distributed.run_script(main)
