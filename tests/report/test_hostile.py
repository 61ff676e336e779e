"""Reports of black boxes that somebody else has made: text stays text, and nothing costs more than it holds."""

from __future__ import annotations

import contextlib
import csv
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from browser import Browser
from frame_examples import sealed
from fuzz_files import box_bytes, check_report, honest_box
from pyarrow import parquet

import esper_otel
from esper_otel import Stage
from esper_otel.cli import main
from esper_otel.frames import black_box
from esper_otel.report.page import page
from esper_otel.report.recording import StepRow, of_file

pytestmark = pytest.mark.lengthy

HOSTILE = (
    "\"'></title></style></td></text></svg><img src={url}/i onerror='fetch(\"{url}/h\")'><script src={url}/s></script>"
)


def written(folder: Path, lines: list[Any] | bytes, name: str = "box") -> Path:
    path = folder / f"{name}{black_box.SUFFIX}"
    path.write_bytes(lines if isinstance(lines, bytes) else box_bytes(lines))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# -- the page in a browser -------------------------------------------------------------------------------


class Tattler:
    """An HTTP server that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.connections = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def do_GET(self) -> None:
                outer.asked.append(self.path)
                self.send_response(200)
                self.send_header("access-control-allow-origin", "*")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as it is called there
                del format, args

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False  # Chromium may hold a connection on which it asks nothing
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def tattler() -> Iterator[Tattler]:
    tattler = Tattler()
    yield tattler
    tattler.close()


@pytest.mark.parametrize("is_checked", [True, False], ids=["from a box", "past the reader's checks"])
def test_no_field_of_a_box_loads_or_runs_anything(
    tmp_path: Path, browser: Browser, tattler: Tattler, is_checked: bool
) -> None:
    """Every text of it at once; and the fields that the reader takes for numbers, were it ever to let text through."""
    hostile: Any = HOSTILE.format(url=tattler.url)
    lines = honest_box()
    lines[0] |= dict.fromkeys(("run_id", "reason", "experiment", "device"), hostile)
    for line in lines[1:]:
        line["values"] |= {hostile: float("nan")}
        line["seeds"] = {hostile: {"stage": 6.0 + line["step"] % 2, "isolation_violations": 1.0}}
        line["retired"] = [hostile]
    recording = of_file(written(tmp_path, lines, name="x"))
    if not is_checked:
        rows = (*recording.rows[:-1], replace_step(recording.rows[-1], Text(hostile)))
        recording = replace(recording, attempt=hostile, rank=hostile, source=hostile, rows=rows)
    html = page(recording, replace(recording, attempt=7))
    assert hostile not in html
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    browser.open((tmp_path / "page.html").as_uri())
    ours = '[type="application/json"], [nonce]'
    assert browser.value(f"[...document.scripts].filter((each) => !each.matches({ours!r})).length") == 0
    assert browser.value("document.images.length") == 0
    assert browser.value("[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())"
                         ".filter((name) => name.startsWith('on'))") == []  # fmt: skip
    assert hostile in browser.value("document.title")
    browser.until("document.querySelector('.chart .place > :not(.cursor)') !== null")
    assert browser.uncaught == []
    assert hostile in browser.value("[...document.querySelectorAll('.chart figcaption b')].map((e) => e.textContent)")
    assert (tattler.connections, tattler.asked) == (0, [])


class Text(int):
    """A number that reads as text."""

    text: str

    def __new__(cls, text: str) -> Text:
        made = super().__new__(cls, 20)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text

    def __format__(self, how: str) -> str:
        return format(int(self), how) if how else self.text


def replace_step(row: StepRow, step: int) -> StepRow:
    return StepRow(step, row.epoch, row.unix_s, row.values, row.seeds)


def test_what_gets_into_the_page_all_the_same_is_stopped_by_its_policy(
    tmp_path: Path, browser: Browser, tattler: Tattler
) -> None:
    """The page's own styles are applied; a script, a handler, an image, a style or a frame that came in is not."""
    html = page(of_file(written(tmp_path, honest_box())))
    more = (
        f"<script>document.title = 'run'</script><script src={tattler.url}/s></script><img src={tattler.url}/i>"
        f"<iframe src={tattler.url}/f></iframe><style>@import url({tattler.url}/c)</style>"
        f"<div style='background:url({tattler.url}/b)' onclick='document.title = 1'>x</div>"
    )
    (tmp_path / "page.html").write_text(html.replace("</html>", f"{more}</html>"), encoding="utf-8")
    browser.open((tmp_path / "page.html").as_uri())
    browser.value("document.querySelector('div').click()")
    time.sleep(0.2)
    assert browser.value("document.title") == "run"
    assert browser.value("document.images.length") == 1
    assert browser.value("getComputedStyle(document.body).maxWidth") == "1400px"
    assert tattler.asked == []


# -- text ------------------------------------------------------------------------------------------------


def test_what_is_printed_and_written_in_tables_is_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No controls and no forged lines on the terminal, no formulas in a spreadsheet; numbers stay numbers."""
    evil = "=HYPERLINK(1)\x1b[2J\nrun-fake is fine\u202e"
    lines = honest_box()
    lines[0] |= {"run_id": evil, "reason": evil}
    for line in lines[1:]:
        line["values"] |= {"@own": -1.5, "step": 3.0, "accuracy": float("-inf")}
        line["seeds"] = {evil: {"isolation_violations": 2.0}, "-seed": {"alpha": -0.5}, "+a": {}}
    path = written(here, lines)
    assert main(["report", str(path), "--csv", "t.csv", "--parquet", "t.parquet"]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert not any(line.startswith("run-fake") for line in out.split("\n"))
    with Path("t.csv").open(encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    assert {"'@own", "metric.step", "accuracy", "seed.alpha"} <= set(names)
    assert [row[names.index("step")] for row in rows][::4] == [str(step) for step in range(1, 21)]
    assert rows[0][names.index("'@own")] == "-1.5"
    assert rows[0][names.index("accuracy")] == "-inf"
    assert {row[names.index("seed_id")] for row in rows} == {
        *("", "'=HYPERLINK(1)\\x1b[2J\\nrun-fake is fine\\u202e", "'-seed", "'+a")
    }
    assert parquet.read_table("t.parquet")["@own"][0].as_py() == -1.5


def test_errors_are_one_short_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands in them, and whichever command says them."""
    for words in (
        [str(written(tmp_path, [{"run_id": "x", "attempt": "\x1b[2J\n" * 9_000}]))],
        [f"{tmp_path}/\x1b[2J\n.esper.steps"],
        ["\x1b[2J"],
        [str(written(tmp_path, honest_box(), name="\x1b[2J")), "--html", str(tmp_path)],
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.rstrip("\n").isprintable()
        assert len(error) < 500


# -- files that are not as we write them -----------------------------------------------------------------


def about(**parts: object) -> list[Any]:
    box = honest_box()
    box[0] |= parts
    return box


@pytest.mark.parametrize(
    ("box", "why"),
    [
        (about(run_id=None), "'run_id' is missing, not text"),
        (about(reason=["x"]), "'reason' is a list, not text"),
        (about(attempt="1"), "'attempt' is '1', not a whole number"),
        (about(attempt=10**400), "'attempt' is a number of too many digits"),
        (about(rank=True), "'rank' is True"),
        (["text"], "it does not begin with what it is about"),
        ([], "it does not begin with what it is about"),
        (b"", "it does not begin with what it is about"),
    ],
)
def test_what_is_missing_or_of_another_type_is_named(
    here: Path, box: list[Any] | bytes, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the file; as the run and as the one to compare with. Nothing is written."""
    bad, good = written(here, box, "bad"), written(here, honest_box(), "good")
    for words in ([str(bad)], [str(good), "--vs", str(bad)]):
        assert main(["report", *words]) == 2
        assert f"{bad} is not a black box of esper_otel: {why}" in capsys.readouterr().err
    assert list(here.glob("*.html")) == []


@pytest.mark.parametrize("beginning", [b"\x1f\x8b\x08\x00", b"\xe5\x9e\x0f2", b"\xe5\x9e\x0f4"])
def test_a_box_of_another_version_is_refused_by_name_with_the_fix(
    here: Path, beginning: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(here, beginning + box_bytes(honest_box())[4:])
    before = path.read_bytes()
    assert main(["report", str(path)]) == 2
    expected = f"{path} was written by another version of esper_otel: read it with the report of that one"
    assert expected in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_damaged_box_is_read_as_far_as_it_goes_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged step in the middle, and an end that was not written."""
    honest = box_bytes(honest_box())
    damaged = bytearray(honest)
    damaged[honest.index(b"F", len(honest) // 2) + 60] ^= 1
    cut = honest[:-100]
    for content, said in (
        (bytes(damaged), "The file is damaged, and some steps"),
        (cut, "ends in the middle of a step"),
    ):
        recording = of_file(written(here, content))
        assert len(recording.rows) == 19
        assert said in recording.unread
        assert main(["report", str(here / f"box{black_box.SUFFIX}")]) == 0
        assert said in capsys.readouterr().out
        assert said in next(here.glob("*.html")).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        *(b"[" * 100_000, b'{"a":' * 100_000, b"[" + b"1," * 600_000 + b"1]"),
        *(b'{"run_id": ' + b"1" * 5_000 + b"}", b"\xff\xfe{\x00}\x00"),
    ],
    ids=["deep list", "deep object", "many parts", "many digits", "another encoding"],
)
def test_json_that_is_not_ours_is_refused(here: Path, text: bytes) -> None:
    assert check_report(here, str(written(here, sealed([b"H" + text])))) == 2


def test_a_file_larger_than_we_write_is_not_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(here, box_bytes(honest_box()))
    os.truncate(path, 2**32)
    assert main(["report", str(path)]) == 2
    assert "more than esper_otel writes" in capsys.readouterr().err


def test_only_plain_files_are_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe that nobody writes into does not hang, a device that never ends does not fill the memory."""
    os.mkfifo(here / "pipe.steps")
    for what in ("pipe.steps", "/dev/zero"):
        assert main(["report", what]) == 2
        assert f"{what} is not a black box of esper_otel: it is not a plain file" in capsys.readouterr().err


def test_a_name_that_is_too_long_for_a_file_may_be_that_of_a_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "run" * 200, "--ca-file", "nothing.pem"]) == 2
    assert "nothing.pem" in capsys.readouterr().err
    assert main(["report", str(written(here, about(run_id="run" * 200)))]) == 0
    assert (here / "box.html").is_file()


# -- numbers ---------------------------------------------------------------------------------------------


def test_a_stage_that_is_no_number_is_reported(tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a session takes it: NaN is a value."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("ESPER_BLACK_BOX_DIR", str(tmp_path / "box"))
    monkeypatch.setenv("ESPER_BLACK_BOX_FRAMES", "8")
    with contextlib.suppress(KeyError), esper_otel.start(run_id="run") as telemetry:
        for stage in (Stage.TRAINING, float("nan"), float("nan"), Stage.BLENDING):
            with telemetry.step(epoch=0) as now:
                now.put(loss=1.0)
                now.seed("s", stage=stage)
        raise KeyError
    [box] = (tmp_path / "box").glob("*")
    assert main(["report", str(box)]) == 0
    html = next(here.glob("*.html")).read_text(encoding="utf-8")
    assert "TRAINING from 1, stage nan from 2, BLENDING from 4" in html


def test_numbers_at_the_ends_of_what_a_double_holds_are_reported(here: Path) -> None:
    """Infinite stages, sums that are too large, a norm that was 0, steps that have no number of their own."""
    lines = honest_box()
    for line in lines[1:]:
        line["values"] = {"loss": 1.7e308, "gradient_norm": 0.0, "step_latency_ms": 1.7e308, "input_wait_ms": 1.7e308}
        line["seeds"] = {"s": {"stage": float("inf") if line["step"] % 2 else -1e308}}
        line["step"] += 2**63
    lines[-2]["values"]["gradient_norm"] = 5.0
    lines[-1]["values"]["loss"] = float("nan")
    assert check_report(here, str(written(here, lines))) == 0
    assert parquet.read_schema(here / "t.parquet").field("step").type == pa.uint64()


def test_a_table_that_is_nearly_all_empty_is_not_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A box of 100 KB, a table of 64 million cells."""
    lines = honest_box()[:1]
    lines += [honest_box()[1] | {"values": {f"{step:x}": 0}, "seeds": {}} for step in range(8_000)]
    assert main(["report", str(written(here, lines)), "--csv", "t.csv"]) == 2
    assert "8000 lines of 8007 columns" in capsys.readouterr().err
    assert not (here / "t.csv").exists() or not (here / "t.csv").stat().st_size


# -- what is written over --------------------------------------------------------------------------------


def test_only_what_a_report_has_written_is_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default and by name, page and tables; --force writes all the same."""
    box = written(here.parent, honest_box())
    everything = ["--csv", "t.csv", "--parquet", "t.parquet"]
    for _ in range(2):  # the second time over those of the first
        assert main(["report", str(box), *everything, "--html", "page.html"]) == 0
    capsys.readouterr()
    parquet.write_table(pa.table({"precious": [1]}), "mine.parquet")
    Path("mine.csv").write_text("precious\n")
    Path("mine.html").write_text("<p>precious")
    before = {path: path.read_bytes() for path in here.glob("mine.*")}
    for option, path in (("--csv", "mine.csv"), ("--parquet", "mine.parquet"), ("--html", "mine.html")):
        assert main(["report", str(box), option, path]) == 2
        assert f"{path} is there, and esper-otel report did not write it" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in here.glob("mine.*")} == before
    for option, path in (("--csv", "mine.csv"), ("--parquet", "mine.parquet"), ("--html", "mine.html")):
        assert main(["report", str(box), option, path, "--force"]) == 0
    assert not set(before.values()) & {path.read_bytes() for path in here.glob("mine.*")}
    assert main(["report", str(box), "--csv", str(box)]) == 2
    assert main(["report", str(box), "--csv", "/dev/null"]) == 0


def test_the_default_page_goes_past_what_is_not_ours(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other pages and links, also those that lead nowhere."""
    box = written(here.parent, honest_box())
    (here / "run.html").symlink_to(here.parent / "elsewhere")
    assert main(["report", str(box)]) == 0
    assert not (here.parent / "elsewhere").exists()
    assert (here / "box.html").is_file()
    (here / "box.html").write_text("precious")
    capsys.readouterr()
    assert main(["report", str(box)]) == 2
    assert "box.html is there, and esper-otel report did not write it" in capsys.readouterr().err
    assert (here / "box.html").read_text() == "precious"


@pytest.mark.parametrize("option", ["--html", "--csv", "--parquet"])
def test_a_place_that_cannot_be_written_is_said(here: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    box = written(here.parent, honest_box())
    (here / "file").write_text("")
    for place in (here, here / "none" / "x", here / "file" / "x", "/dev/full", here / ("x" * 300)):
        assert main(["report", str(box), option, str(place)]) == 2
        error = capsys.readouterr().err
        assert f"{str(place)[:200]}" in error
        assert "cannot be written" in error
        assert error.count("\n") == 1
