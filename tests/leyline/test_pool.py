"""Our message classes beside Esper's own generated module, in every order and in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from grpc_tools import protoc  # type: ignore[import-untyped]

from esper_otel import leyline

pytestmark = pytest.mark.own_code

INCLUDED = Path(protoc.__file__).parent / "_proto"
STRICT = "import warnings\nwarnings.simplefilter('error')\n"
PROTO = (Path(leyline.__file__).parent / "leyline.proto").read_text()

ROUND_TRIP = """
theirs = esper_leyline_pb2.SystemStatePacket(packet_id="run-step-1", training_metrics={"loss": 2.5})
ours = leyline.SystemStatePacket.FromString(theirs.SerializeToString())
assert ours.training_metrics["loss"] == 2.5 and ours.packet_id == "run-step-1"
assert theirs.FromString(ours.SerializeToString()) == theirs
"""

# What Esper's trainer does with our packets, and the other way round.
SHARED = (
    ROUND_TRIP
    + """
for name in leyline.__all__:
    if hasattr(esper_leyline_pb2, name) and hasattr(getattr(leyline, name), "DESCRIPTOR"):
        assert getattr(leyline, name).DESCRIPTOR is getattr(esper_leyline_pb2, name).DESCRIPTOR, name
assert leyline.SystemStatePacket is esper_leyline_pb2.SystemStatePacket
assert leyline.TelemetryPacket is esper_leyline_pb2.TelemetryPacket
from esper_otel import Stage, start
with start(run_id="run") as telemetry:
    with telemetry.step(epoch=3) as now:
        now.put(loss=2.5)
        now.seed("seed-1", stage=Stage.BLENDING, alpha=0.5)
        inside = now.state()
    [packets] = telemetry.pull()
theirs = esper_leyline_pb2.SystemStatePacket()
theirs.seed_states.add().CopyFrom(inside.seed_states[0])
assert theirs.seed_states[0].seed_id == "seed-1"
theirs.CopyFrom(packets.state)
assert theirs == packets.state and theirs.current_epoch == 3
inside.MergeFrom(theirs)
[telemetry_packet] = packets.telemetry
assert esper_leyline_pb2.TelemetryPacket.FromString(telemetry_packet.SerializeToString()) == telemetry_packet
back = leyline.SystemStatePacket()
back.ParseFromString(theirs.SerializeToString())
assert back == theirs
"""
)


@pytest.fixture
def esper(tmp_path: Path) -> Path:
    """A folder into which a test writes Esper's own version of the contract."""
    return tmp_path


def generated(folder: Path, proto: str, path: str = "esper_leyline.proto") -> None:
    """Esper's own generated module, importable as ``esper_leyline_pb2``: it registers itself in the default pool.

    Args:
        folder: where it is written.
        proto: its text.
        path: under which the default pool knows the file.
    """
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(proto)
    assert protoc.main(["protoc", f"-I{folder}", f"-I{INCLUDED}", f"--python_out={folder}", path]) == 0
    module = path.removesuffix(".proto").replace("/", ".") + "_pb2"
    if module != "esper_leyline_pb2":
        (folder / "esper_leyline_pb2.py").write_text(f"from {module} import *\n")


def run(folder: Path, program: str) -> str:
    """Runs a program that imports us anew, warnings as errors; its failure is the test's. What it logged."""
    done = warm.run("-c", STRICT + program, env=environ(folder), imported=warm.PACKAGE)
    assert done.returncode == 0, done.stderr
    return done.stderr


def environ(folder: Path) -> dict[str, str]:
    """The folder comes first. Without probes, since a busy machine makes signals, and with them one more packet."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    sends = {"OTEL_METRICS_EXPORTER": "none", "ESPER_TOLARIA_STEP_ENRICHMENT_ENABLED": "false"}
    return {**os.environ, **sends, "PYTHONPATH": os.pathsep.join(paths)}


IMPORTS = {
    "esper first": "import esper_leyline_pb2\nfrom esper_otel import leyline\n",
    "ours first": "from esper_otel import TamiyoClient, leyline, oona, start\nimport esper_leyline_pb2\n",
}
orders = pytest.mark.parametrize("imports", IMPORTS.values(), ids=list(IMPORTS))

# As Esper's own contract: more types of messages on its bus, more fields, more messages.
MORE = (
    PROTO.replace(
        "BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL = 10;",
        "BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL = 10;"
        + "".join(f"BUS_MESSAGE_TYPE_MORE_{number} = {number};" for number in (6, 7, 8, 9, 20, 21, 22)),
    )
    .replace("float risk_score = 8;", "float risk_score = 8; float mood = 20; map<string, Plan> plans = 21;")
    .replace("enum HealthStatus {", "enum HealthStatus { option allow_alias = true;")
    .replace("HEALTH_STATUS_CRITICAL = 4;", "HEALTH_STATUS_CRITICAL = 4; HEALTH_STATUS_WORST = 4;")
    + "message Plan { oneof what { string text = 1; SeedState seed = 2; } }"
)
EDITION = PROTO.replace('syntax = "proto3";', 'edition = "2023";').replace(
    "package esper.leyline.v1;", "package esper.leyline.v1; option features.field_presence = IMPLICIT;"
)


@orders
@pytest.mark.parametrize(
    ("proto", "path"),
    [
        (PROTO, "esper_leyline.proto"),
        (MORE, "esper_leyline.proto"),
        (MORE, "esper/leyline/contract.proto"),
        (EDITION, "esper_leyline.proto"),
    ],
    ids=["equal", "more", "more, in another file", "the same in an edition"],
)
def test_a_contract_with_all_that_we_know_gives_espers_own_classes(
    esper: Path, proto: str, path: str, imports: str
) -> None:
    """Both sides then pass the same objects around, without bytes between them, whichever was imported first."""
    generated(esper, proto, path)
    assert "differ from the contract" not in run(esper, imports + SHARED)


def test_esper_after_our_first_packet_is_imported_without_a_conflict(esper: Path) -> None:
    """The classes cannot change any more, but a program that worked without us works with us."""
    generated(esper, MORE)
    run(
        esper,
        """
from esper_otel import leyline
packet = leyline.SystemStatePacket()
import esper_leyline_pb2
assert leyline.SystemStatePacket is type(packet) is not esper_leyline_pb2.SystemStatePacket
"""
        + ROUND_TRIP,
    )


def test_threads_that_ask_at_once_get_the_same_classes(esper: Path) -> None:
    """Two sets of classes in one process could not be copied from one to the other."""
    run(
        esper,
        """
import threading
from esper_otel import leyline
together, found = threading.Barrier(8), []
def ask():
    together.wait()
    found.append(leyline.SystemStatePacket)
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 8 and len(set(found)) == 1
""",
    )


# What is replaced in the contract, by what, and how the difference is reported.
DIFFERENCES = {
    "another number": ("uint32 age_epochs = 7;", "uint32 age_epochs = 9;", "SeedState.age_epochs has number 9, not 7"),
    "another name": ("float risk_score = 8;", "float risk = 8;", "SeedState lacks the field risk_score"),
    "another type": (
        "float learning_rate = 4;",
        "double learning_rate = 4;",
        "SeedState.learning_rate has type TYPE_DOUBLE, not TYPE_FLOAT",
    ),
    "another label": (
        "string packet_id = 9;",
        "repeated string packet_id = 9;",
        "SystemStatePacket.packet_id has repeated True, not False",
    ),
    "another presence": (
        "float training_loss = 11;",
        "optional float training_loss = 11;",
        "SystemStatePacket.training_loss has presence True, not False",
    ),
    "another map": (
        "map<string, float> training_metrics = 7;",
        "map<string, double> training_metrics = 7;",
        "SystemStatePacket.training_metrics.value has type TYPE_DOUBLE, not TYPE_FLOAT",
    ),
    "pairs in place of a map": (
        "map<string, float> training_metrics = 7;",
        (
            "message TrainingMetricsEntry { string key = 1; float value = 2; } "
            "repeated TrainingMetricsEntry training_metrics = 7;"
        ),
        "only one of the two SystemStatePacket.training_metrics is a map",
    ),
    "one of two": (
        "HardwareContext hardware_context = 6;",
        "oneof device { HardwareContext hardware_context = 6; string device_name = 60; }",
        "SystemStatePacket.hardware_context has oneof device, not None",
    ),
    "another message": (
        "HardwareContext hardware_context = 6;",
        "SystemHealth hardware_context = 6;",
        (
            "SystemStatePacket.hardware_context has type name esper.leyline.v1.SystemHealth, "
            "not esper.leyline.v1.HardwareContext"
        ),
    ),
    "another enum number": (
        "SEED_STAGE_CULLED = 8;",
        "SEED_STAGE_CULLED = 12;",
        "SEED_STAGE_CULLED has number 12, not 8",
    ),
    "another enum name": (
        "HEALTH_STATUS_DEGRADED = 2;",
        "HEALTH_STATUS_POOR = 2;",
        "HealthStatus lacks the value HEALTH_STATUS_DEGRADED",
    ),
    "another name for an enum's number": (
        "MESSAGE_PRIORITY_HIGH = 3;",
        "option allow_alias = true; MESSAGE_PRIORITY_TOP = 3; MESSAGE_PRIORITY_HIGH = 3;",
        "3 in MessagePriority is MESSAGE_PRIORITY_TOP, not MESSAGE_PRIORITY_HIGH",
    ),
    "a required field more": (
        "float risk_score = 8;",
        "float risk_score = 8; float mood = 20 [features.field_presence = LEGACY_REQUIRED];",
        "SeedState requires the field mood",
    ),
    "a field less": ("float risk_score = 8;", "", "SeedState lacks the field risk_score"),
    "a message less": ("message BusEnvelope {", "message Envelope {", "there is no message BusEnvelope"),
    "an enum less": ("enum MessagePriority {", "enum Priority {", "there is no enum MessagePriority"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_contract_that_lacks_or_contradicts_something_leaves_both_sides_whole(esper: Path, difference: str) -> None:
    """Esper's next version must neither break its own process nor bend what we send; the log says what differs."""
    before, after, reported = DIFFERENCES[difference]
    base = EDITION if "features." in after else MORE
    assert before in base
    generated(esper, base.replace(before, after))
    said = run(
        esper,
        """
import esper_leyline_pb2
from esper_otel import leyline
assert leyline.SystemStatePacket is not esper_leyline_pb2.SystemStatePacket
assert leyline.SeedState.DESCRIPTOR.fields_by_name["risk_score"].number == 8
esper_leyline_pb2.SeedState(seed_id="theirs")
leyline.SystemStatePacket(training_loss=1.0, seed_states=[leyline.SeedState(seed_id="ours", age_epochs=3)])
leyline.TelemetryPacket().timestamp.FromNanoseconds(5)
""",
    )
    assert f"differ from the contract ({reported})" in said


def test_our_import_registers_nothing_in_the_default_pool(esper: Path) -> None:
    """A name in the default pool is taken for the life of the process."""
    run(
        esper,
        """
from esper_otel import leyline
from google.protobuf.descriptor_pool import Default
for name in ("SystemStatePacket", "BusEnvelope"):
    try:
        Default().FindMessageTypeByName(f"esper.leyline.v1.{name}")
    except KeyError:
        continue
    raise SystemExit(f"{name} is registered")
""",
    )


def test_a_packet_survives_pickle(esper: Path) -> None:
    """A controller in another process gets packets through a multiprocessing queue."""
    run(
        esper,
        """
import pickle
from esper_otel import leyline
packet = leyline.SystemStatePacket(packet_id="run-step-1", training_metrics={"loss": 2.5})
assert pickle.loads(pickle.dumps(packet)) == packet
""",
    )


def test_the_messages_need_no_opentelemetry_sdk_torch_or_grpc(esper: Path) -> None:
    """A host that only reads packets installs protobuf and nothing heavy is loaded."""
    program = """
import sys
from esper_otel import leyline
leyline.packets, leyline.state, leyline.Page
heavy = {"torch", "grpc", "opentelemetry.sdk"} & set(sys.modules)
assert not heavy, heavy
assert "LeylineMetricReader" in leyline.__all__
leyline.LeylineMetricReader
assert "opentelemetry.sdk" in sys.modules
try:
    leyline.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
    command = [sys.executable, "-W", "error", "-c", program]
    subprocess.run(command, check=True, timeout=300, env=environ(esper))
