"""Packages as sources of data: downloaded and unpacked once, never installed, so none of their
code runs.

    debian(cache, "tuxpaint-stamps-default", ("*.png", "*.txt"))
        apt checks the archive's signature and size; any version is accepted
    wheel(cache, "animal-mnist==0.4", SHA256)
        pip downloads it; its hash must match the pinned one

The functions leave complete files or nothing: an interrupted download is repeated.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def debian(cache: Path, package: str, patterns: tuple[str, ...] | None = None) -> tuple[Path, str]:
    """Download and unpack a Debian package once; return its folder and version.

    patterns: unpack only the files that match one of them.
    """
    folder = cache / package
    record = cache / f"{package}.version"
    if record.exists():
        return folder, record.read_text()

    for tool in ("apt-get", "dpkg", "tar"):
        if not shutil.which(tool):
            raise ValueError(
                f"{package}: no {tool} here; it is a Debian package, so build on Debian or"
                " Ubuntu, or without it"
            )

    # Download into the cache and unpack into an empty folder.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = download(cache, package)
    selection = ["--wildcards", *patterns] if patterns else []
    files = subprocess.Popen(["dpkg", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    run(["tar", "-x", "-C", str(folder), *selection], package, stdin=files.stdout)
    if files.wait():
        raise ValueError(f"{package}: {archive} is damaged; remove it")

    # The record is written last, so that it marks a complete folder.
    version = run(["dpkg-deb", "-f", str(archive), "Version"], package)
    record.write_text(version.strip())
    archive.unlink()
    return folder, record.read_text()


def copyright_of(cache: Path, package: str) -> str:
    """Return the text of an unpacked Debian package's copyright file."""
    path = cache / package / "usr/share/doc" / package / "copyright"
    return path.read_text(errors="replace")


def download(cache: Path, package: str) -> Path:
    """Download a Debian package with apt-get in place of older ones; return the archive's path."""
    for old in cache.glob(f"{package}_*.deb"):
        old.unlink()
    run(["apt-get", "download", "-q", package], package, cwd=cache)
    return next(cache.glob(f"{package}_*.deb"))


def run(command: list[str], package: str, **options) -> str:
    """Run a command and return its stdout; ValueError with the end of its stderr if it fails."""
    result = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    if result.returncode:
        program = " ".join(command[:3])
        raise ValueError(
            f"{package}: `{program}` failed ({last_lines(result.stderr)}); try `apt-get update`"
            " first, or build without it"
        )
    return result.stdout


def last_lines(stderr: str) -> str:
    """Return the last two lines of a program's stderr on one line."""
    return " | ".join(stderr.strip().splitlines()[-2:])


def wheel(cache: Path, requirement: str, sha256: str) -> Path:
    """Download the wheel (a zip) of 'name==version' once, without dependencies; return its path.

    ValueError: pip fails, or the wheel has another hash.
    """
    path = cache / f"{requirement.replace('==', '-')}.whl"
    if not path.exists():
        download_wheel(cache, requirement, path)

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{path}: sha256 {digest[:12]}..., not {sha256[:12]}...; it is damaged or another"
            " release: remove it"
        )
    return path


def download_wheel(cache: Path, requirement: str, path: Path) -> None:
    """Have pip download a wheel into a temporary folder, then move it to `path`."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip_download = [sys.executable, "-m", "pip", "download", "-q"]
        options = ["--no-deps", "--only-binary=:all:", "-d", folder]
        command = [*pip_download, *options, requirement]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            raise ValueError(
                f"{requirement}: `pip download` failed ({last_lines(result.stderr)}); it needs the"
                f" PyPI registry, or that wheel as {path}"
            )
        next(Path(folder).glob("*.whl")).rename(path)
