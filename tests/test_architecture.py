"""The shape of the codebase: who may import whom, which file is a package's door, how long a file
may grow; the README's tree.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    p.relative_to(ROOT).as_posix()
    for top in ("model", "data", "run", "tests")
    for p in (ROOT / top).rglob("*.py")
)

# A file may import only what the longest matching prefix allows.  `data` and `model` are leaves
# that do not know each other; `run` is
# the only place where they meet.
MAY_IMPORT = {
    "data/": {"data"},
    "model/": {"model"},
    "run/": {"data", "model", "run.lib", "run.evals"},
    "run/lib/": {"data", "model", "run.lib"},
    "run/evals/": {"data", "model", "run.lib", "run.evals"},
    "tests/": {"data", "model", "run", "tests"},
}
# What only these files may touch.
ONLY_IN = {
    "deepspeed": (
        "run/lib/elastic.py",
        "run/lib/engine.py",
        "run/lib/ranks.py",
        "run/lib/zero_files.py",
        "tests/",
    ),
    "torch.distributed": (
        "model/collectives.py",
        "model/convert/torch_dist.py",
        "run/lib/",
        "tests/",
    ),
    "webdataset": ("data/stream.py", "tests/"),
    "sentencepiece": ("data/tokenizer.py", "data/tokenizer_files.py"),
    "tokenizers": ("data/tokenizer.py", "data/tokenizer_files.py"),
    "megatron": ("model/parallel.py", "tests/"),
    "torch.utils.tensorboard": ("run/lib/log.py",),
    "matplotlib": ("run/lib/plots.py",),
    "argparse": ("run/lib/config.py", "model/convert/files.py", "tests/"),
}


def imports(source):
    """(dotted name, line) of everything that a source imports; a relative import's name begins with
    a dot.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                (f"{'.' * node.level}{node.module}.{alias.name}", node.lineno)
                for alias in node.names
            )


def within(name, package):
    return name == package or name.startswith(package + ".")


def violations(path, source):
    """What the file at `path` does that the rules forbid, a line each."""
    allowed = MAY_IMPORT[max((p for p in MAY_IMPORT if path.startswith(p)), key=len)]
    for name, line in imports(source):
        if name.startswith("."):
            yield f"{path}:{line}: relative import; write the full name"
        elif name.split(".")[0] in ("data", "model", "run", "tests") and not any(
            within(name, a) for a in allowed
        ):
            yield f"{path}:{line} imports {name}; it may import {sorted(allowed)}"
        for package, homes in ONLY_IN.items():
            if within(name, package) and not path.startswith(homes):
                yield f"{path}:{line} imports {package}; only {homes} may"
    if not path.endswith("__init__.py") and not ast.get_docstring(ast.parse(source)):
        yield f"{path} does not open with what it is for"


@pytest.mark.parametrize("path", FILES)
def test_rules(path):
    assert not list(violations(path, (ROOT / path).read_text()))


@pytest.mark.parametrize(
    "path, source, complaint",
    [
        ("data/x.py", "from model.layers import Block", "imports model.layers.Block"),
        ("model/x.py", "import data.masking", "imports data.masking"),
        ("run/lib/x.py", "from run.pretrain import main", "imports run.pretrain.main"),
        ("run/x.py", "import deepspeed.comm", "imports deepspeed"),
        ("data/x.py", "import torch.distributed as dist", "imports torch.distributed"),
        ("run/x.py", "import argparse", "imports argparse"),
        ("model/x.py", "from . import layers", "relative import"),
        ("model/x.py", "x = 1", "what it is for"),
    ],
)
def test_the_rules_can_fail(path, source, complaint):
    assert any(complaint in found for found in violations(path, source))


def test_the_readme_tree_is_true():
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    missing = {path for path in named if not (ROOT / path).exists()}
    assert not missing, f"README.md names {missing}, which are not there"
    tops = {
        p.name
        for p in ROOT.iterdir()
        if p.is_dir() and not p.name.startswith(".") and p.name not in ("runs", "datasets")
    }
    folded = ("tests/", "run/lib", "run/evals", "model/methods", "model/convert")
    unnamed = {
        p for p in [*FILES, *tops] if not p.startswith(folded) and "__init__" not in p
    } - named
    assert not unnamed, f"README.md's tree lacks {unnamed}"
