"""Modules that take seconds to import: only the process that runs a test of theirs imports them."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import pytest


def needs(*packages: str) -> None:
    """The tests of a file are skipped where a package is missing; it is not imported for that."""
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed", allow_module_level=True)


class Later:
    """A module, imported when something of it is first used.

    Args:
        name: as it is imported.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks each name of a file for such when it collects the tests
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)
