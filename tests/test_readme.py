"""The README and the pages of docs/ keep their word: their programs run as they stand, and their commands exist."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import tomllib
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import warm
from frame_examples import RUN, TIME_UNIX_NS, make_frame
from gateways import RunningGateway, post
from programs import Redis
from wire import bodies

from esper_otel import TamiyoClient
from esper_otel.cli import _COMMANDS, build_parser
from esper_otel.probes.installed import GROUP, installed_probes
from esper_otel.probes.probe import names_of
from esper_otel.testing import MemoryCollector, Point

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}

pytestmark = pytest.mark.timeout(600)  # the first test waits for all programs

PROGRAM = re.compile(r"<!-- example: (\w+) -->\n```python\n(.*?)```", re.DOTALL)
EXAMPLES = {name: text for page in PAGES.values() for name, text in PROGRAM.findall(page)}
# Programs that need a gateway or Redis; a test of its own runs each. The test of all others runs the rest.
WITH_A_SERVER = {"several", "gateway", "oona", "events"}
# Signals that a busy machine may cause.
_OF_TIME = ("hook_budget", "step_latency_high")
COMMANDS = sorted(
    {
        re.sub(r"\s+#.*", "", line.removeprefix("$ "))
        for page in PAGES.values()
        for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("$ ")
    }
)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def run_examples(names: list[str], collector: MemoryCollector, folder: Path) -> dict[str, str]:
    """What each example prints. All run in one process, since importing torch takes long."""
    environ = os.environ | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OMP_NUM_THREADS": "1",  # several threads hinder each other where others compute, too
        "ESPER_RISK_THRESHOLDS": json.dumps(dict.fromkeys(("cpu_pressure_high", *_OF_TIME), math.inf)),
    }
    for name in names:
        (folder / f"{name}.py").write_text(EXAMPLES[name], encoding="utf-8")
    code = (
        "import os, runpy, sys\n"
        "environ = dict(os.environ)\n"
        "for name in sys.argv[1:]:\n"
        "    print('== ' + name)\n"
        "    os.environ.update(environ, ESPER_RUN_ID=name)\n"
        "    sys.argv[:] = [name]\n"
        "    runpy.run_path(name + '.py', run_name='__main__')\n"
    )
    ran = warm.run("-c", code, *names, env=environ, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return dict(part.split("\n", 1) for part in ran.stdout.split("== ")[1:])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], MemoryCollector]:
    """All programs that need no server, run one after the other: what each printed, and what has arrived."""
    with MemoryCollector() as collector:
        printed = run_examples(sorted(EXAMPLES.keys() - WITH_A_SERVER), collector, tmp_path_factory.mktemp("programs"))
    return printed, collector


Ran = tuple[dict[str, str], MemoryCollector]


def values_of(collector: MemoryCollector, run_id: str) -> list[Point]:
    """What has arrived of a run, without the markers that end the series."""
    return [
        point
        for point in collector.points()
        if point.value is not None and point.resource.get("esper.run.id") == run_id
    ]


def test_every_program_is_run_here() -> None:
    """A block without a marker would be one that nobody tries; two with one name would hide each other."""
    for name, page in PAGES.items():
        assert page.count("```python") == len(PROGRAM.findall(page)), name
    assert sum(page.count("```python") for page in PAGES.values()) == len(EXAMPLES)


def test_the_readme_is_short() -> None:
    """What does not fit belongs in docs/."""
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize(
    ("name", "run_id", "steps"),
    [("loop", "loop", 40), ("steps", "steps", 40), ("watch", "watch", 100), ("rates", "rate-0.1", 160)],
)
def test_a_training_loop_sends_every_step(ran: Ran, name: str, run_id: str, steps: int) -> None:
    """With the metrics that its comments name."""
    names = [point.name for point in values_of(ran[1], run_id)]
    metrics = {"loss", "gradient_norm", "input_wait_ms", "samples_per_s", "loss_ewma"}
    for metric in metrics | ({"accuracy"} if "accuracy" in EXAMPLES[name] else set()):
        assert names.count(metric) == steps, metric


def test_own_metrics_and_processors_arrive_like_ours(ran: Ran) -> None:
    """exp(2) is 7.389."""
    points = {point.name: point for point in values_of(ran[1], "own")}
    assert (points["tokens_per_s"].value, points["tokens_per_s"].unit) == (51_000.0, "rate")
    assert points["perplexity"].value == pytest.approx(7.389, abs=1e-3)
    assert points["perplexity"].unit == "1"


def test_phases_arrive_with_their_times(ran: Ran) -> None:
    """Start-up by itself, the others as the program names them."""
    program = [point for point in ran[1].points() if point.name == "esper.phase.number"]
    names = [point.attributes["phase"] for point in program if point.resource["esper.run.id"] == "digits-7"]
    assert [name for name in names if name != "start_up"] == ["evaluation", "checkpoint"] * 2


def test_the_probe_of_the_guide_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry point that the guide shows."""
    (tmp_path / "acme_probe.py").write_text(EXAMPLES["probe"], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    [line] = re.findall(r'^acme = "(.*)"$', PAGES["docs/how-to/own-metrics.md"], re.MULTILINE)
    [probe] = installed_probes(lambda: "xpu:0", found=[EntryPoint("acme", line, GROUP)])
    assert probe.sample().keys() == set(names_of(probe))


def test_the_packets_are_printed_as_the_readme_says(ran: Ran) -> None:
    """Tamiyo's side of the story."""
    inside, pulled, lost = ran[0]["tamiyo"].splitlines()
    assert inside.startswith("digits-7-step-1 {")
    assert "'loss': 0.41999998688697815" in inside  # float32
    assert pulled == "1 digits-7-step-1 ['kasmina-seed-seed-3-1']"
    assert lost == "lost before these: 0"


def test_the_third_step_of_the_tutorial_has_the_event_that_the_text_names(ran: Ran) -> None:
    """And no other step has one."""
    assert ran[0]["inside"].splitlines()[-3:] == [
        "1 digits-7-step-1 []",
        "2 digits-7-step-2 []",
        "3 digits-7-step-3 ['loss_spike']",
    ]


def test_the_packets_of_another_machine_are_printed_as_the_tutorial_says(tmp_path: Path) -> None:
    """A trainer, a gateway, a controller."""
    with RunningGateway() as gateway:
        environ = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}"}
        script = tmp_path / "trainer.py"
        script.write_text(EXAMPLES["tamiyo"], encoding="utf-8")
        assert warm.run(script, env=environ, imported=warm.PACKAGE).returncode == 0
        script.write_text(EXAMPLES["gateway"].replace("127.0.0.1:4327", gateway.grpc), encoding="utf-8")
        done = warm.run(script, imported=warm.PACKAGE)
    assert done.stdout.splitlines() == ["[('digits-7', 1, 'completed')]", "1 1 True 0.41999998688697815"]


def test_a_run_at_two_gateways_is_pulled_as_the_guide_says(tmp_path: Path) -> None:
    """The first three steps are at one of them, later ones at the other."""
    with RunningGateway() as first, RunningGateway("--hold", "0.1") as second:
        for number, gateway in enumerate((first, second)):
            times = ((step, TIME_UNIX_NS + step * 10**6) for step in range(3 * number + 1, 3 * number + 4))
            run = replace(RUN, run_id="digits-7")
            for body in bodies(make_frame(run=run, sequence=n, global_step=n, time_unix_ns=at) for n, at in times):
                post(gateway.http, body)
        with TamiyoClient(second.grpc) as client:  # they wait there for those before them
            assert client.pull("digits-7", wait_s=60.0)
        program = EXAMPLES["several"].replace("127.0.0.1:4327", first.grpc).replace("127.0.0.1:5327", second.grpc)
        (tmp_path / "controller.py").write_text(program.replace("client.ended", "not client.ended"), encoding="utf-8")
        done = warm.run(tmp_path / "controller.py", imported=warm.PACKAGE)
    pages = [line.partition(" ") for line in done.stdout.splitlines()]
    assert [step for _, _, steps in pages for step in json.loads(steps)] == [1, 2, 3, 4, 5, 6]
    assert {gap for gap, _, _ in pages} == {"0"}


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="Redis is not installed")
def test_the_steps_are_on_the_bus_as_the_guide_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer without a gateway."""
    with Redis(tmp_path / "redis") as server, MemoryCollector() as collector:
        monkeypatch.setitem(EXAMPLES, "oona", EXAMPLES["oona"].replace("redis://127.0.0.1:6379/0", server.url))
        run_examples(["oona"], collector, tmp_path)
        with server.client() as client:
            assert client.xlen("oona.normal") == 1


def extras_of(arguments: str) -> set[str]:
    """The extras that an install line names, for what exists today: the clone, the wheel, and the name of later."""
    given = re.fullmatch(
        r"install (?:esper-otel|\./esper_otel|\.|\$\(ls dist/esper_otel-\*\.whl\))\[([a-z,]+)\]", arguments
    )
    assert given, arguments
    return set(given[1].split(","))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command: str) -> None:
    """Each is one that this checkout understands; other people's programs are not looked at."""
    arguments = shlex.split(command)
    while arguments and re.fullmatch(r"(OTEL|ESPER)_[A-Z_]+=\S+", arguments[0]):
        del arguments[0]
    program, *arguments = arguments
    if program == "make":
        assert {each for each in arguments if "=" not in each} <= TARGETS
    elif program == "esper-otel":
        build_parser(arguments).parse_args(arguments)
    elif program == "pip":
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert extras_of(" ".join(arguments)) <= declared["optional-dependencies"].keys()
    elif program == "export":
        assert all(re.fullmatch(r"(OTEL|ESPER)_[A-Z_]+=\S+", argument) for argument in arguments)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file() or f"`{arguments[0]}`" in "".join(PAGES.values())
    elif program == "torchrun":
        of_ours = arguments[arguments.index("esper-otel") + 1 :]
        build_parser(of_ours).parse_args(of_ours)
    else:
        assert program in {"git", "cd", ".", "opentelemetry-instrument"}
        assert "://" not in command  # no address is invented


def test_every_make_target_and_command_that_the_text_names_exists() -> None:
    """In running text too."""
    others = (ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "deploy/README.md", "examples/README.md"))
    for text in (*PAGES.values(), *(path.read_text(encoding="utf-8") for path in others)):
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= TARGETS
        for spelt in re.findall(r"`esper-otel ([a-z][^`]*)`", text):
            arguments = shlex.split(spelt)
            if len(arguments) == 1:  # the name of a command, or a whole command
                assert arguments[0] in _COMMANDS
            else:
                build_parser(arguments).parse_args(arguments)


def test_the_readme_shows_each_metric_and_setting_it_names_as_it_is_spelt() -> None:
    """`esper.*` names in running text are those of metrics, attributes and events, in every page."""
    from esper_otel.schema import METRICS
    from esper_otel.schema.attribute_catalogue import ATTRIBUTES
    from esper_otel.schema.events import COMMON_ATTRIBUTES, EVENTS

    of_resource = {each.name for each in ATTRIBUTES}
    of_events = {*(kind.name for kind in EVENTS), *(each.name for kind in EVENTS for each in kind.attributes)}
    of_events |= {each.name for each in COMMON_ATTRIBUTES}
    known = {*(metric.name for metric in METRICS), *of_resource, *of_events, "esper.leyline.v1"}
    named = {name for page in PAGES.values() for name in re.findall(r"`(esper\.[a-z0-9_.]+)`", page)}
    assert named <= known
