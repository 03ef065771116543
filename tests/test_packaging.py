"""Installation: pyproject.toml must list every package, data file and dependency of the code."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import glimpse
from glimpse.tests.test_architecture import imports

ROOT = Path(__file__).parents[1]
CODE = ("data", "model", "run")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
EXTRAS = PROJECT["optional-dependencies"]
# {module: the distributions that provide it}
DISTRIBUTIONS = {
    module: set(map(canonicalize_name, packages))
    for module, packages in packages_distributions().items()
}
OFFLINE = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")  # options of pip

# {file: the extra whose packages it imports at module level}
OPTIONAL = {
    "run/evals/embeddings.py": "parquet",
    "run/reports/plots.py": "plots",
}
# The scripts that cannot start without an extra; docs/launching.md lists them.
NEEDS = {"embed": "parquet", "report": "plots", "scaling": "plots"}


def folder(package: str) -> Path:
    """Return the folder of a package in the checkout."""
    parts = package.split(".")
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        if name in SETUPTOOLS["package-dir"]:
            return ROOT.joinpath(SETUPTOOLS["package-dir"][name], *parts[n:])
    raise ValueError(f"{package}: pyproject.toml has no package-dir for it")


def sources() -> list[Path]:
    """Return the Python files of data/, model/ and run/."""
    return sorted(path for top in CODE for path in (ROOT / top).rglob("*.py"))


def data_files() -> set[str]:
    """Return the files that the code may read: all but Python and shell files."""
    paths = [path for top in (*CODE, "ds_configs") for path in (ROOT / top).rglob("*")]
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and path.suffix not in (".py", ".pyc", ".sh")
    }


def requirements(*groups: str) -> list[Requirement]:
    """Return the requirements of extras; "" stands for the required dependencies."""
    lines = []
    for group in groups:
        lines += EXTRAS[group] if group else PROJECT["dependencies"]
    parsed = map(Requirement, lines)
    return [requirement for requirement in parsed if requirement.name != PROJECT["name"]]


def names(*groups: str) -> set[str]:
    """Return the canonical names of the requirements of extras."""
    return {canonicalize_name(requirement.name) for requirement in requirements(*groups)}


def pins(file: str) -> dict[str, str]:
    """Return {package: version} from a requirements file."""
    lines = (ROOT / file).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_folder_with_code_is_a_package():
    folders = {path.parent.relative_to(ROOT) for path in sources()}
    packages = {".".join(["glimpse", *path.parts]) for path in folders}

    assert set(SETUPTOOLS["packages"]) == packages | {"glimpse", "glimpse.ds_configs"}
    assert SETUPTOOLS["packages"] == sorted(SETUPTOOLS["packages"])


def test_every_data_file_is_shipped():
    shipped = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            files = {path.relative_to(ROOT).as_posix() for path in folder(package).glob(pattern)}
            assert files, f"package-data: {package}: {pattern!r} matches no file"
            shipped |= files

    assert shipped == data_files()


@pytest.mark.parametrize(
    "file, groups",
    [
        ("requirements.txt", ("", *(extra for extra in EXTRAS if extra != "dev"))),
        ("requirements-dev.txt", ("dev",)),
    ],
)
def test_the_bounds_admit_the_pinned_versions(file, groups):
    versions = pins(file)

    assert names(*groups) == set(versions)
    for requirement in requirements(*groups):
        bounds = list(requirement.specifier)
        assert [bound.operator for bound in bounds] == [">="], f"{requirement}: only a lower bound"
        version = versions[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement}: {file} pins {version}"


def test_developers_get_every_extra():
    project = [line for line in EXTRAS["dev"] if Requirement(line).name == PROJECT["name"]]

    assert Requirement(project[0]).extras == set(EXTRAS) - {"dev"}


@pytest.mark.parametrize("path", [path.relative_to(ROOT).as_posix() for path in sources()])
def test_every_import_is_declared(path):
    """Imports at module level are required dependencies, or in the extra of the file.

    Imports inside functions may be in any extra.
    """
    extras = [extra for prefix, extra in OPTIONAL.items() if path.startswith(prefix)]
    at_module_level = names("", *extras)
    in_functions = names("", *EXTRAS)

    for name, line, lazy in imports((ROOT / path).read_text()):
        module = name.split(".")[0]
        if module in sys.stdlib_module_names or module == "glimpse":
            continue
        packages = DISTRIBUTIONS.get(module, {module})
        declared = in_functions if lazy else at_module_level
        assert packages & declared, f"{path}:{line}: {name} is not declared"


def test_scripts_start_without_the_extras():
    program = """
import importlib, sys
scripts, optional = (line.split(",") for line in sys.argv[1:])
for name in optional:
    sys.modules[name] = None  # makes an import fail
for script in scripts:
    try:
        importlib.import_module(f"glimpse.run.{script}")
    except ImportError as error:
        print(script, error.name)
"""
    optional = set().union(*(names(extra) for extra in EXTRAS if extra != "dev")) - names("")
    modules = [module for module, packages in DISTRIBUTIONS.items() if packages & optional]
    scripts = [path.stem for path in (ROOT / "run").glob("[!_]*.py")]
    arguments = [",".join(scripts), ",".join(modules)]

    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    failures = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert failures.keys() <= NEEDS.keys(), failures


def test_the_docs_name_the_scripts_that_need_an_extra():
    table = (ROOT / "docs/launching.md").read_text()
    for script, extra in NEEDS.items():
        row = re.search(rf"^\| `{extra}` .*$", table, re.M)[0]
        assert f"run/{script}.py" in row


def write_other_packages(where: Path) -> None:
    """Write a user's packages that have the same names as folders of the checkout."""
    for name in CODE:
        (where / name).mkdir(parents=True)
        (where / name / "__init__.py").write_text("OWNER = 'user'\n")


def test_a_checkout_runs_beside_packages_of_the_same_names(tmp_path):
    write_other_packages(tmp_path)
    # Python loads this file at start-up, before the script.
    (tmp_path / "sitecustomize.py").write_text("import data, model, run\nprint(run.OWNER)\n")

    done = subprocess.run(
        [sys.executable, str(ROOT / "run/pretrain.py"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("user\nusage: pretrain.py")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a copy of the files that a build needs, because a build writes into its folder."""
    copy = tmp_path_factory.mktemp("source") / "glimpse"
    for name in SETUPTOOLS["package-dir"].values():
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """Build a wheel, and return its path."""
    out = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", out, source)
    return next(out.glob("*.whl"))


def call(*command, cwd: Path | None = None) -> str:
    """Run a command without PYTHONPATH, and return its stdout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(map(str, command), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(where: Path) -> Path:
    """Create a virtual environment that also has the packages of this one; return its Python."""
    venv.create(where, symlinks=True)
    paths = sysconfig.get_paths("venv", {"base": str(where), "platbase": str(where)})
    site = Path(paths["purelib"])
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "tests.pth").write_text("".join(f"{path}\n" for path in sorted(installed)))
    write_other_packages(site)
    return where / "bin" / "python"


@pytest.mark.slow
def test_a_wheel_holds_what_the_packages_are(wheel):
    paths = {path.relative_to(ROOT).as_posix() for path in sources()} | data_files()
    expected = {f"glimpse/{path}" for path in paths} | {"glimpse/__init__.py"}

    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    assert files == expected
    name = PROJECT["name"].replace("-", "_")
    assert wheel.name == f"{name}-{glimpse.__version__}-py3-none-any.whl"


PROGRAM = """
import json, data, model, run  # the user's
import glimpse, glimpse.data.loader, glimpse.run.pretrain
from glimpse.data.builders.imagefolder import WORDNET
from glimpse.data.evals.prompts import load_templates
from glimpse.run.lib.config import ROOT, load
from glimpse.run.study import claims, grid
from glimpse.run.train.engine import read_deepspeed_json

config = load(ROOT / "run/configs/flip_b16.yaml")
print(json.dumps({
    "owners": [data.OWNER, model.OWNER, run.OWNER],
    "version": glimpse.__version__,
    "root": str(ROOT),
    "files": [module.__file__ for module in (glimpse, glimpse.data, glimpse.model, glimpse.run)],
    "zero stage": read_deepspeed_json(config.deepspeed)["zero_optimization"]["stage"],
    "templates": len(load_templates("7")),
    "readable": [
        file.exists()
        for file in (WORDNET, claims.CLAIMS_FILE, grid.GRIDS_FOLDER / "methods.yaml")
    ],
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_installed_beside_packages_of_the_same_names(how, wheel, source, tmp_path):
    python = environment(tmp_path / "venv")
    arguments = [wheel] if how == "wheel" else ["--editable", source]
    call(sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, *arguments)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    report = json.loads(call(python, "-c", PROGRAM, cwd=elsewhere).splitlines()[-1])
    usage = call(python, "-m", "glimpse.run.prepare", "--help", cwd=elsewhere)

    root = tmp_path / "venv" if how == "wheel" else source
    assert report["owners"] == ["user"] * 3
    assert report["version"] == glimpse.__version__
    assert Path(report["root"]).is_relative_to(root)
    assert all(Path(file).is_relative_to(root) for file in report["files"])
    assert report["zero stage"] == 3
    assert report["templates"] == 7
    assert report["readable"] == [True] * 3
    assert re.search(r"\bpairs\b", usage)
