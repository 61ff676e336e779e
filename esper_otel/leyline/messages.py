"""The messages and enums of Leyline, package ``esper.leyline.v1``.

If Esper's own generated module is loaded in the process, these are its classes. The choice is made once, when a class
is first used, not when this module is imported, so the order of imports does not matter. The values of an enum are
its attributes: ``SeedLifecycleStage.SEED_STAGE_BLENDING``.
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
