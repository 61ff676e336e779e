"""The messages against the contract, written down a second time: numbers, names, types, and bytes both ways."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import timestamp_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from esper_otel import leyline

PACKAGE = Path(leyline.__file__).parents[1]

TEXT_MAP = "map<string, string>"
NUMBER_MAP = "map<string, float>"
TIME = "google.protobuf.Timestamp"

# The reference: message, then number, name and type of each field, as the contract's tables have them.
MESSAGES: Mapping[str, tuple[tuple[int, str, str], ...]] = {
    "SystemStatePacket": (
        (1, "version", "uint32"),
        (2, "current_epoch", "uint32"),
        (3, "validation_accuracy", "float"),
        (4, "validation_loss", "float"),
        (5, "timestamp_ns", "uint64"),
        (6, "hardware_context", "HardwareContext"),
        (7, "training_metrics", NUMBER_MAP),
        (8, "seed_states", "repeated SeedState"),
        (9, "packet_id", "string"),
        (10, "global_step", "uint64"),
        (11, "training_loss", "float"),
        (12, "source_subsystem", "string"),
        (13, "training_run_id", "string"),
        (14, "experiment_name", "string"),
    ),
    "HardwareContext": (
        (1, "device_type", "string"),
        (2, "device_id", "string"),
        (3, "total_memory_gb", "float"),
        (4, "available_memory_gb", "float"),
        (5, "temperature_celsius", "float"),
        (6, "utilization_percent", "float"),
        (7, "compute_capability", "uint32"),
    ),
    "SeedState": (
        (1, "seed_id", "string"),
        (2, "stage", "SeedLifecycleStage"),
        (3, "gradient_norm", "float"),
        (4, "learning_rate", "float"),
        (5, "layer_depth", "uint32"),
        (6, "metrics", NUMBER_MAP),
        (7, "age_epochs", "uint32"),
        (8, "risk_score", "float"),
    ),
    "TelemetryPacket": (
        (1, "packet_id", "string"),
        (2, "timestamp", TIME),
        (3, "source_subsystem", "string"),
        (4, "level", "TelemetryLevel"),
        (10, "metrics", "repeated MetricPoint"),
        (20, "events", "repeated TelemetryEvent"),
        (30, "spans", "repeated TraceSpan"),
        (40, "system_health", "SystemHealth"),
    ),
    "MetricPoint": (
        (1, "name", "string"),
        (2, "value", "double"),
        (3, "unit", "string"),
        (4, "attributes", TEXT_MAP),
    ),
    "TelemetryEvent": (
        (1, "event_id", "string"),
        (2, "description", "string"),
        (3, "level", "TelemetryLevel"),
        (4, "attributes", TEXT_MAP),
    ),
    "TraceSpan": (
        (1, "span_id", "string"),
        (2, "parent_span_id", "string"),
        (3, "name", "string"),
        (4, "start_time", TIME),
        (5, "end_time", TIME),
        (6, "attributes", TEXT_MAP),
    ),
    "SystemHealth": (
        (1, "status", "HealthStatus"),
        (2, "summary", "string"),
        (3, "indicators", TEXT_MAP),
    ),
    "BusEnvelope": (
        (1, "message_type", "BusMessageType"),
        (2, "payload", "bytes"),
        (3, "attributes", TEXT_MAP),
    ),
}

_LEVELS = ("UNSPECIFIED", "INFO", "WARNING", "ERROR", "CRITICAL")
_STAGES = (
    "UNKNOWN DORMANT GERMINATED TRAINING BLENDING SHADOWING PROBATIONARY FOSSILIZED CULLED EMBARGOED RESETTING "
    "TERMINATED"
)

# The reference: enum, then the number of each value.
ENUMS: Mapping[str, Mapping[str, int]] = {
    "SeedLifecycleStage": {f"SEED_STAGE_{name}": number for number, name in enumerate(_STAGES.split())},
    "TelemetryLevel": {f"TELEMETRY_LEVEL_{name}": number for number, name in enumerate(_LEVELS)},
    "HealthStatus": {
        "HEALTH_STATUS_UNKNOWN": 0,
        "HEALTH_STATUS_HEALTHY": 1,
        "HEALTH_STATUS_DEGRADED": 2,
        "HEALTH_STATUS_UNHEALTHY": 3,
        "HEALTH_STATUS_CRITICAL": 4,
    },
    "MessagePriority": {
        "MESSAGE_PRIORITY_UNSPECIFIED": 0,
        "MESSAGE_PRIORITY_LOW": 1,
        "MESSAGE_PRIORITY_NORMAL": 2,
        "MESSAGE_PRIORITY_HIGH": 3,
        "MESSAGE_PRIORITY_CRITICAL": 4,
    },
    "BusMessageType": {
        "BUS_MESSAGE_TYPE_UNSPECIFIED": 0,
        "BUS_MESSAGE_TYPE_SYSTEM_STATE": 1,
        "BUS_MESSAGE_TYPE_ADAPTATION_COMMAND": 2,
        "BUS_MESSAGE_TYPE_FIELD_REPORT": 3,
        "BUS_MESSAGE_TYPE_TELEMETRY": 4,
        "BUS_MESSAGE_TYPE_POLICY_UPDATE": 5,
        "BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL": 10,
    },
}


def reference_proto() -> str:
    """A ``.proto`` written from the reference tables alone."""
    lines = ['syntax = "proto3";', "package esper.leyline.v1;", 'import "google/protobuf/timestamp.proto";']
    for enum, values in ENUMS.items():
        lines += [f"enum {enum} {{", *(f"  {name} = {number};" for name, number in values.items()), "}"]
    for message, fields in MESSAGES.items():
        lines += [f"message {message} {{", *(f"  {kind} {name} = {number};" for number, name, kind in fields), "}"]
    return "\n".join(lines)


def compiled(proto: Path, into: Path) -> bytes:
    """The descriptor set that protoc makes of a file, in a process of its own: it registers nothing here."""
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{proto.parent}",
        f"--descriptor_set_out={into}",
        str(proto),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return into.read_bytes()


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, type[Message]]:
    """Message classes of an independent build of the contract."""
    folder = tmp_path_factory.mktemp("contract")
    (folder / "reference.proto").write_text(reference_proto())
    files = FileDescriptorSet.FromString(compiled(folder / "reference.proto", folder / "reference.binpb"))
    pool = DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(files.file[0].SerializeToString())
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"esper.leyline.v1.{name}")) for name in MESSAGES}


def declared_type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """The field's type as a ``.proto`` spells it."""
    kind = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if kind in ("message", "enum"):
        kind = field.type_name.removeprefix(".esper.leyline.v1.").removeprefix(".")
    entries = {f"{message.name}.{nested.name}": nested for nested in message.nested_type}
    if kind in entries:
        key, value = (declared_type(message, part) for part in entries[kind].field)
        return f"map<{key}, {value}>"
    is_repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    return f"repeated {kind}" if is_repeated else kind


def message_descriptor(name: str) -> DescriptorProto:
    descriptor = DescriptorProto()
    getattr(leyline, name).DESCRIPTOR.CopyToProto(descriptor)
    return descriptor


@pytest.mark.parametrize(
    ("message", "number", "name", "kind"),
    [(message, *field) for message, fields in MESSAGES.items() for field in fields],
    ids=str,
)
def test_each_field_has_the_number_name_and_type_of_the_contract(
    message: str, number: int, name: str, kind: str
) -> None:
    """A field under another number or type is silently lost or misread by everyone else."""
    descriptor = message_descriptor(message)
    (field,) = [field for field in descriptor.field if field.number == number]
    assert (field.name, declared_type(descriptor, field)) == (name, kind)
    assert not field.proto3_optional


@pytest.mark.parametrize("message", MESSAGES)
def test_no_message_has_a_field_that_the_contract_lacks(message: str) -> None:
    """A field of our own would clash with the next version of the contract."""
    assert len(message_descriptor(message).field) == len(MESSAGES[message])


def test_the_contracts_reserved_numbers_stay_free() -> None:
    """100 to 199 belong to the contract's owners."""
    (reserved,) = message_descriptor("SystemStatePacket").reserved_range
    assert (reserved.start, reserved.end) == (100, 200)  # the end is exclusive


@pytest.mark.parametrize("enum", ENUMS)
def test_each_enum_has_the_values_of_the_contract(enum: str) -> None:
    """An enum travels as its number."""
    assert dict(getattr(leyline, enum).items()) == ENUMS[enum]


def test_the_package_exports_every_message_and_enum() -> None:
    """A consumer builds and parses all of the contract with ``esper_otel.leyline`` alone."""
    assert set(MESSAGES) | set(ENUMS) <= set(leyline.__all__)


@pytest.mark.parametrize("name", ["leyline", "pull"])
def test_a_compiled_contract_is_that_of_the_proto_file(name: str, tmp_path: Path) -> None:
    """The package loads the compiled file; people read the other one."""
    folder = PACKAGE / name
    fresh = FileDescriptorSet.FromString(compiled(folder / f"{name}.proto", tmp_path / "fresh.binpb"))
    shipped = FileDescriptorSet.FromString((folder / f"{name}.binpb").read_bytes())
    assert fresh == shipped, (
        f"{name}.binpb is out of date; run: python -m grpc_tools.protoc -I esper_otel/{name} "
        f"--descriptor_set_out=esper_otel/{name}/{name}.binpb {name}.proto"
    )


def _scalars(kind: str) -> st.SearchStrategy[Any]:
    numbers = {
        "uint32": st.integers(0, 2**32 - 1),
        "uint64": st.integers(0, 2**64 - 1),
        "float": st.floats(width=32, allow_nan=False),
        "double": st.floats(allow_nan=False),
        "string": st.text(max_size=5),
        "bytes": st.binary(max_size=5),
        TIME: st.builds(dict, seconds=st.integers(0, 2**33), nanos=st.integers(0, 999_999_999)),
    }
    return st.sampled_from(list(ENUMS[kind].values())) if kind in ENUMS else numbers[kind]


def contents(message: str) -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments for a message, any subset of its fields."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for _, name, kind in MESSAGES[message]:
        bare = kind.removeprefix("repeated ")
        if kind.startswith("map<"):
            values = _scalars("float" if kind == NUMBER_MAP else "string")
            fields[name] = st.dictionaries(st.text(max_size=3), values, max_size=3)
        else:
            one = contents(bare) if bare in MESSAGES else _scalars(bare)
            fields[name] = st.lists(one, max_size=2) if kind != bare else one
    return st.fixed_dictionaries({}, optional=fields)


@pytest.mark.parametrize("message", MESSAGES)
@given(data=st.data())
def test_bytes_are_understood_in_both_directions(
    theirs: Mapping[str, type[Message]], message: str, data: st.DataObject
) -> None:
    """What counts in the end: an independent build reads what we write, and we read what it writes."""
    given_contents = data.draw(contents(message))
    ours = getattr(leyline, message)(**given_contents)
    other = theirs[message](**given_contents)
    assert ours.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)
    read_by_them = theirs[message].FromString(ours.SerializeToString())
    read_by_us = type(ours).FromString(other.SerializeToString())
    assert read_by_us == ours
    assert read_by_them == other
    assert MessageToDict(read_by_us) == MessageToDict(read_by_them)
