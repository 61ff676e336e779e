"""The files that draw the charts: Bokeh's, from the installed package, and ours."""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from esper_otel.errors import ConfigurationError

STYLE = "charts.css"
_LIBRARY = ("bokeh.min.js", "bokeh-api.min.js")
_FIRST = "nonce.js"
_OURS = ("series.js", "chart.js", "board.js")


def scripts(*, needed_by: str) -> dict[str, str]:
    """Returns the JavaScript of the charts by file name, in the order in which it is loaded.

    Args:
        needed_by: what cannot be shown without it, for the message.

    Raises:
        ConfigurationError: Bokeh is not installed.
    """
    found = find_spec("bokeh")
    folders = [Path(place, "server", "static", "js") for place in (found and found.submodule_search_locations) or ()]
    folder = next((each for each in folders if all((each / name).is_file() for name in _LIBRARY)), None)
    if folder is None:
        raise ConfigurationError(f"{needed_by} needs Bokeh for its charts: pip install 'esper-otel[ui]'")
    library = {name: (folder / name).read_text(encoding="utf-8") for name in _LIBRARY}
    return {_FIRST: asset(_FIRST)} | library | {name: asset(name) for name in _OURS}


def style() -> str:
    """Returns the style sheet of the charts."""
    return asset(STYLE)


def asset(name: str) -> str:
    """Returns one of our own files."""
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
