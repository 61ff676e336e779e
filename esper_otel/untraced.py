"""Marks our own requests, so that instrumentations of ``requests``, ``urllib3`` and gRPC do not trace them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import context

# The key that the SDK sets while its own exporters send, and the name that older instrumentations look for.
_KEYS = (context._SUPPRESS_INSTRUMENTATION_KEY, "suppress_instrumentation")  # noqa: SLF001 - the SDK uses it, too


@contextmanager
def untraced() -> Iterator[None]:
    """Requests that this thread makes in the ``with`` block are not traced by instrumentations."""
    marked = context.get_current()
    for key in _KEYS:
        marked = context.set_value(key, True, marked)
    token = context.attach(marked)
    try:
        yield
    finally:
        context.detach(token)


def is_untraced() -> bool:
    """Whether this thread's requests are not traced now."""
    return bool(context.get_value(_KEYS[0]))
