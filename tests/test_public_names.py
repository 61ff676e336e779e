"""The public names are the documented ones, and each of them is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import esper_otel
from esper_otel import errors

pytestmark = pytest.mark.own_code

PACKAGE = Path(esper_otel.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "names.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
DOCUMENTED_MODULES = re.findall(r"^\| `(esper_otel\.[\w.]+)` \|", PAGE, re.MULTILINE)


def test_the_public_names_are_those_that_are_documented() -> None:
    """A name that is added or taken away is a decision, and stands in docs/names.md."""
    assert sorted(esper_otel.__all__) == sorted(DOCUMENTED)
    assert list(esper_otel.__all__) == sorted(esper_otel.__all__)


def test_the_page_of_the_docstrings_has_exactly_the_public_names() -> None:
    """Those of docs/names.md, no more and no fewer."""
    page = (PACKAGE.parent / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    shown = {name.removeprefix("esper_otel.") for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)", page, re.MULTILINE)}
    rows = re.findall(r"^\| `esper_otel\.([\w.]+)` \| (.*) \|$", PAGE, re.MULTILINE)
    # The exceptions are esper_otel's own names; messages and the catalogue have pages of their own.
    of_modules = {
        f"{module}.{name}"
        for module, text in rows
        for name in re.findall(r"`(\w+)(?:\(\))?`", text)
        if module not in {"errors", "leyline", "schema"}
    }
    assert shown == {*esper_otel.__all__} - {"__version__"} | of_modules


def test_every_public_name_is_there_and_shown_to_editors() -> None:
    """Those that are imported on demand too."""
    for name in esper_otel.__all__:
        assert getattr(esper_otel, name) is not None
    assert set(DOCUMENTED) <= set(dir(esper_otel))


def test_every_public_module_says_which_of_its_names_are_public() -> None:
    """Its ``__all__`` tells them from what the module uses itself, and docs/names.md names each module that has one."""
    for name in DOCUMENTED_MODULES:
        tree = ast.parse(path_of(name).read_text(encoding="utf-8"))
        lists = [
            node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        assert len(lists) == 1, name
    exceptions = {each for each in esper_otel.__all__ if getattr(errors, each, None) is not None}
    assert {*errors.__all__} == exceptions


def path_of(module: str) -> Path:
    """The file of a module; it is not imported, since some need libraries that are not installed everywhere."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    """As from any other module."""
    with pytest.raises(AttributeError, match=r"module 'esper_otel' has no attribute 'strat'"):
        esper_otel.strat  # type: ignore[attr-defined] # noqa: B018 - the access is what raises


def test_a_name_that_is_not_there_is_an_error_of_type_checkers(tmp_path: Path) -> None:
    """And no name that is there."""
    modules = [name.removeprefix("esper_otel.") for name in DOCUMENTED_MODULES if name.count(".") == 1]
    assert {*modules} == {*dir(esper_otel)} - {*esper_otel.__all__}
    lines = [
        "import esper_otel, esper_otel.leyline",
        "from esper_otel import strat2",
        "esper_otel.TamiyoClinet",
        "esper_otel.leyline.SystemStatePakcet",
        *(f"esper_otel.{name}" for name in [*esper_otel.__all__, *modules]),
        *(f"esper_otel.leyline.{name}" for name in esper_otel.leyline.__all__),
    ]
    program = tmp_path / "program.py"
    program.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--follow-imports=skip", f"--cache-dir={tmp_path}", "--no-color-output"]
    ours = [str(PACKAGE / "__init__.py"), str(PACKAGE / "leyline" / "__init__.py")]
    done = subprocess.run([*command, *ours, str(program)], capture_output=True, text=True, check=False, timeout=300)
    *errors, _summary = done.stdout.splitlines()
    found = [(int(line.split(":")[1]), line.split(": error: ")[1].split(" has no attribute ")[1]) for line in errors]
    assert [number for number, _ in found] == [2, 3, 4], done.stdout
    assert all(name in text for name, (_, text) in zip(("strat2", "TamiyoClinet", "Pakcet"), found, strict=True))


def attributes_without_type(function: ast.FunctionDef) -> Iterator[str]:
    """The public attributes that ``__init__`` sets to something whose type each checker infers by its own rules."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    known = {argument.arg for argument in arguments}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign) or (isinstance(node.value, ast.Name) and node.value.id in known):
            continue
        for target in node.targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self" and target.attr[0] != "_":
                yield target.attr


def test_every_public_attribute_has_a_type() -> None:
    """So that two type checkers see the same. ``make policy`` has pyright verify the types of all names."""
    faults = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for owner in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(owner, ast.ClassDef) or owner.name.startswith("_"):
                continue
            declared = {ast.unparse(node.target) for node in ast.walk(owner) if isinstance(node, ast.AnnAssign)}
            for function in owner.body:
                if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                    names = [
                        name for name in attributes_without_type(function) if not {name, f"self.{name}"} & declared
                    ]
                    faults += [f"{path.relative_to(PACKAGE)}: {owner.name}.{name}" for name in names]
    assert faults == []


def test_every_exception_for_users_is_public_and_has_one_root() -> None:
    """`except esper_otel.EsperOtelError` catches all that is ours."""
    ours = {
        name: each
        for name, each in vars(errors).items()
        if isinstance(each, type) and each.__module__ == errors.__name__
    }
    assert all(issubclass(each, esper_otel.EsperOtelError) for each in ours.values())
    between_our_parts = {"ProbeUnavailable"}
    assert ours.keys() - between_our_parts <= set(esper_otel.__all__)


def test_mistakes_are_also_what_python_calls_them() -> None:
    """Code that expects a ValueError, TypeError or RuntimeError keeps working."""
    assert issubclass(esper_otel.UnknownMetric, ValueError)
    assert issubclass(esper_otel.InvalidName, ValueError)
    assert issubclass(esper_otel.InvalidCatalogue, ValueError)
    assert issubclass(esper_otel.ConfigurationError, ValueError)
    assert issubclass(esper_otel.InvalidValue, TypeError)
    assert issubclass(esper_otel.WrongState, RuntimeError)
