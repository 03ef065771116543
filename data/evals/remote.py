"""Evaluation sets at URLs: each file is fetched once into a cache, and then read like a local one.

    local("https://host/sets/wds_cars", "test")
        -> CACHE/sets/DIGEST/wds_cars, with the test split
    local("pipe:aws s3 cp s3://bucket/wds_cars/{file} -", "test")
        {file} is what is asked for, e.g. test/0.tar

Whatever webdataset opens can be a URL. A set has CLIP_benchmark's layout: beside the files that
data/evals/clip_benchmark.py reads, URL/SPLIT/nshards.txt holds the number of shards. nshards.txt is
stored last, so an interrupted download resumes where it stopped.
"""

import os
import re
import shutil
import tempfile
import zlib
from pathlib import Path

from glimpse.data.stream import is_url, open_url

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "glimpse")
# Each of these may be absent.
TEXT_FILES = ("classnames.txt", "zeroshot_classification_templates.txt", "class_subset.txt")
CURL_HTTP_ERROR = 22  # exit status of curl --fail if the server answers with an error
CURL_ERRORS = {
    6: "no such host",
    7: "the host cannot be reached",
    CURL_HTTP_ERROR: "the server says that it is not there",
    28: "no answer in time",
}
HUGGING_FACE = re.compile(
    r"(https://huggingface\.co/datasets/[^/]+/)([^/]+)(?:/(?:tree|resolve)/([^/]+))?/?"
)


def local_copy(where: str | Path, split: str) -> Path:
    """Return the folder of a set at `where`: itself, or for a URL the folder of the fetched files.

    ValueError: the URL cannot be read.
    """
    where = str(where)
    if not is_url(where):
        return Path(where)
    base, name = split_url(where)
    folder = CACHE / "sets" / f"{zlib.crc32(base.encode()):08x}" / name
    if (folder / split / "nshards.txt").exists():
        return folder

    text = read_remote(base, f"{split}/nshards.txt").decode(errors="replace").strip()
    if not text.isdecimal():
        raise ValueError(
            f"evals: {where}: {split}/nshards.txt is {text[:40]!r}; it must be the number of shards"
        )
    for file in TEXT_FILES:
        fetch(base, file, folder, required=False)
    for shard in range(int(text)):
        fetch(base, f"{split}/{shard}.tar", folder)
    # Last: its presence marks the split as complete.
    fetch(base, f"{split}/nshards.txt", folder)
    return folder


def split_url(where: str) -> tuple[str, str]:
    """Split a URL into (URL with {file} in it, the set's name)."""
    match = HUGGING_FACE.fullmatch(where)
    if match:
        owner, name, revision = match.groups(default="main")
        return f"{owner}{name}/resolve/{revision}/{{file}}", name
    base = where if "{file}" in where else where.rstrip("/") + "/{file}"
    name = re.split(r"[/\s]", base.partition("{file}")[0].rstrip("/"))[-1]
    return base, re.sub(r"[^\w.-]", "_", name) or "set"


def read_remote(base: str, file: str) -> bytes:
    """Read a file at a URL.  ValueError: it is not there, or the URL cannot be reached."""
    with tempfile.TemporaryDirectory() as folder:
        return fetch(base, file, Path(folder)).read_bytes()


def fetch(base: str, file: str, folder: Path, required: bool = True) -> Path:
    """Copy a file to `folder`, completely or not at all; an existing file is left as it is.

    needed=False: a file that is absent at the URL is no error.
    """
    path = folder / file
    url = base.replace("{file}", file)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # A temporary name of its own, since another process may fetch the same file.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as part:
        try:
            with open_url(url) as source:
                shutil.copyfileobj(source, part)
        except Exception as error:  # webdataset's many openers fail in many ways
            os.unlink(part.name)
            exit_status = re.search(r"exit (\d+)", str(error))
            status = int(exit_status[1]) if exit_status else 0
            by_curl = url.startswith("http")
            # Only curl says that a file is absent; a pipe's command fails for any reason.
            if required or (by_curl and status != CURL_HTTP_ERROR):
                why = CURL_ERRORS.get(status) if by_curl else None
                reason = why or " ".join(str(error).split())[:200]
                raise ValueError(f"evals: {url} cannot be read: {reason}") from None
            return path
    os.replace(part.name, path)
    return path
