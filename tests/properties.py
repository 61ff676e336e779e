"""How many examples a property test takes."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int) -> settings:
    """Of a test that needs more examples than most, or is so slow that it has to do with fewer; for a decorator.

    Args:
        count: how many; `make fuzz` takes half as many as of other tests, if those are more.
    """
    usual = settings.default
    assert usual is not None
    return settings(max_examples=max(count, usual.max_examples // 2))
