"""Paths and links in README.md and docs/ lead somewhere."""

import re

import pytest

from glimpse.run.lib.config import ROOT
from glimpse.tests.docs import pages

PATH = re.compile(
    r"(?<![\w/.])(?:data|docs|ds_configs|glimpse|model|run|tests)/[\w/.-]+?\.(?:py|md|sh|ya?ml|json)\b"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
WRITTEN = re.compile(r"<!-- (?:file|append|edit): (\S+) -->")  # files of the page's examples


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_paths(text: str) -> set[str]:
    examples = set(WRITTEN.findall(text))
    return {path for path in PATH.findall(text) if not (ROOT / path).exists()} - examples


def broken_links(page: str, text: str) -> set[str]:
    broken = set()
    for link in LINK.findall(text):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists():
            broken.add(link)
        elif anchor and anchor not in anchors(target.read_text()):
            broken.add(link)
    return broken


@pytest.mark.parametrize("page", [page for page in pages.PAGES if page != pages.HISTORY])
def test_paths_exist(page):
    assert not missing_paths((ROOT / page).read_text())


@pytest.mark.parametrize("page", pages.PAGES)
def test_links_lead_somewhere(page):
    assert not broken_links(page, (ROOT / page).read_text())


def test_missing_paths_and_broken_links_are_detected():
    text = "[a](nowhere.md), [b](README.md#no-such-heading), `tests/nowhere/test_x.py`"

    assert missing_paths(text) == {"tests/nowhere/test_x.py"}
    assert broken_links("README.md", text) == {"nowhere.md", "README.md#no-such-heading"}
