"""A headless Chromium from Debian for tests that look at pages: what the machine has, else fetched
and unpacked without root.

    with opened() as browser:              a playwright browser, without a network
        page = browser.new_page(viewport=dict(width=390, height=844))
"""

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

from glimpse.data.builders.packages import run

PACKAGE = "chromium-headless-shell"
CACHE = Path.home() / ".cache/glimpse/browser"


def found() -> tuple[str, dict[str, str]]:
    """The program, and what its environment needs beside ours."""
    for name in (PACKAGE, "chromium"):
        if program := shutil.which(name):
            return program, {}
    if not CACHE.exists():
        try:
            fetch()
        except ValueError:  # the lists of packages may be missing or old; without root they stay so
            subprocess.run(["apt-get", "update", "-q"], capture_output=True)
            fetch()
    places = [
        path
        for pattern in ("*-linux-gnu", "*-linux-gnu/pulseaudio")
        for path in (CACHE / "usr/lib").glob(pattern)
    ]
    return str(CACHE / "usr/lib/chromium" / PACKAGE), {
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, places))
    }


def fetch() -> None:
    """Unpack the browser's package, and those that it needs and this machine lacks, as apt would
    install them: all, or ValueError.
    """
    planned = run(["apt-get", "install", "-s", "--no-install-recommends", PACKAGE], PACKAGE)
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as made:
        run(
            ["apt-get", "download", "-q", *re.findall(r"^Inst (\S+)", planned, re.MULTILINE)],
            PACKAGE,
            cwd=made,
        )
        for archive in Path(made).glob("*.deb"):
            run(["dpkg-deb", "-x", str(archive), f"{made}/root"], PACKAGE)
        os.replace(f"{made}/root", CACHE)


@contextmanager
def opened():
    program, more = found()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, env={**os.environ, **more}, args=["--no-sandbox"]
        )
        try:
            yield browser
        finally:
            browser.close()
