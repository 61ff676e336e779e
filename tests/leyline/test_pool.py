"""Our message classes beside Esper's own generated module, in every order and in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from esper_otel import leyline

PROTO = (Path(leyline.__file__).parent / "leyline.proto").read_text()

ROUND_TRIP = """
theirs = esper_leyline_pb2.SystemStatePacket(packet_id="run-step-1", training_metrics={"loss": 2.5})
ours = leyline.SystemStatePacket.FromString(theirs.SerializeToString())
assert ours.training_metrics["loss"] == 2.5 and ours.packet_id == "run-step-1"
assert theirs.FromString(ours.SerializeToString()) == theirs
"""


@pytest.fixture
def esper(tmp_path: Path) -> Path:
    """A folder into which a test writes Esper's own version of the contract."""
    return tmp_path


def generated(folder: Path, proto: str) -> None:
    """Esper's own generated module, ``esper_leyline_pb2``: it registers itself in the default pool."""
    (folder / "esper_leyline.proto").write_text(proto)
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--python_out={folder}"]
    subprocess.run([*command, "esper_leyline.proto"], check=True, capture_output=True, timeout=60)


def run(folder: Path, program: str) -> None:
    """Runs a program in a fresh interpreter, warnings as errors; its failure is the test's."""
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{program}"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_esper_first_and_equal_gives_espers_own_classes(esper: Path) -> None:
    """Both sides then pass the same objects around, without bytes between them."""
    generated(esper, PROTO)
    run(
        esper,
        """
import esper_leyline_pb2
from esper_otel import leyline
assert leyline.SystemStatePacket is esper_leyline_pb2.SystemStatePacket
assert leyline.TelemetryPacket is esper_leyline_pb2.TelemetryPacket
assert leyline.SeedLifecycleStage.DESCRIPTOR is esper_leyline_pb2.SeedLifecycleStage.DESCRIPTOR
"""
        + ROUND_TRIP,
    )


def test_esper_with_more_messages_than_ours_still_gives_espers_classes(esper: Path) -> None:
    """The real contract has commands and policies too, which we do not speak."""
    generated(esper, PROTO + "message AdaptationCommand { string command_id = 1; }\n")
    run(
        esper,
        """
import esper_leyline_pb2
from esper_otel import leyline
assert leyline.SystemStatePacket is esper_leyline_pb2.SystemStatePacket
""",
    )


def test_esper_second_imports_without_a_conflict(esper: Path) -> None:
    """Whatever is imported first, a program that worked without us works with us."""
    generated(esper, PROTO)
    run(
        esper,
        """
from esper_otel import leyline
import esper_leyline_pb2
assert leyline.SystemStatePacket is not esper_leyline_pb2.SystemStatePacket
"""
        + ROUND_TRIP,
    )


DIFFERENCES = {
    "another number": ("uint32 age_epochs = 7;", "uint32 age_epochs = 9;"),
    "another name": ("float risk_score = 8;", "float risk = 8;"),
    "another type": ("float learning_rate = 4;", "double learning_rate = 4;"),
    "another label": ("string packet_id = 9;", "repeated string packet_id = 9;"),
    "another presence": ("float training_loss = 11;", "optional float training_loss = 11;"),
    "another map": ("map<string, float> training_metrics = 7;", "map<string, double> training_metrics = 7;"),
    "another enum number": ("SEED_STAGE_CULLED = 8;", "SEED_STAGE_CULLED = 12;"),
    "another enum name": ("HEALTH_STATUS_DEGRADED = 2;", "HEALTH_STATUS_POOR = 2;"),
    "a field more": ("float risk_score = 8;", "float risk_score = 8; float mood = 20;"),
    "a field less": ("float risk_score = 8;", ""),
    "a message less": ("message BusEnvelope {", "message Envelope {"),
    "an enum less": ("enum MessagePriority {", "enum Priority {"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("ours_first", [False, True], ids=["esper first", "ours first"])
def test_a_different_contract_under_the_same_names_leaves_both_sides_whole(
    esper: Path, difference: str, ours_first: bool
) -> None:
    """Esper's next version must neither break its own process nor bend what we send."""
    before, after = DIFFERENCES[difference]
    assert before in PROTO
    generated(esper, PROTO.replace(before, after))
    imports = ["from esper_otel import leyline", "import esper_leyline_pb2"]
    run(
        esper,
        "\n".join(imports if ours_first else reversed(imports))
        + """
assert leyline.SystemStatePacket is not esper_leyline_pb2.SystemStatePacket
assert leyline.SeedState.DESCRIPTOR.fields_by_name["risk_score"].number == 8
esper_leyline_pb2.SeedState(seed_id="theirs")
leyline.SystemStatePacket(training_loss=1.0, seed_states=[leyline.SeedState(seed_id="ours", age_epochs=3)])
leyline.TelemetryPacket().timestamp.FromNanoseconds(5)
""",
    )


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
    run(
        esper,
        """
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
""",
    )
