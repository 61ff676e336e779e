"""What the Resource says about a run, and who has the last word."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics
from opentelemetry.util.types import AnyValue

from esper_otel.export.resource import resource_for
from esper_otel.frames.frame import Run

RUN = Run("digits-7", 1_790_000_000_000, rank=2, world_size=4)


@pytest.fixture(autouse=True)
def _no_otel_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def attributes(run: Run = RUN) -> Mapping[str, AnyValue]:
    return resource_for(run).attributes or {}


def test_the_resource_tells_runs_attempts_ranks_and_processes_apart() -> None:
    """Prometheus knows a process by service.instance.id only: two ranks with one id overwrite each other."""
    known = attributes()
    assert known["service.name"] == "esper-tolaria"
    assert known["service.instance.id"] == "digits-7/2"
    assert known["esper.run.id"] == "digits-7"
    assert known["esper.run.attempt"] == 1_790_000_000_000
    assert known["esper.rank"] == 2
    assert known["esper.world_size"] == 4
    assert known["host.name"] == socket.gethostname()
    assert known["process.pid"] == os.getpid()
    assert known["process.runtime.name"] == sys.implementation.name
    assert known["process.runtime.version"] == ".".join(map(str, sys.version_info[:3]))
    assert known["process.runtime.description"] == sys.version
    assert known["telemetry.sdk.language"] == "python"


def test_what_is_not_known_is_absent() -> None:
    """An empty device type would look like a device."""
    given = {"esper.experiment.name", "esper.device.type", "esper.device.id", "esper.device.compute_capability"}
    assert not given & attributes().keys()
    full = Run("r", 1, 0, 1, "digits", "cuda", "cuda:0", 90)
    assert {name: attributes(full)[name] for name in given} == {
        "esper.experiment.name": "digits",
        "esper.device.type": "cuda",
        "esper.device.id": "cuda:0",
        "esper.device.compute_capability": 90,
    }


def test_the_users_variables_win_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """OTEL_* means here what it means in every other program."""
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=from-list,host.name=pod-3,team=ml%20ops,cell=9")
    assert attributes()["service.name"] == "from-list"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "trainer")
    known = attributes()
    assert known["service.name"] == "trainer"
    assert (known["host.name"], known["team"], known["cell"]) == ("pod-3", "ml ops", "9")


def test_nobody_can_take_a_runs_identity_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variable in a job template would merge all runs into one, and their frames with them."""
    claimed = "esper.run.id=x,esper.run.attempt=x,esper.rank=x,esper.world_size=x,service.instance.id=x"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", claimed)
    assert "x" not in attributes().values()


def test_command_line_arguments_never_leave_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold paths, tokens and names of data sets, even where the user asks for the process detector."""
    monkeypatch.setenv("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "process")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "process.command_args=--token=1,process.command_line=a --token=1")
    known = attributes()
    assert "process.executable.name" in known
    assert not {"process.command_args", "process.command_line"} & known.keys()


def test_bytes_that_are_no_text_do_not_cost_the_whole_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protobuf refuses surrogates: the attribute would be missing from every request, with a traceback each."""
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", os.fsdecode(b"team=caf\xe9"))
    (block,) = encode_metrics(MetricsData([ResourceMetrics(resource_for(RUN), [], "")])).resource_metrics
    assert {item.key: item.value.string_value for item in block.resource.attributes}["team"] == "caf?"


def git(directory: Path, *arguments: str) -> str:
    """Runs git without the user's configuration."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
    environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    ran = subprocess.run(
        ["git", *identity, *arguments], cwd=directory, env=environment, check=True, capture_output=True, text=True
    )
    return ran.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one commit."""
    directory = tmp_path / "checkout"
    directory.mkdir()
    git(directory, "init", "--quiet", "--initial-branch", "main")
    git(directory, "commit", "--quiet", "--allow-empty", "--message", "first")
    return directory


def revision_in(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AnyValue:
    monkeypatch.chdir(directory)
    return attributes().get("vcs.ref.head.revision")


def test_the_revision_is_the_commit_checked_out(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which code made this curve? Also from below the top, with packed refs, and on a detached HEAD."""
    first = git(checkout, "rev-parse", "HEAD")
    below = checkout / "a" / "b"
    below.mkdir(parents=True)
    assert revision_in(below, monkeypatch) == first
    git(checkout, "pack-refs", "--all")
    assert not (checkout / ".git/refs/heads/main").exists()
    assert revision_in(checkout, monkeypatch) == first
    git(checkout, "commit", "--quiet", "--allow-empty", "--message", "second")
    assert revision_in(checkout, monkeypatch) == git(checkout, "rev-parse", "HEAD") != first
    git(checkout, "checkout", "--quiet", "--detach", first)
    assert revision_in(checkout, monkeypatch) == first


@pytest.mark.parametrize("packed", [False, True])
def test_the_revision_of_a_linked_worktree_is_its_own(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """Several experiments side by side often are worktrees of one repository."""
    git(checkout, "worktree", "add", "--quiet", "-b", "other", "../linked")
    linked = checkout.parent / "linked"
    git(linked, "commit", "--quiet", "--allow-empty", "--message", "other")
    if packed:
        git(checkout, "pack-refs", "--all")
    assert revision_in(linked, monkeypatch) == git(linked, "rev-parse", "HEAD")
    assert git(linked, "rev-parse", "HEAD") != git(checkout, "rev-parse", "HEAD")


def test_the_revision_of_a_submodule_is_its_own(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A submodule's .git is a file with a relative path."""
    outer = checkout.parent / "outer"
    outer.mkdir()
    git(outer, "init", "--quiet")
    git(outer, "submodule", "--quiet", "add", str(checkout), "inner")
    assert (outer / "inner/.git").is_file()
    assert revision_in(outer / "inner", monkeypatch) == git(checkout, "rev-parse", "HEAD")


def broken(checkout: Path, how: str) -> None:
    repository = checkout / ".git"
    head = repository / "HEAD"
    match how:
        case "no commit yet":
            (repository / "refs/heads/main").unlink()
        case "head is missing":
            head.unlink()
        case "head is a pipe":
            head.unlink()
            os.mkfifo(head)
        case "head is huge":
            os.truncate(head, 2**34)
        case "head is no text":
            head.write_bytes(b"\xff\xfe\x00")
        case "head is no hash":
            head.write_text("0123456789abcdef\n")
        case "head leaves the repository":
            (checkout / "secret").write_text("0" * 40)
            head.write_text("ref: refs/../../secret\n")
        case "refs go in a circle":
            (repository / "refs/heads/main").write_text("ref: refs/heads/main\n")
        case "the path has a null byte":
            shutil.rmtree(repository)
            (checkout / ".git").write_text("gitdir: a\0b\n")
        case "nothing is there":
            shutil.rmtree(repository)
            (checkout / ".git").write_text("gitdir: ../gone\n")


@pytest.mark.parametrize(
    "how",
    [
        "no commit yet",
        "head is missing",
        "head is a pipe",
        "head is huge",
        "head is no text",
        "head is no hash",
        "head leaves the repository",
        "refs go in a circle",
        "the path has a null byte",
        "nothing is there",
    ],
)
def test_a_repository_that_cannot_be_read_has_no_revision(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A wrong revision is worse than none, and training must start all the same, at once."""
    broken(checkout, how)
    assert revision_in(checkout, monkeypatch) is None


def test_outside_a_checkout_there_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the current directory has been deleted."""
    gone = tmp_path / "gone"
    gone.mkdir()
    assert revision_in(gone, monkeypatch) is None
    gone.rmdir()
    assert "vcs.ref.head.revision" not in attributes()
