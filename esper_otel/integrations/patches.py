"""Methods of another library's classes that are replaced for as long as anybody follows their calls."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from esper_otel import unix

Follower = TypeVar("Follower")


class Patches(ABC, Generic[Follower]):
    """Replaces methods for the first follower, and restores them after the last one.

    A method that another library has replaced since then is left alone.
    """

    def __init__(self) -> None:
        self.followers: list[Follower] = []  # replaced, never changed in place: calls may run on other threads
        self._replaced: list[tuple[type, str, Any, Any]] = []
        unix.at_fork(after_in_child=self._forget)  # what a worker calls is not part of the training loop

    def add(self, follower: Follower) -> None:
        """Lets somebody follow the calls."""
        self.followers = [*self.followers, follower]
        self.patch()

    def remove(self, is_gone: Callable[[Follower], bool]) -> None:
        """Removes followers."""
        self.followers = [each for each in self.followers if not is_gone(each)]
        if not self.followers:
            for kind, name, original, ours in self._replaced:
                if vars(kind).get(name) is ours:
                    setattr(kind, name, original)
            self._replaced = []

    def patch(self) -> None:
        """Replaces the methods of the libraries that have been imported by now, if anybody follows them."""
        if self.followers:
            self._patch()

    @abstractmethod
    def _patch(self) -> None:
        """Calls ``replace``."""

    def replace(self, kind: type, name: str, made: Callable[[Any], Any]) -> None:
        """Replaces a method that the class itself has, once, by what ``made`` makes of it."""
        original = vars(kind).get(name)
        if original is not None and not any(each[:2] == (kind, name) for each in self._replaced):
            ours = functools.wraps(original)(made(original))
            setattr(kind, name, ours)
            self._replaced.append((kind, name, original, ours))

    def _forget(self) -> None:
        self.followers = []
