"""What is rendered from the catalogue is current and complete."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from programs import ROOT

sys.path.insert(0, str(ROOT / "deploy" / "rendering"))

import main as rendering
import pages

from esper_otel.errors import ConfigurationError
from esper_otel.schema import METRICS, SEED_METRICS, STEP_METRICS, TWINS
from esper_otel.schema.render import markdown_table, metrics_markdown, request_tables, schema_json, schema_rows
from esper_otel.settings import EsperSettings

pytestmark = pytest.mark.own_code


def test_the_rendered_documents_are_current() -> None:
    """Documentation cannot drift from what is sent. Repair: make docs."""
    assert rendering.main(["--check"]) == 0, "repair: make docs"


def test_metrics_md_has_every_metric_with_all_that_is_known_of_it() -> None:
    """METRICS.md is the catalogue, for readers."""
    sections = metrics_markdown().split("### `")[1:]
    documented = (*METRICS, *(twin.metric for twin in TWINS))
    assert [section.partition("`")[0] for section in sections] == [metric.name for metric in documented]
    for metric, section in zip(documented, sections, strict=True):
        assert f"unit `{metric.unit}`, {metric.kind}, " in section
        assert ("not gated" in section) is not metric.gated
        said = (metric.source, metric.present, metric.misleads, metric.window, metric.error, metric.cost, metric.rise)
        for text in (metric.description, *metric.needs, *said):
            assert text in section


def test_the_readmes_table_has_the_31_with_unit_and_gate() -> None:
    """The first thing a reader looks up."""
    rows = [line for line in request_tables().splitlines() if line.startswith("| `")]
    assert len(rows) == 31
    for row, metric in zip(rows, STEP_METRICS + SEED_METRICS, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:3] == [f"`{metric.name}`", metric.unit, "gated" if metric.gated else ""]
        assert cells[3] == ", ".join(metric.needs)


def test_the_settings_table_has_every_setting_with_its_variable_and_default() -> None:
    """A setting that is not documented does not exist for a user."""
    table = pages.settings_table()
    for name, setting in EsperSettings.settings.items():
        assert f"| `{name}` | `ESPER_{name.upper()}` | `{setting.shipped}` | {setting.meaning} |" in table
        assert setting.meaning


def test_schema_json_is_the_catalogue_in_order() -> None:
    """A program reads it as it stands."""
    rows = json.loads(schema_json())
    assert [row["name"] for row in rows] == [metric.name for metric in METRICS]
    assert rows == schema_rows()
    assert rows[16] == {
        "name": "h2d_copy_ms",
        "unit": "ms",
        "gated": True,
        "needs": ["CUDA"],
        "kind": "gauge",
        "level": "step",
        "description": "Time of the copies from host to device in now.to().",
        "source": "CUDA events around the copies on the current stream, resolved when they have completed.",
        "present": "When now.to() copies host tensors to a CUDA device.",
        "misleads": "It is the duration of the copy, which overlaps with the step; do not subtract it.",
        "window": "All copies of the step.",
        "error": "That of CUDA's events: 0.5 microseconds.",
        "cost": "Two events per call of now.to(), read when the device has reached them.",
        "rise": "More or larger batches, pageable memory, or a busy bus.",
    }


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    """Markdown would take it for a column."""
    assert markdown_table(("a",), [("x|y",)]) == "| a |\n| --- |\n| x\\|y |"


def test_a_section_is_replaced_between_its_markers_only() -> None:
    """What a person wrote around it stays."""
    text = "before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n"
    assert pages.with_section(text, "x", "new") == "before\n<!-- x:begin -->\nnew\n<!-- x:end -->\nafter\n"


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- x:begin -->\n",
        "<!-- x:end -->\n<!-- x:begin -->\n",
        "<!-- x:begin -->\n<!-- x:end -->\n<!-- x:begin -->\n<!-- x:end -->\n",
    ],
)
def test_a_missing_or_doubled_marker_is_said(text: str) -> None:
    """Rather than a document without its table."""
    with pytest.raises(ConfigurationError, match="must have <!-- x:begin --> and <!-- x:end -->, each once"):
        pages.with_section(text, "x", "new")


def test_check_names_what_is_stale_with_the_repair_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `make lint` prints is what to do."""
    reference = tmp_path / "docs" / "reference"
    reference.mkdir(parents=True)
    for name, (section, _) in pages.TABLES.items():
        (reference / name).write_text(f"<!-- {section}:begin -->\n<!-- {section}:end -->\n")
    page = reference / "metrics.md"
    text = page.read_text()

    assert rendering.main(["--check"], tmp_path) == 1
    said = capsys.readouterr().err.splitlines()
    assert {"docs/reference/metrics.md is stale: make docs", "esper_otel/schema/METRICS.md is stale: make docs"} <= {
        *said
    }
    assert page.read_text() == text

    assert rendering.main([], tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == [f"rendered {line.split()[0]}" for line in said]
    assert rendering.main(["--check"], tmp_path) == 0
    assert "`loss`" in page.read_text()

    page.unlink()
    with pytest.raises(ConfigurationError, match=r"metrics\.md is not there"):
        rendering.main(["--check"], tmp_path)
