"""What Linux and macOS have and Windows lacks; the only file that may use it without asking first.

Elsewhere a stand-in does without, or ``missing`` names what is not there, for features that cannot do without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from esper_otel.errors import ConfigurationError

try:
    import fcntl
    import resource
except ImportError:  # as on Windows
    _has_locks = False
else:
    _has_locks = True

# Flags for opening a file that others may have put there. Opening a pipe must not block, and a link is not followed.
AT_ONCE: int = getattr(os, "O_NONBLOCK", 0)
_CLOSE_ON_EXEC: int = getattr(os, "O_CLOEXEC", 0)  # Python closes descriptors in new programs on its own on Windows
_NO_LINK: int = getattr(os, "O_NOFOLLOW", 0)
FILE: int = AT_ONCE | _CLOSE_ON_EXEC | _NO_LINK
FOLDER: int = getattr(os, "O_DIRECTORY", 0) | _CLOSE_ON_EXEC
FOLDER_ITSELF: int = FOLDER | _NO_LINK


def missing() -> str:
    """Returns what this system lacks for files that only one process and one user may change; empty if it has all."""
    parts = {
        "file locks (fcntl)": _has_locks,
        "owners of files (os.geteuid)": hasattr(os, "geteuid"),
        "paths relative to an open folder (dir_fd)": os.open in os.supports_dir_fd,
    }
    return ", ".join(name for name, is_there in parts.items() if not is_there)


def demand(what: str, instead: str) -> None:
    """Checks that this system has what a feature needs to keep files safe.

    Args:
        what: the option or setting that asks for the feature.
        instead: what the user can do without it.

    Raises:
        ConfigurationError: the system lacks something; the message names it.
    """
    lacks = missing()
    if lacks:
        raise ConfigurationError(f"{what} works on Linux and macOS only, since this system has no {lacks}; {instead}")


def lock_for_process(descriptor: int) -> None:
    """Locks a file without waiting. The lock is this process's alone: a forked child does not share it.

    Raises:
        BlockingIOError, PermissionError: another process has locked it.
    """
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_for_descriptor(descriptor: int) -> None:
    """Locks a file without waiting, until every copy of the descriptor is closed, also those in forked children.

    Raises:
        BlockingIOError: another descriptor has locked it.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def user_id() -> int | None:
    """Returns the number of the user as whom this process opens files; None where users have no numbers."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def at_fork(
    *,
    before: Callable[[], object] | None = None,
    after_in_parent: Callable[[], object] | None = None,
    after_in_child: Callable[[], object] | None = None,
) -> None:
    """Registers callbacks for ``os.fork``; does nothing where processes cannot fork."""
    given = {"before": before, "after_in_parent": after_in_parent, "after_in_child": after_in_child}
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**{name: callback for name, callback in given.items() if callback is not None})


def open_files() -> tuple[float, float]:
    """Returns how many files this process may open, and to how many it may raise that; infinity without a limit."""
    if not _has_locks:
        return float("inf"), float("inf")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _number(soft), _number(hard)


def allow_open_files(most: int) -> None:
    """Raises the number of files that this process may open; ``most`` is at most the second of ``open_files``.

    Raises:
        OSError, ValueError: the system does not allow it.
    """
    if _has_locks:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def be_nice(by: int) -> None:
    """Lowers this process's priority, where the system lets a process do that by a number."""
    if hasattr(os, "nice"):
        os.nice(by)


def _number(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit
