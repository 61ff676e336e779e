"""Where the charts come from, and what is said where they cannot be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_files import box_bytes, honest_box

from esper_otel.charts import files
from esper_otel.cli import main

INSTALL = "pip install 'esper-otel[ui]'"


@pytest.fixture
def no_bokeh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)


@pytest.mark.usefixtures("no_bokeh")
def test_without_bokeh_a_report_still_has_its_findings_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("box.esper.steps").write_bytes(box_bytes(honest_box()))
    assert main(["report", "box.esper.steps", "--csv", "t.csv"]) == 2
    said = capsys.readouterr()
    assert "How did it end?" in said.out
    assert INSTALL in said.err
    assert Path("t.csv").stat().st_size > 100
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.usefixtures("no_bokeh")
def test_without_bokeh_the_page_is_refused_with_the_install_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gateway", "--ui", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]) == 2
    assert INSTALL in capsys.readouterr().err


def test_the_size_of_a_report_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("box.esper.steps").write_bytes(box_bytes(honest_box()))
    assert main(["report", "box.esper.steps"]) == 0
    [page] = tmp_path.glob("*.html")
    assert f"the page is {page.name} ({page.stat().st_size / 1e6:.1f} MB, works offline)" in capsys.readouterr().out
    assert page.stat().st_size < 2_000_000
