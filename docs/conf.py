"""The documentation site: ``make site`` builds it from this folder, without a network."""

from __future__ import annotations

from esper_otel import __version__

project = "esper_otel"
author = "The esper_otel authors"
project_copyright = f"{author}. Apache-2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4

# The public names come from the package itself; these packages are large and only needed to train.
autodoc_mock_imports = ["torch", "lightning", "transformers"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"esper_otel {__version__}"
html_show_sourcelink = False
