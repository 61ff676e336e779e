"""Renders what the deployment has of the catalogue and the table of risks: ``make docs`` writes it, ``--check`` compares."""

from __future__ import annotations

import sys
from pathlib import Path

from dashboards import boards
from helm import values
from names import OURS, STOCK
from rules import rendered

_DEPLOY = Path(__file__).parent.parent


def documents() -> dict[Path, str]:
    """Every rendered file with the text that it should have."""
    found = {}
    for naming in (OURS, STOCK):
        found[_DEPLOY / "prometheus" / naming.folder / "rules" / "esper.yml"] = rendered(naming)
        for board in boards(naming):
            found[_DEPLOY / "grafana" / naming.folder / "dashboards" / board.file] = board.rendered()
    return found | {_DEPLOY / "helm" / name: text for name, text in values().items()}


def main() -> int:
    """Writes what is stale; with ``--check`` only names it and returns 1."""
    is_check = sys.argv[1:] == ["--check"]
    stale = {p: t for p, t in documents().items() if not p.is_file() or p.read_text(encoding="utf-8") != t}
    for path, text in stale.items():
        name = path.relative_to(_DEPLOY.parent)
        if is_check:
            print(f"{name} is stale: make docs", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"rendered {name}")
    return 1 if stale and is_check else 0


if __name__ == "__main__":
    sys.exit(main())
