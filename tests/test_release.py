"""What `make release` refuses, and what it says; that it builds and checks is what CI runs it for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.own_code

ROOT = Path(__file__).parent.parent
CHANGELOG = "# Changelog\n\n## 1.2.3 - 2026-01-31\n\n### Added\n\n- A thing.\n\n## 1.2.2 - 2026-01-01\n\n- Another.\n"


def git(clone: Path, *arguments: str) -> str:
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    return subprocess.run(["git", *who, *arguments], cwd=clone, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with a version, its notes and the script, all in one commit."""
    for name in ("tools", "esper_otel"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "tools" / "release", tmp_path / "tools" / "release")
    (tmp_path / "esper_otel" / "_version.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def commit(clone: Path) -> None:
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "--allow-empty", "--message", "all")


def release(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["tools/release", *arguments], cwd=clone, capture_output=True, text=True, check=False)


def test_the_notes_are_the_section_of_the_version(clone: Path) -> None:
    """They become the tag's message and the text of the release's page."""
    assert release(clone, "notes").stdout == "\n### Added\n\n- A thing.\n\n"


def test_a_tree_with_changes_is_refused(clone: Path) -> None:
    """What is built is what a commit has; the files are named."""
    (clone / "new.py").write_text("")
    done = release(clone)
    assert done.returncode == 1
    assert "commit or stash them first\n?? new.py" in done.stderr


@pytest.mark.parametrize(
    ("changelog", "reason"),
    [
        ("# Changelog\n\n## 1.2.30 - 2026-01-31\n\n- A thing.\n", 'has no section "## 1.2.3"'),
        ("# Changelog\n\n## 1.2.3 - 2026-01-31\n\n## 1.2.2\n\n- Another.\n", "is empty"),
        ("# Changelog\n\n## 1.2.3 (soon)\n\n- A thing.\n", 'must be "## 1.2.3 - unreleased"'),
    ],
)
def test_a_version_without_notes_is_refused(clone: Path, changelog: str, reason: str) -> None:
    """Before anything is built."""
    (clone / "CHANGELOG.md").write_text(changelog)
    commit(clone)
    done = release(clone)
    assert done.returncode == 1
    assert reason in done.stderr


def test_a_version_whose_tag_is_on_another_commit_is_refused(clone: Path) -> None:
    """A released version never changes."""
    git(clone, "tag", "v1.2.3")
    commit(clone)
    done = release(clone, "tag")
    assert done.returncode == 1
    assert "the tag v1.2.3 is on another commit" in done.stderr


def test_the_workflows_pin_every_action_and_give_no_permission_to_all_jobs() -> None:
    """As `make policy` checks with tools that need a registry."""
    found = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.name for path in found] == ["ci.yml", "release.yml"]
    for path in found:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {}
        for job in workflow["jobs"].values():
            assert job["permissions"]
            for step in job["steps"]:
                assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{40 * '0'}"))
