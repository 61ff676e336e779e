"""In which order files of tests are given to processes that run side by side: first what takes long."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby, zip_longest

import pytest


def dealt(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests in an order in which nothing long is left for the end.

    ``--dist loadfile`` gives each process the next file when it has almost done its last one, so that what the tests of
    a file share is made once. While one process waits, another had better compute: files that wait for the collector
    take turns with those that take long themselves. Short ones come last.

    Args:
        items: as collected. Those of one file stay together, in their order.
    """
    files = [list(group) for _, group in groupby(items, key=lambda item: item.location[0])]
    waiting, lengthy, short = ([file for file in files if _kind(file) == kind] for kind in ("collector", "lengthy", ""))
    turns = chain.from_iterable(zip_longest(waiting, lengthy, fillvalue=[]))
    return [*chain.from_iterable(turns), *chain.from_iterable(short)]


def _kind(items: Sequence[pytest.Item]) -> str:
    """Of a file: what it has a test of."""
    marked = (kind for kind in ("collector", "lengthy") if any(item.get_closest_marker(kind) for item in items))
    return next(marked, "")
