"""A headless Chromium for tests that open HTML pages.

An installed Chromium is used if there is one. Otherwise Debian's package is downloaded and unpacked
below ~/.cache, which needs no root.

    with open_browser() as browser:        a playwright Browser
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


def find_browser() -> tuple[str, dict[str, str]]:
    """Return the path of the program, and the environment variables that it needs."""
    for name in (PACKAGE, "chromium"):
        program = shutil.which(name)
        if program:
            return program, {}

    if not CACHE.exists():
        try:
            download_browser()
        except ValueError:
            # The package lists may be missing or outdated. Updating them needs root.
            subprocess.run(["apt-get", "update", "-q"], capture_output=True)
            download_browser()
    folders = []
    for pattern in ("*-linux-gnu", "*-linux-gnu/pulseaudio"):
        folders += (CACHE / "usr/lib").glob(pattern)
    library_path = os.pathsep.join(map(str, folders))
    return str(CACHE / "usr/lib/chromium" / PACKAGE), {"LD_LIBRARY_PATH": library_path}


def download_browser() -> None:
    """Unpack the browser's package and all packages that apt would install with it.

    Raise ValueError if one of them cannot be downloaded or unpacked.
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
def open_browser():
    """Start the browser, and close it at the end of the with block."""
    program, variables = find_browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, env={**os.environ, **variables}, args=["--no-sandbox"]
        )
        try:
            yield browser
        finally:
            browser.close()
