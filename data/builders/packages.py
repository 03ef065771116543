"""Packages as sources of data: downloaded and unpacked once, not installed, so that nothing of
theirs runs.

    debian(cache, "tuxpaint-stamps-default", ("*.png", "*.txt"))
        apt checks the archive's signature and size, whichever version there is
    wheel(cache, "animal-mnist==0.4", SHA256)
        pip fetches it; its hash must be the one that we looked at

What they write is whole or not there.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def debian(cache: Path, package: str, patterns: tuple[str, ...] | None = None) -> tuple[Path, str]:
    """Download and unpack a Debian package (or only files like `patterns`) once; returns its folder
    and version.
    """
    folder, record = cache / package, cache / f"{package}.version"
    if not record.exists():
        for tool in ("apt-get", "dpkg", "tar"):
            if not shutil.which(tool):
                raise ValueError(
                    f"{package}: no {tool} here; it is a Debian package, so build on Debian or"
                    " Ubuntu, or without it"
                )
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        archive = download(cache, package)
        chosen = ["--wildcards", *patterns] if patterns else []
        files = subprocess.Popen(["dpkg", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
        run(["tar", "-x", "-C", str(folder), *chosen], package, stdin=files.stdout)
        if files.wait():
            raise ValueError(f"{package}: {archive} is damaged; remove it")
        # written last: the folder is whole
        record.write_text(run(["dpkg-deb", "-f", str(archive), "Version"], package).strip())
        archive.unlink()
    return folder, record.read_text()


def copyright_of(cache: Path, package: str) -> str:
    """The copyright file of an unpacked Debian package."""
    return (cache / package / "usr/share/doc" / package / "copyright").read_text(errors="replace")


def download(cache: Path, package: str) -> Path:
    for old in cache.glob(f"{package}_*.deb"):
        old.unlink()
    run(["apt-get", "download", "-q", package], package, cwd=cache)
    return next(cache.glob(f"{package}_*.deb"))


def run(command: list[str], package: str, **options) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    if done.returncode:
        last = " | ".join(done.stderr.strip().splitlines()[-2:])
        raise ValueError(
            f"{package}: `{' '.join(command[:3])}` failed ({last}); try `apt-get update` first, or"
            " build without it"
        )
    return done.stdout


def wheel(cache: Path, requirement: str, sha256: str) -> Path:
    """Download 'name==version' without what it depends on, once; returns the wheel (a zip) of that
    hash.
    """
    path = cache / f"{requirement.replace('==', '-')}.whl"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as new:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary=:all:",
                "-d",
                new,
                requirement,
            ]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                last = " | ".join(done.stderr.strip().splitlines()[-2:])
                raise ValueError(
                    f"{requirement}: `pip download` failed ({last}); it needs the PyPI registry, or"
                    f" that wheel as {path}"
                )
            next(Path(new).glob("*.whl")).rename(path)
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(
            f"{path}: sha256 {found[:12]}..., not {sha256[:12]}...; it is damaged or another"
            " release: remove it"
        )
    return path
