"""Back: where a marked run is read back, and how a fault on the way is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# After so long without news of a run that has begun to come, the rest of it does not come any more. A gateway waits for
# missing points for two seconds.
QUIET_S = 3.0


@dataclass(frozen=True, slots=True)
class ReadBack:
    """Where a run is read back, and for how long it is waited for.

    Attributes:
        prometheus: its address, such as ``http://127.0.0.1:9090``; None: not asked.
        gateway: the gateway's, such as ``127.0.0.1:4327``; None: not asked.
        token_file: file with the gateway's bearer token.
        ca_file: PEM file of the authority of the gateway's certificate.
        timeout_s: how long the run may take.
    """

    prometheus: str | None
    gateway: str | None
    token_file: Path | None = None
    ca_file: Path | None = None
    timeout_s: float = 30.0


class Difference(NamedTuple):
    """What is not as it was sent, and what to look for on the way."""

    message: str
    fix: str
