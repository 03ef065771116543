"""The commit that a run records in its config.yaml.

bash run/test.sh tests/run/lib/test_run_dir.py
"""

import subprocess
from pathlib import Path

import pytest

from glimpse.run.lib.run_dir import git_commit


def call_git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.org"]
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path) -> Path:
    """Return a git checkout with one commit, which ignores its virtual environment."""
    call_git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("venv/\n")
    call_git(tmp_path, "add", ".gitignore")
    call_git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def write_code(root: Path) -> None:
    (root / "run/lib").mkdir(parents=True)
    (root / "run/lib/run_dir.py").write_text("")


def test_a_checkout_records_its_commit(project):
    write_code(project)
    call_git(project, "add", "run")
    call_git(project, "commit", "--quiet", "--message", "second")

    commit = call_git(project, "rev-parse", "HEAD")

    assert git_commit(project) == commit[:12]

    (project / ".gitignore").write_text("")
    assert git_commit(project) == f"{commit[:12]}-dirty"


def test_an_installed_package_does_not_record_the_commit_of_the_project_around_it(project):
    installed = project / "venv/lib/site-packages/glimpse"
    write_code(installed)

    assert git_commit(installed) == "unknown"


def test_without_git_the_commit_is_unknown(project, monkeypatch):
    monkeypatch.setenv("PATH", str(project))

    assert git_commit(project) == "unknown"
