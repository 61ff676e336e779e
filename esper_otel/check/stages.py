"""The stages on the way from a trainer to where its telemetry should arrive, where a run is read back, and faults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from esper_otel.export.outcome import Result

# Once a run has begun to arrive, the rest is given up after this time without a new step. A gateway waits two seconds
# for missing points.
QUIET_S = 3.0


# What to do about an outcome.
FIXES = {
    Result.TEMPORARY: "correct that; until then a run keeps its steps and retries",
    Result.UNAUTHENTICATED: "correct the credentials there: a header is authorization=Bearer%20<token>, a token file "
    "holds the token alone, a proxy is http://user:password@host:port",
    Result.TOO_LARGE: "raise the endpoint's limit for a request to 4 MiB or more",
    Result.REFUSED: "the endpoint's log says what it does not accept; steps that it refuses are lost, and counted",
}


@dataclass(frozen=True, slots=True)
class CheckStage:
    """One stage on the way; ``ok`` is None when the stage was not checked."""

    name: str
    ok: bool | None
    message: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class ReadBack:
    """Where a run is read back, and how long to wait for it.

    Attributes:
        prometheus: address of Prometheus, such as ``http://127.0.0.1:9090``; None skips it.
        gateway: address of the gateway, such as ``127.0.0.1:4327``; None skips it.
        token_file: file with the gateway's bearer token.
        ca_file: PEM file of the authority of the gateway's certificate.
        timeout_s: how long the run may take to arrive.
    """

    prometheus: str | None
    gateway: str | None
    token_file: Path | None = None
    ca_file: Path | None = None
    timeout_s: float = 30.0


class Difference(NamedTuple):
    """A difference from what was sent, and its possible cause on the way."""

    message: str
    fix: str
