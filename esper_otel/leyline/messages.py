"""The messages and enums of Leyline, package ``esper.leyline.v1``.

When Esper's own generated module is in the process, these are its classes. Which ones they are is decided when the
first of them is used, not when this module is imported, so that the order of imports does not matter; it is decided
once. An enum's numbers are its attributes: ``SeedLifecycleStage.SEED_STAGE_BLENDING``.
"""

import threading

from esper_otel.leyline.pool import leyline_types

_lock = threading.Lock()


def __getattr__(name: str) -> object:
    if not name.startswith("_"):
        with _lock:  # two threads must get the same classes
            if "SystemStatePacket" not in globals():
                globals().update(leyline_types(__name__))
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
