"""Every command of README.md and docs/ runs, and docs/extending.md's examples work.

A page's commands run in order in a copy of the checkout, where small stand-ins lie at the paths of
the quickstart's data and run, and where the quickstart's config trains for four steps.

    WHOLE=1 bash run/test.sh tests/docs/test_commands.py -s

runs them as they are instead: the quickstart's data are built and its model is trained, in the
environments that the README's two commands make. This takes hours and needs PyPI and npm.
"""

import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from glimpse.run.lib.config import ROOT
from glimpse.tests.docs import pages
from glimpse.tests.helpers import tiny

pytestmark = pytest.mark.slow

SETS = ("seen_concepts_seen_style", "unseen_concepts_seen_style")
SETS += ("seen_concepts_unseen_style", "unseen_concepts_unseen_style")
# They make environments and the real data: only WHOLE runs them.
INSTALLING = re.compile(r"^(bash run/quickstart\.sh|bash run/test\.sh *(#.*)?$|pip |source )")
# pytest runs in this environment instead of one of the workspace's own
TESTING = re.compile(r"^bash run/test\.sh ")
TRAIN_SHORT = {
    "samples: 128k": "samples: 128",
    "batch: 256": "batch: 32",
    "warmup: 8k": "warmup: 32",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A copy of the checkout with small data, and a run that trained on them."""
    workspace = tmp_path_factory.mktemp("prepared")
    pages.copy_checkout(workspace)
    if tiny.RUN_EVERYTHING:
        print(pages.run("bash run/quickstart.sh", workspace, timeout=3600).stdout)
        return workspace

    # 1. Shapes instead of emoji, at the quickstart's paths.
    data = tiny.write_dataset(tmp_path_factory.mktemp("data") / "shapes")
    glyphs = workspace / "datasets/glyphs"
    shutil.copytree(data / "train", glyphs / "train")
    shutil.copytree(data / "eval/retrieval", glyphs / "eval/retrieval")
    for name in SETS:
        shutil.copytree(data / "eval/shapes", glyphs / "eval" / name)
    shutil.copy(data / "tokenizer.model", workspace / "datasets/glyphs-tokenizer.model")

    # 2. The quickstart's config, which the other nano configs inherit, trains for four steps.
    config = workspace / "run/configs/quickstart.yaml"
    text = config.read_text()
    for long, short in TRAIN_SHORT.items():
        assert long in text
        text = text.replace(long, short)
    config.write_text(text)

    # 3. The quickstart's training command.
    script = (ROOT / "run/quickstart.sh").read_text()
    commands = [command for _, command in pages.commands(script)]
    (command,) = (c for c in commands if c.startswith("deepspeed ") and "run/pretrain.py" in c)
    done = pages.run(f"ranks=2 run=runs/quickstart; {command}", workspace)
    assert done.returncode == 0, done.stdout
    return workspace


def as_run_here(block: pages.Block) -> str:
    """Return the command that the test runs for a block of commands; "" for none."""
    command = block.text
    if block.kind == "parse":
        arguments = re.sub(r"^python ", "", command.partition("  #")[0])
        return f"{sys.executable} -m glimpse.tests.workers.parse_worker {arguments}"
    if tiny.RUN_EVERYTHING:
        return command
    if INSTALLING.match(command):
        return ""
    return TESTING.sub(f"{sys.executable} -m pytest -q -p no:cacheprovider ", command)


@pytest.mark.parametrize("page", [page for page in pages.PAGES if page != pages.HISTORY])
def test_commands_run(page, prepared, tmp_path, monkeypatch):
    for name, value in tiny.environment().items():
        monkeypatch.setenv(name, value)
    workspace = tmp_path / "checkout"
    shutil.copytree(prepared, workspace)

    failures = []
    for block in pages.blocks(page):
        if block.kind not in ("run", "parse"):
            pages.apply(block, workspace)
            continue
        command = as_run_here(block)
        if not command:
            continue
        begin = time.perf_counter()
        done = pages.run(command, workspace, timeout=7200 if tiny.RUN_EVERYTHING else 300)
        seconds = time.perf_counter() - begin
        print(f"{page}:{block.line}: {seconds:.0f} s, exit {done.returncode}: {block.text}")
        if done.returncode:
            failures.append(f"{page}:{block.line}: {block.text}\n{done.stdout[-3000:]}")

    assert not failures, "\n\n".join(failures)


def test_a_failing_command_is_caught(prepared, tmp_path):
    block = pages.Block(
        "parse", "python run/evaluate.py --run runs/quickstart --no-such-option", line=1
    )

    done = pages.run(as_run_here(block), prepared)

    assert done.returncode == 2
    assert "--no-such-option" in done.stdout
