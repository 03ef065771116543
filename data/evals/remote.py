"""Evaluation sets at URLs: each file is fetched once into a cache, and then read like a local one.

    local("https://host/sets/wds_cars", "test")
        -> CACHE/sets/DIGEST/wds_cars, with the test split
    local("pipe:aws s3 cp s3://bucket/wds_cars/{file} -", "test")
        {file} is what is asked for, e.g. test/0.tar

What webdataset opens can be a URL. A set is laid out as CLIP_benchmark lays it out: beside what
data/evals/clip_benchmark.py reads, URL/SPLIT/ nshards.txt tells the number of shards. nshards.txt
is kept
last, so what was broken off goes on where it stopped.
"""

import os
import re
import shutil
import tempfile
import zlib
from pathlib import Path

from glimpse.data.stream import is_url, opened_url

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "glimpse")
# each may be absent
TEXTS = ("classnames.txt", "zeroshot_classification_templates.txt", "class_subset.txt")
ABSENT = 22
CURL = {
    6: "no such host",
    7: "the host cannot be reached",
    ABSENT: "the server says that it is not there",
    28: "no answer in time",
}
HUGGING_FACE = re.compile(
    r"(https://huggingface\.co/datasets/[^/]+/)([^/]+)(?:/(?:tree|resolve)/([^/]+))?/?"
)


def local(where: str | Path, split: str) -> Path:
    """The folder of a set at `where`: itself, or where its files were fetched to.

    ValueError: the URL cannot be read.
    """
    if not is_url(where := str(where)):
        return Path(where)
    base, name = address(where)
    folder = CACHE / "sets" / f"{zlib.crc32(base.encode()):08x}" / name
    listed = folder / split / "nshards.txt"
    if not listed.exists():
        text = read(base, f"{split}/nshards.txt").decode(errors="replace").strip()
        if not text.isdecimal():
            raise ValueError(
                f"evals: {where}: {split}/nshards.txt is {text[:40]!r}; it must be the number of"
                " shards"
            )
        for file in TEXTS:
            fetch(base, file, folder, needed=False)
        for shard in range(int(text)):
            fetch(base, f"{split}/{shard}.tar", folder)
        fetch(base, f"{split}/nshards.txt", folder)
    return folder


def address(where: str) -> tuple[str, str]:
    """A URL as given -> (URL with {file} in it, the set's name)."""
    if found := HUGGING_FACE.fullmatch(where):
        return f"{found[1]}{found[2]}/resolve/{found[3] or 'main'}/{{file}}", found[2]
    base = where if "{file}" in where else where.rstrip("/") + "/{file}"
    name = re.split(r"[/\s]", base.partition("{file}")[0].rstrip("/"))[-1]
    return base, re.sub(r"[^\w.-]", "_", name) or "set"


def read(base: str, file: str) -> bytes:
    """A file at a URL, whole.  ValueError: it is not there, or the URL cannot be reached."""
    with tempfile.TemporaryDirectory() as folder:
        return fetch(base, file, Path(folder)).read_bytes()


def fetch(base: str, file: str, folder: Path, needed: bool = True) -> Path:
    """Copy a file below `folder`, whole or not at all; one that is there stays."""
    path, url = folder / file, base.replace("{file}", file)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # another process may fetch it, too
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as part:
        try:
            with opened_url(url) as source:
                shutil.copyfileobj(source, part)
        except Exception as error:  # in whatever way webdataset's many openers fail
            os.unlink(part.name)
            status = int(found[1]) if (found := re.search(r"exit (\d+)", str(error))) else 0
            if needed or url.startswith("http") and status != ABSENT:
                why = CURL.get(status) if url.startswith("http") else None
                raise ValueError(
                    f"evals: {url} cannot be read: {why or ' '.join(str(error).split())[:200]}"
                ) from None
            return path
    os.replace(part.name, path)
    return path
