"""Embed images and their captions, or texts, with a run or a converted model.

Writes unit vectors as npy or parquet.

    python run/embed.py runs/quickstart photos/ --out embeddings
        images in a folder, at any depth, with captions in NAME.txt beside NAME.jpg
    python run/embed.py models/b32 /data/laion400m --out embeddings --format parquet
        a folder of tar shards
    python run/embed.py models/b32 --texts prompts.txt --out embeddings
        a file with one text per line
    deepspeed --num_accelerators 8 run/embed.py models/b32 /data/laion400m --out embeddings \\
        --batch 256 --workers 12
        on several ranks

Any number of ranks writes the same rows. docs/evaluating.md ("Embeddings") describes the files,
which clip-retrieval and autofaiss read.
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

    # 1. Open the source and the model. They must be the same on all ranks, and when a job is
    #    resumed.
    gallery = distributed.rank0_first(
        lambda: TextGallery(args.texts) if args.texts else open_gallery(args.images)
    )
    cfg, tokenizer, method = load_model.open_model(path)
    info = EmbeddingsInfo(
        model=str(path),
        weights=args.weights,
        checksum=load_model.checksum(method.eval_towers(args.weights), cfg, tokenizer),
        source=str(args.texts or args.images),
        count=len(gallery),
        last=gallery.name(len(gallery) - 1),
        format=args.format,
        dtype=args.dtype,
        part=args.part,
    )
    out = EmbeddingFolder(args.out, check_ranks_agree(info))

    # 2. Write the parts that are missing in rank 0's view of the folder.
    parts_json = distributed.broadcast_from_rank0(lambda: json.dumps(out.start(args.resume)))
    parts = json.loads(parts_json)
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
    start_time = time.perf_counter()
    write_embeddings(model, gallery, out, parts, args.batch, workers)
    distributed.barrier()
    if distributed.rank() == 0:
        seconds = time.perf_counter() - start_time
        print_report(out, cfg.model.shape.embed, parts, seconds, not args.texts)


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = config.argument_parser(__doc__)
    parser.add_argument(
        "model", help="a run folder, one of its checkpoints, or a folder that run/convert.py wrote"
    )
    parser.add_argument("images", nargs="?", type=Path, help="a folder of images, or of tar shards")
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="embed the lines of this file instead of images"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted job in DIR")
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="teacher: the moving average",
    )
    parser.add_argument("--format", choices=FORMATS, default="npy")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="precision of the stored embeddings"
    )
    parser.add_argument(
        "--batch", type=int, default=BATCH, metavar="N", help="images that a rank embeds at once"
    )
    parser.add_argument(
        "--part",
        type=int,
        default=PART_SIZE,
        metavar="N",
        help=f"images of each part file; default: {PART_SIZE}",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="loader processes of each rank; default: data.workers, but at most one per core",
    )
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    args = parser.parse_intermixed_args()  # the folder of images may come after options
    if (args.images is None) == (args.texts is None):
        raise ValueError("--texts: give either a folder of images, or --texts FILE")
    for name, minimum in (("batch", 1), ("part", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name}: {value} is too small; use {minimum} or more")
    return args


def print_report(
    out: EmbeddingFolder, width: int, parts: list[int], seconds: float, images: bool
) -> None:
    """Print what was written, how fast, and Python lines that read it.

    parts: the parts that this job wrote, in `seconds`.
    images: True if the rows are images, False if they are texts.
    """
    # 1. The content of the folder.
    rows, left_out = out.count_rows()
    noun = "images" if images else "texts"
    plural = "s" if out.part_count > 1 else ""
    print(
        f"{out.folder}: {rows:,} {noun}, {width} numbers each in {out.info.dtype},"
        f" {out.part_count} part{plural}"
    )
    if left_out:
        print(
            f"{left_out:,} images could not be read and have no row; they are listed in"
            f" {out.folder / 'left_out'}"
        )

    # 2. The speed of this job.
    if parts:
        spans = [out.span(part) for part in parts]
        count = sum(last - first for first, last in spans)
        speed = f"{count / seconds:,.1f} {noun} per second"
        print(f"{count:,} {noun} embedded in {seconds:.1f} s: {speed}")

    # 3. Python code that reads the first part and finds the nearest neighbors of its first row.
    name, column = ("image", "image_path") if images else ("text", "caption")
    table = f'pq.read_table("{out.file_path(0)}")'
    if out.info.format == "npy":
        folder = "img_emb" if images else "text_emb"
        print(f'  x, names = np.load("{out.file_path(0, folder, "npy")}"), {table}["{column}"]')
    else:
        embedding = f'np.stack(t["{name}_embedding"].to_numpy())'
        print(f'  t = {table}; x, names = {embedding}, t["{column}"]')
    scope = " in part 0" if out.part_count > 1 else ""
    print(
        f"  [str(names[i]) for i in np.argsort(-(x @ x[0]))[:10].tolist()]"
        f"    # nearest neighbors of row 0{scope}"
    )


if __name__ == "__main__":
    distributed.run_script(main)
