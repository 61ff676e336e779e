"""The project's files agree with each other and with the code."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import esper_otel
from esper_otel.settings import EsperSettings

pytestmark = pytest.mark.lengthy

ROOT = Path(__file__).parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(read("pyproject.toml"))["project"]
DECLARED = [
    requirement
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, group)
    if requirement.name != PROJECT["name"]
]


def pins(name: str) -> dict[str, list[Version]]:
    """The versions that a constraints file fixes; several where they depend on the Python."""
    pinned: dict[str, list[Version]] = {}
    for line in read(name).splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            [only] = requirement.specifier
            assert only.operator == "==", line
            pinned.setdefault(requirement.name, []).append(Version(only.version))
    return pinned


def test_the_version_is_in_the_changelog_and_in_what_is_installed() -> None:
    """A release without its notes is half a release."""
    assert re.search(rf"^## {re.escape(esper_otel.__version__)}\b", read("CHANGELOG.md"), re.MULTILINE)
    assert metadata.version("esper-otel") == esper_otel.__version__


def test_every_setting_is_documented() -> None:
    """With its variable."""
    for name in EsperSettings.settings:
        assert f"| `{name}` | `ESPER_{name.upper()}` |" in read("docs/reference/settings.md")


def test_every_dependency_is_pinned_within_its_range() -> None:
    """What make and CI install is what pyproject.toml allows. Repair: make constraints."""
    pinned = pins("constraints.txt")
    contrib = PROJECT["optional-dependencies"]["contrib"]  # of the oldest versions only
    for requirement in (each for each in DECLARED if str(each) not in map(str, map(Requirement, contrib))):
        assert requirement.name in pinned, f"{requirement.name}: make constraints"
        for version in pinned[requirement.name]:
            assert version in requirement.specifier, f"{requirement}: make constraints"
    assert {"uv", "hatchling"} <= pinned.keys()


def test_every_lower_bound_is_the_version_that_test_lowest_installs() -> None:
    """A bound that nobody has tried is a guess. Repair: make constraints, and the bound that it cannot keep."""
    pinned = pins("constraints-lowest.txt")
    for requirement in DECLARED:
        [bound] = [each for each in requirement.specifier if each.operator != "<"]
        assert bound.operator == ">=", requirement
        assert pinned[requirement.name] == [Version(bound.version)], f"{requirement}: make constraints"


def test_every_foreign_import_is_of_a_declared_dependency() -> None:
    """What another package happens to bring today may be gone with its next version."""
    brought = {"opentelemetry-exporter-otlp": ("opentelemetry-proto", "googleapis-common-protos")}  # its interface
    declared = {each.name for each in DECLARED} | {name for names in brought.values() for name in names}
    homes = metadata.packages_distributions()
    for path in Path(esper_otel.__file__).parent.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = re.match(r"\s*(?:from|import) ([a-z_]+)", line)
            if found and found[1] in homes and found[1] != "esper_otel":
                assert declared & {canonicalize_name(home) for home in homes[found[1]]}, f"{path.name}: {line.strip()}"


def test_constraints_name_no_registry() -> None:
    """Where packages come from is the machine's business."""
    for name in ("constraints.txt", "constraints-lowest.txt", "Makefile", "pyproject.toml", ".ci/run"):
        assert not re.search(r"https?://|--index|--find-links|git\+", read(name)), name


def test_torch_and_what_stands_on_it_are_extras() -> None:
    """A Tamiyo host has no need of torch."""
    assert {Requirement(each).name for each in PROJECT["dependencies"]}.isdisjoint({"torch", "scikit-learn", "pandas"})
    extras = PROJECT["optional-dependencies"]
    assert {Requirement(each).name for each in extras["torch"]} == {"torch"}
    assert {"torch", "demo", "prometheus", "dev"} <= extras.keys()


def test_the_licence_is_apache_2_0() -> None:
    """In the metadata, in the README and in its own words."""
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in read("LICENSE")
    assert "Apache-2.0" in read("README.md")


@pytest.mark.parametrize("name", ["py.typed", "schema/METRICS.md", "leyline/leyline.proto", "leyline/leyline.binpb"])
def test_what_is_no_python_is_part_of_the_package(name: str) -> None:
    """``make test-wheel`` looks for the same in what is built."""
    assert resources.files(esper_otel).joinpath(name).is_file()


def test_ci_runs_every_gate() -> None:
    """A gate that only developers run is none."""
    script = read(".ci/run")
    for target in ("lint", "site", "test", "test-lowest", "test-pythons", "test-wheel", "demo"):
        assert re.search(rf"^ *(gate make|tests) {target}\b", script, re.MULTILINE), target
