"""``esper-otel`` with an eye on its event loop: turns of more than a few milliseconds are noted in a file.

Run as ``python -m attack.watched FILE gateway ...``. Each line has the time on the monotonic clock, in seconds, and the
CPU time that the event loop's thread took without a pause, in milliseconds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from esper_otel.cli import main

_NOTED_S = 0.02


def _watch(path: Path) -> None:
    file = path.open("a", buffering=1, encoding="utf-8")
    run = asyncio.events.Handle._run

    def measured(handle: asyncio.events.Handle) -> None:
        begun_s = time.thread_time()
        run(handle)
        took_s = time.thread_time() - begun_s
        if took_s > _NOTED_S:
            file.write(f"{time.monotonic():.3f} {took_s * 1e3:.0f}\n")

    asyncio.events.Handle._run = measured  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    _watch(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
