"""Embed images and their captions, or texts, with a run or a converted model: unit vectors as npy
or parquet.

    python run/embed.py runs/quickstart photos/ --out embeddings
        a folder of any depth; NAME.jpg, NAME.txt
    python run/embed.py models/b32 /data/laion400m --out embeddings --format parquet
        tar shards
    python run/embed.py models/b32 --texts prompts.txt --out embeddings
        a text a line
    deepspeed --num_accelerators 8 run/embed.py models/b32 /data/laion400m --out embeddings --batch
        256 --workers 12

Row i is the same on any number of ranks. docs/evaluating.md ("Embeddings") has the files, which
clip-retrieval and autofaiss read.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import os
import time

from glimpse.data.evals.gallery import Texts, open_gallery
from glimpse.run.evals.embed import BATCH, Embedder
from glimpse.run.evals.embeddings import DTYPES, FORMATS, PART, About, Output, agree, embeddings
from glimpse.run.lib import config, distributed
from glimpse.run.train import load_model


def main() -> None:
    args = config.parser(__doc__)
    args.add_argument(
        "model", help="a run folder, one of its checkpoints, or a folder that run/convert.py wrote"
    )
    args.add_argument("images", nargs="?", type=Path, help="a folder of images, or of tar shards")
    args.add_argument("--texts", type=Path, metavar="FILE", help="instead of images: a text a line")
    args.add_argument("--out", type=Path, required=True, metavar="DIR")
    args.add_argument("--resume", action="store_true", help="go on with what was begun there")
    args.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="teacher: the moving average",
    )
    args.add_argument("--format", choices=FORMATS, default="npy")
    args.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="what embeddings are stored as"
    )
    args.add_argument(
        "--batch", type=int, default=BATCH, metavar="N", help="images that a rank embeds at once"
    )
    args.add_argument(
        "--part", type=int, default=PART, metavar="N", help=f"images to a part file, {PART}"
    )
    args.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="loader processes a rank; default: data.workers, at most one a core",
    )
    args.add_argument("--local_rank", type=int, help="from the launcher")
    found = args.parse_intermixed_args()  # the images may stand behind options
    if (found.images is None) == (found.texts is None):
        raise ValueError("give a folder of images, or --texts FILE")
    for name, least in (("batch", 1), ("part", 1), ("workers", 0)):
        if (value := getattr(found, name)) is not None and value < least:
            raise ValueError(f"--{name} {value}: it must be at least {least}")
    path = load_model.find(Path(found.model).resolve())
    distributed.start()
    gallery = distributed.once(
        lambda: Texts(found.texts) if found.texts else open_gallery(found.images)
    )
    cfg, tokenizer, method = load_model.opened(path)
    checksum = load_model.checksum(method.shown(found.weights), cfg, tokenizer)
    about = agree(
        About(
            str(path),
            found.weights,
            checksum,
            str(found.texts or found.images),
            len(gallery),
            gallery.name(len(gallery) - 1),
            found.format,
            found.dtype,
            found.part,
        )
    )
    model = Embedder(
        method, cfg, tokenizer, home=load_model.home(path), tag=path.name, weights=found.weights
    )
    out = Output(found.out, about)
    todo = json.loads(distributed.told(lambda: json.dumps(out.begin(found.resume))))
    begun = time.perf_counter()
    workers = (
        min(cfg.data.workers, len(os.sched_getaffinity(0)))
        if found.workers is None
        else found.workers
    )
    embeddings(model, gallery, out, todo, found.batch, workers)
    distributed.barrier()
    if not distributed.rank():
        report(out, cfg.model.shape.embed, todo, time.perf_counter() - begun, not found.texts)


def report(out: Output, width: int, todo: list[int], seconds: float, images: bool) -> None:
    (rows, left_out), what, folder = out.written(), "images" if images else "texts", out.folder
    made = sum(last - first for first, last in map(out.span, todo))
    print(
        f"{folder}: {rows:,} {what}, {width} numbers each in {out.about.dtype}, {out.parts}"
        f" part{'s' * (out.parts > 1)}"
    )
    if left_out:
        print(
            f"{left_out:,} images could not be read and have no row: {folder / 'left_out'} names"
            " them"
        )
    if todo:
        print(f"{made:,} {what} now, in {seconds:.1f} s: {made / seconds:,.1f} a second")
    name, column = ("image", "image_path") if images else ("text", "caption")
    table = f'pq.read_table("{out.file(0)}")'
    if out.about.format == "npy":
        kind = {"image": "img_emb", "text": "text_emb"}[name]
        print(f'  x, names = np.load("{out.file(0, kind, "npy")}"), {table}["{column}"]')
    else:
        print(
            f'  t = {table}; x, names = np.stack(t["{name}_embedding"].to_numpy()), t["{column}"]'
        )
    print(
        "  [str(names[i]) for i in np.argsort(-(x @ x[0]))[:10].tolist()]    # the"
        f" nearest{' of part 0' * (out.parts > 1)} to row 0"
    )


if __name__ == "__main__":
    distributed.run_script(main)
