"""A headless Chromium from Debian for tests that look at pages.

The machine's own is used; else one is fetched and unpacked without root.

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
    """Return the program, and the environment variables that it needs."""
    for name in (PACKAGE, "chromium"):
        program = shutil.which(name)
        if program:
            return program, {}

    if not CACHE.exists():
        try:
            fetch()
        except ValueError:  # the lists of packages may be missing or old; without root they stay so
            subprocess.run(["apt-get", "update", "-q"], capture_output=True)
            fetch()
    folders = []
    for pattern in ("*-linux-gnu", "*-linux-gnu/pulseaudio"):
        folders += (CACHE / "usr/lib").glob(pattern)
    library_path = os.pathsep.join(map(str, folders))
    return str(CACHE / "usr/lib/chromium" / PACKAGE), {"LD_LIBRARY_PATH": library_path}


def fetch() -> None:
    """Unpack the browser's package, and those that it needs and this machine lacks.

    They are those that apt would install; all are unpacked, or ValueError is raised.
    """
    plan = run(["apt-get", "install", "-s", "--no-install-recommends", PACKAGE], PACKAGE)
    packages = re.findall(r"^Inst (\S+)", plan, re.MULTILINE)
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
        run(["apt-get", "download", "-q", *packages], PACKAGE, cwd=folder)
        for archive in Path(folder).glob("*.deb"):
            run(["dpkg-deb", "-x", str(archive), f"{folder}/root"], PACKAGE)
        os.replace(f"{folder}/root", CACHE)


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
