"""Publisher: a thread that reads packets from a source and adds them to Oona's streams, in order."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

from esper_otel.errors import ConfigurationError, GatewayError, StaleCursor, UnknownRun
from esper_otel.log import Warnings
from esper_otel.oona.emergencies import Emergencies
from esper_otel.oona.stream import EMERGENCY, STREAMS, StreamEntry, entries

if TYPE_CHECKING:
    from esper_otel.leyline import Page

SECRET_VARIABLE = "ESPER_LEYLINE_SECRET"  # noqa: S105 - the name of the variable, not a secret
PASSWORD_VARIABLE = "ESPER_OONA_PASSWORD"  # noqa: S105 - as above
TTL_MS = 900_000

_EMERGENCIES_A_MINUTE = 120  # the limit of the prototype's bus client
_AT_ONCE = 256
_IDLE_S = 0.02
_TRIM_EVERY_S, _MOST_MARKS = 10.0, 100
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 5.0
_TIMEOUT_S = 5.0
_CURSOR_KEY = "esper_otel:oona:cursor:"
_MOST_CURSORS = 50_000
_MOST_RUNS = 1_000  # whose emergencies are followed
# A tenant and a run may each use this many times the emergencies that are still free in the current minute.
_TENANT_FACTOR, _RUN_FACTOR = 3, 2

# The id of an entry in a stream: milliseconds and a number.
_Id: TypeAlias = tuple[int, int]


class PacketSource(Protocol):
    """The source of a publisher's packets."""

    def runs(self) -> Sequence[str]:
        """Returns the ids of the known runs."""

    def tenant(self, run_id: str) -> str | None:
        """Returns the tenant that owns a run; None if the source has only one publisher."""

    def page(self, run_id: str, cursor: str | None, most: int) -> Page:
        """Returns the packets after a cursor; does not wait.

        Raises:
            GatewayError: the run or the cursor cannot be used.
        """


class Publisher:
    """Publishes packets from its own thread, in order, each at least once. It is a context manager.

    A page of packets and the cursor after it are written to Redis in one transaction. If the connection is lost before
    the transaction is confirmed, the page is sent again. While Redis is unreachable, full, loading or denies access,
    nothing is lost that the source still has.

    What goes on from step to step is an emergency only when it begins or escalates; see ``Emergencies``. A publisher
    that was restarted does not know what its predecessor has announced, so it announces once more what still goes on.

    Args:
        source: the source of the packets.
        url: ``redis://``, ``rediss://`` or ``unix://``, with the user if there is one.
        password: the password of Redis, if the URL has none; by default ``ESPER_OONA_PASSWORD``.
        secret: the key to sign the payloads; by default ``ESPER_LEYLINE_SECRET``.
        ttl_ms: entries older than this are trimmed.
        remembers: whether the cursor is kept in Redis, so that a restarted publisher continues there.

    Attributes:
        counts: ``published`` messages, the ``emergencies`` among them, ``failures`` of Redis, and ``lost`` steps, which
            the source dropped before they were published, or which could not be converted to messages.
        last_error: the last error of Redis; None after a success.

    Raises:
        ConfigurationError: the URL is invalid, or the ``redis`` package is not installed.
    """

    def __init__(
        self,
        source: PacketSource,
        url: str,
        *,
        password: str | None = None,
        secret: str | None = None,
        ttl_ms: int = TTL_MS,
        remembers: bool = True,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.last_error: str | None = None
        self._source = source
        self._redis, self._errors = _client(url, password or os.environ.get(PASSWORD_VARIABLE) or None)
        self._secret = os.environ.get(SECRET_VARIABLE) or None if secret is None else secret
        self._ttl_ms = ttl_ms
        self._remembers = remembers
        self._cursors: dict[str, str | None] = {}
        self._emergencies: OrderedDict[str, Emergencies] = OrderedDict()
        self._calls = _EmergencyBudget(self._source)
        self._trimmed_s = float("-inf")
        self._marks: deque[tuple[float, dict[str, _Id]]] = deque()
        self._warnings = Warnings()
        self._over = threading.Event()
        self._until_s = float("inf")
        self._thread = threading.Thread(target=self._run, name="esper-otel-oona", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Publishes the remaining steps, for about ``timeout_s``, and stops. It logs whether steps were left over."""
        self._until_s = time.monotonic() + timeout_s
        self._over.set()
        self._thread.join(timeout_s + _TIMEOUT_S)
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            is_over = self._over.is_set()
            if is_over and time.monotonic() >= self._until_s:
                self._warnings.say(
                    "oona end", "the time for closing was too short to publish every step on Oona; %s", self._left
                )
                return
            try:
                count = self._round()
                retry_s = _FIRST_RETRY_S
            except self._errors as error:
                self.counts["failures"] += 1
                self.last_error = f"{type(error).__name__}: {error}"
                self._warnings.say(
                    "oona", "packets cannot be sent to Redis: %s; they are kept and sent later", self.last_error
                )
                self._over.wait(0.0 if is_over else retry_s)
                if is_over:
                    time.sleep(_FIRST_RETRY_S)
                retry_s = min(retry_s * 2, _LAST_RETRY_S)
                continue
            except Exception as error:  # noqa: BLE001 - an internal fault must not stop the gateway or the training
                self._say_fault(error)
                count = 0
            if count == 0:
                if is_over:
                    return
                self._over.wait(_IDLE_S)

    def _round(self) -> int:
        """Publishes a page of each run; returns the number of steps."""
        if time.monotonic() - self._trimmed_s > max(_TRIM_EVERY_S, self._ttl_ms / 1000 / _MOST_MARKS):
            self._trim()
        count = 0
        try:
            run_ids = self._source.runs()
        except GatewayError as error:
            self._warnings.say("oona source", "the runs to publish are not known: %s", error)
            return 0
        for run_id in run_ids:
            if self._over.is_set() and time.monotonic() >= self._until_s:
                break
            count += self._publish_guarded(run_id)
        return count

    def _publish_guarded(self, run_id: str) -> int:
        try:
            return self._publish(run_id)
        except self._errors:
            raise
        except Exception as error:  # noqa: BLE001 - the other runs must still be published
            self._say_fault(error)
            return 0

    def _entries(self, page: Page, emergencies: Emergencies) -> list[StreamEntry]:
        """Returns the messages of a page. A step that cannot be converted is skipped, to not block later steps."""
        made = []
        emergencies.expect(page)
        for packets in page:
            try:
                found, urgent = entries(packets, self._secret), emergencies.of(packets)
                ids = (packets.state.packet_id, *(packet.packet_id for packet in packets.telemetry))
                made += [
                    entry if packet_id in urgent else entry._replace(stream=entry.usual)
                    for packet_id, entry in zip(ids, found, strict=True)
                ]
            except Exception as error:  # noqa: BLE001 - see above
                self.counts["lost"] += 1
                self._say_fault(error)
        return made

    def _say_fault(self, error: Exception) -> None:
        self._warnings.say("oona fault", "publishing failed (%s: %s)", type(error).__name__, error, exc_info=error)

    def _publish(self, run_id: str) -> int:
        key = _CURSOR_KEY + run_id
        if run_id not in self._cursors:
            if self._remembers and len(self._cursors) >= _MOST_CURSORS:
                self._cursors.clear()  # they are in Redis
            kept = self._redis.get(key) if self._remembers else None
            self._cursors[run_id] = None if kept is None else kept.decode()
        try:
            page = self._source.page(run_id, self._cursors[run_id], _AT_ONCE)
        except StaleCursor:
            self._cursors[run_id] = ""  # start from the oldest step
            self._warnings.say(
                "oona cursor",
                "run %s was published from a store that no longer exists: its unpublished steps are lost",
                run_id,
            )
            return 0
        except UnknownRun:
            return 0
        except GatewayError as error:
            self._warnings.say("oona source", "run %s: %s", run_id, error)
            return 0
        if page.gap and self._cursors[run_id] is not None:
            self.counts["lost"] += page.gap
            self._warnings.say(
                "oona lost", "%d steps of run %s were dropped before they were published", page.gap, run_id
            )
        if not page:
            return 0
        emergencies = self._of_run(run_id)
        made = self._entries(page, emergencies)
        with self._redis.pipeline(transaction=True) as together:
            urgent = 0
            for entry in made:
                stream = entry.stream
                if stream == EMERGENCY and not self._calls.may(run_id, urgent):
                    stream = entry.usual
                urgent += stream == EMERGENCY
                together.xadd(stream, entry.fields)
            if self._remembers:
                together.set(key, page.cursor, px=max(self._ttl_ms, 1) * 100)
            together.execute()
        self._calls.note(run_id, urgent)
        emergencies.confirm()
        self._cursors[run_id] = page.cursor
        self.counts["published"] += len(made)
        self.counts["emergencies"] += urgent
        self.last_error = None
        return len(page)

    def _of_run(self, run_id: str) -> Emergencies:
        """Returns the emergencies of a run; those of the runs that published longest ago are forgotten."""
        found = self._emergencies.pop(run_id, None) or Emergencies()
        self._emergencies[run_id] = found
        if len(self._emergencies) > _MOST_RUNS:
            self._emergencies.popitem(last=False)
        return found

    def _trim(self) -> None:
        """Trims entries older than ``ttl_ms`` by the monotonic clock: the clocks of Redis and this machine may jump."""
        now_s = time.monotonic()
        with self._redis.pipeline(transaction=False) as together:
            for stream in STREAMS:
                together.xrevrange(stream, count=1)
            found = together.execute()
        newest = {stream: _id(entries[0][0]) for stream, entries in zip(STREAMS, found, strict=True) if entries}
        self._marks.append((now_s, newest))
        old: dict[str, _Id] = {}
        while self._marks and self._marks[0][0] <= now_s - self._ttl_ms / 1000:
            _, old = self._marks.popleft()
        for stream, (milliseconds, number) in old.items():
            if (milliseconds, number) <= newest.get(stream, (0, 0)):  # otherwise the stream was restarted
                self._redis.xtrim(stream, minid=f"{milliseconds}-{number + 1}", approximate=False)
        self._trimmed_s = now_s

    @property
    def _left(self) -> str:
        return "the rest is published after a restart" if self._remembers else "the rest is not published"


class _EmergencyBudget:
    """The budget of emergencies per minute: shares the limit of the consumers between all runs and tenants.

    Emergencies beyond the budget go to their usual stream. In a gateway, a tenant may use at most three times, and a
    run at most twice, what is still free in the minute, so that some remain for others who publish later.
    """

    def __init__(self, source: PacketSource) -> None:
        self._source = source
        self._times: deque[tuple[float, str, str]] = deque()
        self._of_run: Counter[str] = Counter()
        self._of_tenant: Counter[str] = Counter()

    def may(self, run_id: str, urgent: int) -> bool:
        """Returns whether a run may publish one more emergency, after ``urgent`` ones that are not yet counted."""
        a_minute_ago_s = time.monotonic() - 60.0
        while self._times and self._times[0][0] < a_minute_ago_s:
            _, run, tenant = self._times.popleft()
            for counts, whose in ((self._of_run, run), (self._of_tenant, tenant)):
                counts[whose] -= 1
                if not counts[whose]:
                    del counts[whose]
        free = _EMERGENCIES_A_MINUTE - len(self._times) - urgent
        whose_run = self._source.tenant(run_id)
        if whose_run is None:
            return free > 0
        of_tenant, of_run = self._of_tenant[whose_run] + urgent, self._of_run[run_id] + urgent
        return of_tenant < _TENANT_FACTOR * free and of_run < _RUN_FACTOR * free

    def note(self, run_id: str, count: int) -> None:
        """Counts ``count`` published emergencies."""
        tenant = self._source.tenant(run_id) or ""
        self._times.extend([(time.monotonic(), run_id, tenant)] * count)
        self._of_run[run_id] += count
        self._of_tenant[tenant] += count


def _id(entry_id: bytes) -> _Id:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)


def _client(url: str, password: str | None) -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        import redis
    except ImportError:
        raise ConfigurationError("Oona needs the redis package: pip install 'esper-otel[oona]'") from None
    try:
        client = redis.Redis.from_url(
            url,
            password=password,  # a password in the URL takes precedence
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            health_check_interval=30,
        )
    except ValueError:  # its message may contain part of a password
        message = f"Oona's URL is invalid: give redis://HOST:PORT/0, and the password in {PASSWORD_VARIABLE}"
        raise ConfigurationError(message) from None
    return client, (redis.RedisError, OSError)
