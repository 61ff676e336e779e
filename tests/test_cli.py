"""The command line: what is printed, where, and with which exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

import esper_otel
from esper_otel import ConfigurationError, RunHours, TamiyoClient
from esper_otel.cli import main
from esper_otel.hours.bar import Bar, PhaseInfo, bar_of_run
from esper_otel.hours.output import bar_lines
from esper_otel.schema import METRICS

pytestmark = pytest.mark.own_code

Capture = pytest.CaptureFixture[str]


def esper(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """``esper-otel`` in a process of its own; ``code`` runs first."""
    script = f"import sys\n{code}\nfrom esper_otel.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


# -- schema ----------------------------------------------------------------------------------------------


def test_schema_as_json_has_every_metric_with_its_whole_contract(capsys: Capture) -> None:
    """A program reads it as it stands, in the catalogue's order."""
    assert main(["schema", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [metric.name for metric in METRICS]
    assert list(rows[0]) == [
        *("name", "unit", "gated", "needs", "kind", "level"),
        *("description", "source", "present", "misleads", "window", "error", "cost", "rise"),
    ]
    for row, metric in zip(rows, METRICS, strict=True):
        assert row == {field: getattr(metric, field) for field in row} | {"needs": list(metric.needs)}


def test_schema_has_a_line_per_metric_uncut_when_it_is_piped(capsys: Capture) -> None:
    """grep and awk find whole lines."""
    assert main(["schema"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["metric", "unit", "level", "gated", "needs", "description"]
    assert len(lines) == len(METRICS)
    for line, metric in zip(lines, METRICS, strict=True):
        assert line.split()[:3] == [metric.name, metric.unit, metric.level]
        assert line.endswith(metric.description)
        assert (" gated " in line) is metric.gated


@pytest.mark.parametrize("arguments", [["report", "something", "--nope"], ["schema", "--nope"]])
def test_a_wrong_option_is_answered_with_the_usage_of_the_command(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    said = capsys.readouterr().err
    assert said.startswith(f"usage: esper-otel {arguments[0]} ")
    assert said.endswith(f"esper-otel {arguments[0]}: error: unrecognized arguments: --nope\n")


# -- demo ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("missing", "package"), [("torch", "torch"), ("sklearn", "scikit-learn")])
@pytest.mark.parametrize("arguments", [["demo"], ["demo", "--steps", "3"]])
def test_the_demo_without_its_packages_says_what_to_install(missing: str, package: str, arguments: list[str]) -> None:
    """The plain install has no torch; a traceback would not say what to do."""
    ran = esper(*arguments, code=f"sys.modules[{missing!r}] = None")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f'esper-otel: the demo needs {package}: pip install "esper-otel[demo]"\n'


def test_a_module_of_the_demos_own_that_is_missing_is_not_taken_for_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice that does not help is worse than a traceback."""
    monkeypatch.setitem(sys.modules, "esper_otel.demo.command", None)
    with pytest.raises(ModuleNotFoundError):
        main(["demo"])


def test_other_commands_do_not_import_the_demo() -> None:
    """Nobody waits for torch to see a table."""
    ran = esper("schema", code="sys.modules['torch'] = sys.modules['esper_otel.demo'] = None")
    assert (ran.returncode, ran.stderr) == (0, "")


# -- check -----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for ``esper_otel.check.one_frame``; ``ok`` is its answer, ``calls`` what it was asked."""
    asked = SimpleNamespace(ok=True, calls=[])

    def run_check(**wanted: float) -> SimpleNamespace:
        asked.calls.append(wanted)
        return SimpleNamespace(ok=asked.ok)

    module = ModuleType("esper_otel.check.one_frame")
    module.__dict__.update(
        run_check=run_check,
        report_text=lambda result: f"ok: {result.ok}",
        report_json=lambda result: json.dumps({"ok": result.ok}),
    )
    monkeypatch.setitem(sys.modules, "esper_otel.check.one_frame", module)
    return asked


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_checks_exit_status_is_its_answer(asked: SimpleNamespace, capsys: Capture, ok: bool, status: int) -> None:
    """`esper-otel check && python train.py`."""
    asked.ok = ok
    assert main(["check"]) == status
    assert capsys.readouterr().out == f"ok: {ok}\n"
    assert main(["check", "--json"]) == status
    assert json.loads(capsys.readouterr().out) == {"ok": ok}


def test_check_is_asked_with_what_is_planned(asked: SimpleNamespace) -> None:
    """How many seeds, and how fast, decides whether a backend keeps up."""
    main(["check"])
    main(["check", "--seeds", "100", "--steps-per-second", "2.5"])
    assert asked.calls == [{"seeds": 0, "steps_per_second": 1.0}, {"seeds": 100, "steps_per_second": 2.5}]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seeds", "-1", "argument --seeds: '-1' is not a whole number from 0"),
        ("--seeds", "many", "argument --seeds: 'many' is not a whole number from 0"),
        ("--steps-per-second", "0", "argument --steps-per-second: '0' is not a number above 0"),
        ("--steps-per-second", "nan", "argument --steps-per-second: 'nan' is not a number above 0"),
        ("--steps-per-second", "fast", "argument --steps-per-second: 'fast' is not a number above 0"),
    ],
)
def test_a_flag_that_cannot_be_says_so(
    asked: SimpleNamespace, capsys: Capture, flag: str, value: str, message: str
) -> None:
    """Before anything is sent."""
    with pytest.raises(SystemExit) as ended:
        main(["check", f"{flag}={value}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"esper-otel check: error: {message}"
    assert asked.calls == []


# -- all of them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "check", "schema"])
def test_every_command_has_help_with_an_example(capsys: Capture, command: str) -> None:
    """An example is what most readers look for."""
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: esper-otel {command}" in shown
    example = shown.partition("example:\n")[2].strip()
    assert f"esper-otel {command}" in example


def test_help_lists_the_commands(capsys: Capture) -> None:
    """With one line each."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {command} " in shown for command in ("demo", "check", "schema"))


def test_the_version_is_the_packages(capsys: Capture) -> None:
    """A report of a fault begins with it."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"esper-otel {esper_otel.__version__}\n"


def test_python_dash_m_is_the_same_command() -> None:
    """Where the scripts' folder is not on the path."""
    command = [sys.executable, "-m", "esper_otel", "--version"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert ran.stdout == f"esper-otel {esper_otel.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["chekc"], ["schema", "--jsno"]])
def test_a_wrong_command_line_exits_with_2_and_shows_the_usage(capsys: Capture, arguments: list[str]) -> None:
    """As every command line does."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: esper-otel")


@pytest.mark.parametrize("arguments", [["compare", "a", "b"], ["report", "a"], ["pull", "a"]])
def test_a_rank_below_0_is_a_wrong_command_line(capsys: Capture, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--rank", "-1"])
    assert "'-1' is not a whole number of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--hours needs a RUN"),
        (["run", "--follow"], "--hours cannot be combined with --follow"),
        (["run", "--binary"], "--hours cannot be combined with --binary"),
        (["run", "--ranks"], "--hours cannot be combined with --ranks"),
        (["run", "--rank", "2"], "the run has no rank 2; it has 0, 1"),
    ],
)
def test_what_means_nothing_with_hours_says_so(
    two_ranks: RunHours, capsys: Capture, arguments: list[str], said: str
) -> None:
    assert main(["pull", *arguments, "--hours"]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


def test_the_hours_of_one_rank_are_its_own(two_ranks: RunHours, capsys: Capture) -> None:
    assert main(["pull", "run", "--hours", "--rank", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [*bar_lines(two_ranks.ranks[1])]
    assert main(["pull", "run", "--hours", "--rank", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], list(found["ranks"])) == (found["ranks"]["1"], ["1"])
    assert [phase["rank"] for phase in found["phases"]] == [1]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> RunHours:
    """What the gateway says of a run of two ranks."""
    bars = {rank: Bar(0, 10**9, {"productive": 500.0 + rank, "unknown": 500.0 - rank}, 1) for rank in range(2)}
    phases = [PhaseInfo("checkpoint", rank, 1, 0, 10**6, 1.0, 1, None) for rank in range(2)]
    hours = RunHours(bar_of_run(bars.values()), bars, phases)
    monkeypatch.setattr(TamiyoClient, "hours", lambda _self, _run_id: hours)
    return hours


@pytest.mark.parametrize("option", ["--gateway", "--prometheus"])
def test_a_check_that_would_not_look_there_says_so(capsys: Capture, option: str) -> None:
    """Else it ends with ok, and nobody was asked."""
    assert main(["check", option, "http://127.0.0.1:1"]) == 2
    assert "only used with --through: give that, too" in capsys.readouterr().err


def test_an_error_of_ours_is_one_line_on_stderr_and_exit_status_2(
    asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A setting that cannot be used needs no traceback."""

    def run_check(**_wanted: float) -> None:
        raise ConfigurationError("OTEL_EXPORTER_OTLP_PROTOCOL='smtp':\n  give grpc or http/protobuf")

    monkeypatch.setattr(sys.modules["esper_otel.check.one_frame"], "run_check", run_check)
    assert main(["check"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "esper-otel: OTEL_EXPORTER_OTLP_PROTOCOL='smtp': give grpc or http/protobuf\n"


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    """esper-otel schema | head -1"""
    script = "import sys\nfrom esper_otel.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", script, "schema", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=300) == 141


def test_an_interrupt_ends_it_quietly(asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is no fault."""

    def run_check(**_wanted: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["esper_otel.check.one_frame"], "run_check", run_check)
    assert main(["check"]) == 130
