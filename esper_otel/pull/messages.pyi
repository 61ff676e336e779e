from collections.abc import Iterable, Mapping, MutableMapping

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer, RepeatedScalarFieldContainer
from google.protobuf.message import Message

from esper_otel.leyline.packets import Packets

SERVICE: str

def step_bytes(packets: Packets) -> bytes: ...
def page_bytes(steps: Iterable[tuple[bytes, float]], cursor: str, gap: int) -> bytes: ...
def step_message(packets: Packets) -> Step: ...

class RunsRequest(Message):
    run_id: str
    def __init__(self, *, run_id: str = ...) -> None: ...

class RunsResponse(Message):
    @property
    def runs(self) -> RepeatedCompositeFieldContainer[Run]: ...
    def __init__(self, *, runs: Iterable[Run] = ...) -> None: ...

class Run(Message):
    run_id: str
    attempt: int
    rank: int
    writer: str
    world_size: int
    experiment: str
    first_step: int
    last_step: int
    last_time_unix_ns: int
    last_received_unix_ns: int
    ended: str
    resumed: bool
    writers: int
    missing: int
    incomplete: int
    stored: int
    differing: int
    too_late: int
    run_ended: str
    unseen: int
    host: str
    revision: str
    settings: str
    location: str
    device: str
    @property
    def units(self) -> MutableMapping[str, str]: ...
    def __init__(
        self,
        *,
        run_id: str = ...,
        attempt: int = ...,
        rank: int = ...,
        writer: str = ...,
        world_size: int = ...,
        experiment: str = ...,
        first_step: int | None = ...,
        last_step: int | None = ...,
        last_time_unix_ns: int = ...,
        last_received_unix_ns: int = ...,
        ended: str | None = ...,
        resumed: bool = ...,
        writers: int = ...,
        missing: int = ...,
        incomplete: int = ...,
        stored: int = ...,
        differing: int = ...,
        too_late: int = ...,
        run_ended: str | None = ...,
        unseen: int = ...,
        host: str = ...,
        revision: str = ...,
        settings: str = ...,
        location: str = ...,
        device: str = ...,
        units: Mapping[str, str] = ...,
    ) -> None: ...

class PullRequest(Message):
    run_id: str
    cursor: str
    rank: int
    max_packets: int
    wait_s: float
    shard: int
    shards: int
    with_values: bool
    def __init__(
        self,
        *,
        run_id: str = ...,
        cursor: str = ...,
        rank: int | None = ...,
        max_packets: int = ...,
        wait_s: float = ...,
        shard: int = ...,
        shards: int = ...,
        with_values: bool = ...,
    ) -> None: ...

class PullResponse(Message):
    cursor: str
    gap: int
    @property
    def steps(self) -> RepeatedCompositeFieldContainer[Step]: ...
    def __init__(self, *, steps: Iterable[Step] = ..., cursor: str = ..., gap: int = ...) -> None: ...

class Step(Message):
    state: bytes
    attempt: int
    rank: int
    step: int
    revision: int
    complete: bool
    age_s: float
    writer: str
    number: int
    @property
    def telemetry(self) -> RepeatedScalarFieldContainer[bytes]: ...
    @property
    def names(self) -> RepeatedScalarFieldContainer[str]: ...
    @property
    def value_names(self) -> RepeatedScalarFieldContainer[str]: ...
    @property
    def values(self) -> RepeatedScalarFieldContainer[float]: ...
    def __init__(
        self,
        *,
        state: bytes = ...,
        telemetry: Iterable[bytes] = ...,
        attempt: int = ...,
        rank: int = ...,
        step: int = ...,
        revision: int = ...,
        complete: bool = ...,
        age_s: float = ...,
        names: Iterable[str] = ...,
        writer: str = ...,
        number: int = ...,
    ) -> None: ...

class RanksRequest(Message):
    run_id: str
    steps: int
    def __init__(self, *, run_id: str = ..., steps: int = ...) -> None: ...

class RanksResponse(Message):
    attempt: int
    world_size: int
    steps: int
    first_step: int
    last_step: int
    @property
    def ranks(self) -> RepeatedCompositeFieldContainer[Rank]: ...
    step_latency_spread_ms: float
    input_wait_spread_ms: float
    slowest_rank: int
    slowest_by: str
    def __init__(self, *, attempt: int = ..., world_size: int = ..., steps: int = ...) -> None: ...

class Rank(Message):
    rank: int
    step_latency_ms: float
    input_wait_ms: float
    cycle_ms: float
    own_ms: float
    def __init__(self, *, rank: int = ...) -> None: ...

class HoursRequest(Message):
    run_id: str
    with_accounts: bool
    def __init__(self, *, run_id: str = ..., with_accounts: bool = ...) -> None: ...

class HoursResponse(Message):
    @property
    def run(self) -> Bar: ...
    @property
    def ranks(self) -> RepeatedCompositeFieldContainer[RankHours]: ...
    @property
    def phases(self) -> RepeatedCompositeFieldContainer[Phase]: ...
    @property
    def accounts(self) -> RepeatedCompositeFieldContainer[ProcessAccount]: ...

class ProcessAccount(Message):
    rank: int
    attempt: int
    account: str

class RankHours(Message):
    rank: int
    @property
    def bar(self) -> Bar: ...

class Bar(Message):
    start_unix_ns: int
    end_unix_ns: int
    attempts: int
    @property
    def parts(self) -> RepeatedCompositeFieldContainer[Part]: ...

class Part(Message):
    name: str
    spent_ms: float

class Phase(Message):
    name: str
    rank: int
    attempt: int
    start_unix_ns: int
    end_unix_ns: int
    own_ms: float
    number: int
    step: int

class EventsRequest(Message):
    run_id: str
    cursor: str
    rank: int
    max_events: int
    wait_s: float
    def __init__(
        self,
        *,
        run_id: str = ...,
        cursor: str = ...,
        rank: int | None = ...,
        max_events: int = ...,
        wait_s: float = ...,
    ) -> None: ...

class EventsResponse(Message):
    cursor: str
    gap: int
    @property
    def events(self) -> RepeatedCompositeFieldContainer[Event]: ...
    def __init__(self, *, cursor: str = ..., gap: int = ...) -> None: ...

class Event(Message):
    name: str
    time_unix_ns: int
    attempt: int
    rank: int
    process: str
    number: int
    severity: int
    text: str
    step: int
    epoch: int
    @property
    def attributes(self) -> RepeatedCompositeFieldContainer[Attribute]: ...

class Attribute(Message):
    name: str
    text: str
    whole: int
    number: float
    is_true: bool
