"""Evaluation sets at URLs: files are downloaded once to a cache, and then read like local ones.

    local_copy("https://host/sets/wds_cars", "test")
        -> CACHE/sets/DIGEST/wds_cars, with the test split
    local_copy("pipe:aws s3 cp s3://bucket/wds_cars/{file} -", "test")
        {file} is replaced by the name of the file, e.g. test/0.tar

A URL can be anything that webdataset opens. The set must have CLIP_benchmark's layout, and in
addition URL/SPLIT/nshards.txt, which contains the number of shards. nshards.txt is stored last, so
an interrupted download continues where it stopped.
"""

import os
import re
import shutil
import tempfile
import zlib
from pathlib import Path

from glimpse.data.stream import is_url, open_url

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "glimpse")
# Text files of a set; each is optional.
TEXT_FILES = ("classnames.txt", "zeroshot_classification_templates.txt", "class_subset.txt")
CURL_HTTP_ERROR = 22  # exit status of curl --fail for HTTP errors such as 404
CURL_ERRORS = {
    6: "no such host",
    7: "the host cannot be reached",
    CURL_HTTP_ERROR: "the server does not have it",
    28: "timeout",
}
HUGGING_FACE = re.compile(
    r"(https://huggingface\.co/datasets/[^/]+/)([^/]+)(?:/(?:tree|resolve)/([^/]+))?/?"
)


def local_copy(source: str | Path, split: str) -> Path:
    """Return the folder of a set; for a URL, download it and return the folder of the copy.

    Raise ValueError if the URL cannot be read.
    """
    source = str(source)
    if not is_url(source):
        return Path(source)
    url, name = split_url(source)
    folder = CACHE / "sets" / f"{zlib.crc32(url.encode()):08x}" / name
    if (folder / split / "nshards.txt").exists():
        return folder

    text = read_remote(url, f"{split}/nshards.txt").decode(errors="replace").strip()
    if not text.isdecimal():
        raise ValueError(
            f"evals: {source}: {split}/nshards.txt is {text[:40]!r}; it must be the number of"
            " shards"
        )
    for file in TEXT_FILES:
        fetch(url, file, folder, required=False)
    for shard in range(int(text)):
        fetch(url, f"{split}/{shard}.tar", folder)
    # Last: its presence marks the split as complete.
    fetch(url, f"{split}/nshards.txt", folder)
    return folder


def split_url(url: str) -> tuple[str, str]:
    """Return a URL that contains {file}, and the name of the set."""
    match = HUGGING_FACE.fullmatch(url)
    if match:
        owner, name, revision = match.groups(default="main")
        return f"{owner}{name}/resolve/{revision}/{{file}}", name
    if "{file}" not in url:
        url = url.rstrip("/") + "/{file}"
    name = re.split(r"[/\s]", url.partition("{file}")[0].rstrip("/"))[-1]
    return url, re.sub(r"[^\w.-]", "_", name) or "set"


def read_remote(url: str, file: str) -> bytes:
    """Return the content of a file at a URL; ValueError if it cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        return fetch(url, file, Path(folder)).read_bytes()


def fetch(url: str, file: str, folder: Path, required: bool = True) -> Path:
    """Copy a file to `folder`, completely or not at all; keep an existing copy.

    Raise ValueError if the file cannot be read, except if it does not exist at the URL and is not
    `required`.
    """
    path = folder / file
    url = url.replace("{file}", file)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # A unique temporary name, because another process may fetch the same file.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as copy:
        try:
            with open_url(url) as source:
                shutil.copyfileobj(source, copy)
        except Exception as error:  # webdataset's openers raise errors of many types
            os.unlink(copy.name)
            exit_status = re.search(r"exit (\d+)", str(error))
            status = int(exit_status[1]) if exit_status else 0
            by_curl = url.startswith("http")
            # Only curl reports that a file does not exist. The command of a pipe may fail for any
            # reason, so its failure counts as absence.
            if required or (by_curl and status != CURL_HTTP_ERROR):
                known_reason = CURL_ERRORS.get(status) if by_curl else None
                reason = known_reason or " ".join(str(error).split())[:200]
                raise ValueError(f"evals: {url} cannot be read: {reason}") from None
            return path
    os.replace(copy.name, path)
    return path
