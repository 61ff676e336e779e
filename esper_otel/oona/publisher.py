"""Publisher: one thread that takes packets from a source and adds them to Oona's streams, in order."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

from esper_otel.errors import ConfigurationError, GatewayError, StaleCursor, UnknownRun
from esper_otel.log import Warnings
from esper_otel.oona.stream import EMERGENCY, STREAMS, StreamEntry, entries

if TYPE_CHECKING:
    from esper_otel.leyline import Page

SECRET_VARIABLE = "ESPER_LEYLINE_SECRET"  # noqa: S105 - where it stands, not what it is
PASSWORD_VARIABLE = "ESPER_OONA_PASSWORD"  # noqa: S105 - as above
TTL_MS = 900_000

_EMERGENCIES_A_MINUTE = 120  # what the prototype's bus client lets through
_AT_ONCE = 256
_IDLE_S = 0.02
_TRIM_EVERY_S, _MOST_MARKS = 10.0, 100
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 5.0
_TIMEOUT_S = 5.0
_CURSOR_KEY = "esper_otel:oona:cursor:"
_MOST_CURSORS = 50_000
# How many emergencies of a minute a tenant and a run may have, for each that is still free for others.
_TENANT_FACTOR, _RUN_FACTOR = 3, 2

# Of an entry of a stream: milliseconds and a number.
_Id: TypeAlias = tuple[int, int]


class PacketSource(Protocol):
    """Where a publisher gets its packets."""

    def runs(self) -> Sequence[str]:
        """The runs that there are."""

    def tenant(self, run_id: str) -> str | None:
        """Whose run it is; None when nobody else publishes here."""

    def page(self, run_id: str, cursor: str | None, most: int) -> Page:
        """Packets after a cursor; waits for nothing.

        Raises:
            GatewayError: there is nothing to be had so.
        """


class Publisher:
    """Publishes packets from a thread of its own, each at least once, in order; a context manager.

    A page of packets and the cursor behind it go to Redis in one transaction: what a lost connection leaves open is
    sent again. While Redis is away, full, loading or closed to us nothing is lost that the source still has.

    Args:
        source: what is published.
        url: ``redis://``, ``rediss://`` or ``unix://``, with the user if there is one.
        password: of Redis, when the URL has none; by default ``ESPER_OONA_PASSWORD``.
        secret: signs the payloads; by default ``ESPER_LEYLINE_SECRET``.
        ttl_ms: entries older than this are trimmed.
        remembers: whether the cursor is kept in Redis, for the next life of this publisher.

    Attributes:
        counts: ``published`` messages, ``emergencies`` among them, ``failures`` of Redis, ``lost`` steps that fell out
            of the source before they could be published, or could not be put into messages.
        last_error: of Redis; None when there is none.

    Raises:
        ConfigurationError: a URL that cannot be one, or the ``redis`` package is not installed.
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
        self._calls = _EmergencyBudget(self._source)
        self._trimmed_s = float("-inf")
        self._marks: deque[tuple[float, dict[str, _Id]]] = deque()
        self._warnings = Warnings()
        self._over = threading.Event()
        self._until_s = float("inf")
        self._thread = threading.Thread(target=self._run, name="esper-otel-oona", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Publishes what there is, within about ``timeout_s``, and ends; what is left is said, and is no fault."""
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
                    "oona end", "the time to end was too short to publish every step on Oona; %s", self._left
                )
                return
            try:
                count = self._round()
                retry_s = _FIRST_RETRY_S
            except self._errors as error:
                self.counts["failures"] += 1
                self.last_error = f"{type(error).__name__}: {error}"
                self._warnings.say(
                    "oona", "packets do not reach Redis: %s; they are kept and sent later", self.last_error
                )
                self._over.wait(0.0 if is_over else retry_s)
                if is_over:
                    time.sleep(_FIRST_RETRY_S)
                retry_s = min(retry_s * 2, _LAST_RETRY_S)
                continue
            except Exception as error:  # noqa: BLE001 - a fault of ours ends no gateway and no training
                self._say_fault(error)
                count = 0
            if count == 0:
                if is_over:
                    return
                self._over.wait(_IDLE_S)

    def _round(self) -> int:
        """A page of each run; how many steps they had."""
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
        except Exception as error:  # noqa: BLE001 - the other runs are published all the same
            self._say_fault(error)
            return 0

    def _entries(self, page: Page) -> list[StreamEntry]:
        """The messages of a page. A step that cannot be put into any is left out: others wait behind it."""
        made = []
        for packets in page:
            try:
                made += entries(packets, self._secret)
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
            self._cursors[run_id] = ""  # from the oldest step that there is
            self._warnings.say(
                "oona cursor", "run %s was published from a store that is gone: what it still had is lost", run_id
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
        made = self._entries(page)
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
        self._cursors[run_id] = page.cursor
        self.counts["published"] += len(made)
        self.counts["emergencies"] += urgent
        self.last_error = None
        return len(page)

    def _trim(self) -> None:
        """Trims what was there a ttl ago, by our own steady clock: that of Redis, or of this machine, may jump."""
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
            if (milliseconds, number) <= newest.get(stream, (0, 0)):  # else the stream was begun anew
                self._redis.xtrim(stream, minid=f"{milliseconds}-{number + 1}", approximate=False)
        self._trimmed_s = now_s

    @property
    def _left(self) -> str:
        return "the rest follows in its next life" if self._remembers else "the rest is not published"


class _EmergencyBudget:
    """The emergencies of the last minute: what consumers let through is shared by those who publish.

    The others go to the stream where they usually would. Of a gateway no tenant gets more than three times what is left
    for others, and no run more than twice that: whoever calls later in the same minute still has some.
    """

    def __init__(self, source: PacketSource) -> None:
        self._source = source
        self._times: deque[tuple[float, str, str]] = deque()
        self._of_run: Counter[str] = Counter()
        self._of_tenant: Counter[str] = Counter()

    def may(self, run_id: str, urgent: int) -> bool:
        """Whether a run may have one more besides so many of this moment."""
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
        """So many were published."""
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
            password=password,  # one in the URL comes first
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            health_check_interval=30,
        )
    except ValueError:  # its words may show a part of a password
        message = f"Oona's URL cannot be used: give redis://HOST:PORT/0, and the password in {PASSWORD_VARIABLE}"
        raise ConfigurationError(message) from None
    return client, (redis.RedisError, OSError)
