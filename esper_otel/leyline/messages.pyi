"""Types of the messages: what ``leyline.proto`` declares, for type checkers and editors."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer, ScalarMap
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

class SeedLifecycleStage(int, metaclass=EnumTypeWrapper):
    SEED_STAGE_UNKNOWN: ClassVar[SeedLifecycleStage]
    SEED_STAGE_DORMANT: ClassVar[SeedLifecycleStage]
    SEED_STAGE_GERMINATED: ClassVar[SeedLifecycleStage]
    SEED_STAGE_TRAINING: ClassVar[SeedLifecycleStage]
    SEED_STAGE_BLENDING: ClassVar[SeedLifecycleStage]
    SEED_STAGE_SHADOWING: ClassVar[SeedLifecycleStage]
    SEED_STAGE_PROBATIONARY: ClassVar[SeedLifecycleStage]
    SEED_STAGE_FOSSILIZED: ClassVar[SeedLifecycleStage]
    SEED_STAGE_CULLED: ClassVar[SeedLifecycleStage]
    SEED_STAGE_EMBARGOED: ClassVar[SeedLifecycleStage]
    SEED_STAGE_RESETTING: ClassVar[SeedLifecycleStage]
    SEED_STAGE_TERMINATED: ClassVar[SeedLifecycleStage]

class TelemetryLevel(int, metaclass=EnumTypeWrapper):
    TELEMETRY_LEVEL_UNSPECIFIED: ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_INFO: ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_WARNING: ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_ERROR: ClassVar[TelemetryLevel]
    TELEMETRY_LEVEL_CRITICAL: ClassVar[TelemetryLevel]

class HealthStatus(int, metaclass=EnumTypeWrapper):
    HEALTH_STATUS_UNKNOWN: ClassVar[HealthStatus]
    HEALTH_STATUS_HEALTHY: ClassVar[HealthStatus]
    HEALTH_STATUS_DEGRADED: ClassVar[HealthStatus]
    HEALTH_STATUS_UNHEALTHY: ClassVar[HealthStatus]
    HEALTH_STATUS_CRITICAL: ClassVar[HealthStatus]

class BusMessageType(int, metaclass=EnumTypeWrapper):
    BUS_MESSAGE_TYPE_UNSPECIFIED: ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_SYSTEM_STATE: ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_ADAPTATION_COMMAND: ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_FIELD_REPORT: ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_TELEMETRY: ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_POLICY_UPDATE: ClassVar[BusMessageType]
    BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL: ClassVar[BusMessageType]

class MessagePriority(int, metaclass=EnumTypeWrapper):
    MESSAGE_PRIORITY_UNSPECIFIED: ClassVar[MessagePriority]
    MESSAGE_PRIORITY_LOW: ClassVar[MessagePriority]
    MESSAGE_PRIORITY_NORMAL: ClassVar[MessagePriority]
    MESSAGE_PRIORITY_HIGH: ClassVar[MessagePriority]
    MESSAGE_PRIORITY_CRITICAL: ClassVar[MessagePriority]

class SystemStatePacket(Message):
    version: int
    current_epoch: int
    validation_accuracy: float
    validation_loss: float
    timestamp_ns: int
    hardware_context: HardwareContext
    training_metrics: ScalarMap[str, float]
    seed_states: RepeatedCompositeFieldContainer[SeedState]
    packet_id: str
    global_step: int
    training_loss: float
    source_subsystem: str
    training_run_id: str
    experiment_name: str
    def __init__(
        self,
        *,
        version: int | None = ...,
        current_epoch: int | None = ...,
        validation_accuracy: float | None = ...,
        validation_loss: float | None = ...,
        timestamp_ns: int | None = ...,
        hardware_context: HardwareContext | None = ...,
        training_metrics: Mapping[str, float] | None = ...,
        seed_states: Iterable[SeedState] | None = ...,
        packet_id: str | None = ...,
        global_step: int | None = ...,
        training_loss: float | None = ...,
        source_subsystem: str | None = ...,
        training_run_id: str | None = ...,
        experiment_name: str | None = ...,
    ) -> None: ...

class HardwareContext(Message):
    device_type: str
    device_id: str
    total_memory_gb: float
    available_memory_gb: float
    temperature_celsius: float
    utilization_percent: float
    compute_capability: int
    def __init__(
        self,
        *,
        device_type: str | None = ...,
        device_id: str | None = ...,
        total_memory_gb: float | None = ...,
        available_memory_gb: float | None = ...,
        temperature_celsius: float | None = ...,
        utilization_percent: float | None = ...,
        compute_capability: int | None = ...,
    ) -> None: ...

class SeedState(Message):
    seed_id: str
    stage: SeedLifecycleStage
    gradient_norm: float
    learning_rate: float
    layer_depth: int
    metrics: ScalarMap[str, float]
    age_epochs: int
    risk_score: float
    def __init__(
        self,
        *,
        seed_id: str | None = ...,
        stage: SeedLifecycleStage | str | None = ...,
        gradient_norm: float | None = ...,
        learning_rate: float | None = ...,
        layer_depth: int | None = ...,
        metrics: Mapping[str, float] | None = ...,
        age_epochs: int | None = ...,
        risk_score: float | None = ...,
    ) -> None: ...

class TelemetryPacket(Message):
    packet_id: str
    timestamp: Timestamp
    source_subsystem: str
    level: TelemetryLevel
    metrics: RepeatedCompositeFieldContainer[MetricPoint]
    events: RepeatedCompositeFieldContainer[TelemetryEvent]
    spans: RepeatedCompositeFieldContainer[TraceSpan]
    system_health: SystemHealth
    def __init__(
        self,
        *,
        packet_id: str | None = ...,
        timestamp: Timestamp | None = ...,
        source_subsystem: str | None = ...,
        level: TelemetryLevel | str | None = ...,
        metrics: Iterable[MetricPoint] | None = ...,
        events: Iterable[TelemetryEvent] | None = ...,
        spans: Iterable[TraceSpan] | None = ...,
        system_health: SystemHealth | None = ...,
    ) -> None: ...

class MetricPoint(Message):
    name: str
    value: float
    unit: str
    attributes: ScalarMap[str, str]
    def __init__(
        self,
        *,
        name: str | None = ...,
        value: float | None = ...,
        unit: str | None = ...,
        attributes: Mapping[str, str] | None = ...,
    ) -> None: ...

class TelemetryEvent(Message):
    event_id: str
    description: str
    level: TelemetryLevel
    attributes: ScalarMap[str, str]
    def __init__(
        self,
        *,
        event_id: str | None = ...,
        description: str | None = ...,
        level: TelemetryLevel | str | None = ...,
        attributes: Mapping[str, str] | None = ...,
    ) -> None: ...

class TraceSpan(Message):
    span_id: str
    parent_span_id: str
    name: str
    start_time: Timestamp
    end_time: Timestamp
    attributes: ScalarMap[str, str]
    def __init__(
        self,
        *,
        span_id: str | None = ...,
        parent_span_id: str | None = ...,
        name: str | None = ...,
        start_time: Timestamp | None = ...,
        end_time: Timestamp | None = ...,
        attributes: Mapping[str, str] | None = ...,
    ) -> None: ...

class SystemHealth(Message):
    status: HealthStatus
    summary: str
    indicators: ScalarMap[str, str]
    def __init__(
        self,
        *,
        status: HealthStatus | str | None = ...,
        summary: str | None = ...,
        indicators: Mapping[str, str] | None = ...,
    ) -> None: ...

class BusEnvelope(Message):
    message_type: BusMessageType
    payload: bytes
    attributes: ScalarMap[str, str]
    def __init__(
        self,
        *,
        message_type: BusMessageType | str | None = ...,
        payload: bytes | None = ...,
        attributes: Mapping[str, str] | None = ...,
    ) -> None: ...
