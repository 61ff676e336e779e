"""Renders what follows from the catalogue, the risks and the settings: ``make docs`` writes it, ``--check`` compares."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pages
from dashboards import boards
from helm import values
from registry import registry

from esper_otel.files.rules import rendered
from esper_otel.files.selectors import OURS, STOCK

_ROOT = Path(__file__).parents[2]


def documents(root: Path) -> dict[Path, str]:
    """Every rendered file of a source tree with the text that it should have.

    Raises:
        ConfigurationError: a page with a rendered table is missing, or lacks a marker.
    """
    deploy = root / "deploy"
    found = pages.documents(root)
    for naming in (OURS, STOCK):
        found[deploy / "prometheus" / naming.folder / "rules" / "esper.yml"] = rendered(naming)
        for board in boards(naming):
            found[deploy / "grafana" / naming.folder / "dashboards" / board.file] = board.rendered()
    found |= {root / "docs" / "registry" / name: text for name, text in registry().items()}
    return found | {deploy / "helm" / name: text for name, text in values().items()}


def main(arguments: Sequence[str], root: Path = _ROOT) -> int:
    """Writes what is stale; with ``--check`` only names it and returns 1."""
    is_check = list(arguments) == ["--check"]
    stale = {p: t for p, t in documents(root).items() if not p.is_file() or p.read_text(encoding="utf-8") != t}
    for path, text in stale.items():
        name = path.relative_to(root)
        if is_check:
            print(f"{name} is stale: make docs", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"rendered {name}")
    return 1 if stale and is_check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
