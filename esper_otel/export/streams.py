"""Streams: which series have been sent, so that those of a retired seed can be ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from esper_otel.frame import Frame, is_absent
from esper_otel.schema import SEED_CELLS

# A metric's name and the attributes that tell its series from others of that name.
Stream = tuple[str, Mapping[str, str]]


_NOTHING = np.zeros(len(SEED_CELLS), np.bool_)


class Streams:
    """Notes the series of frames that were delivered. Threads: the exporter's only."""

    def __init__(self) -> None:
        self._steps: set[str] = set()
        self._seeds: dict[str, npt.NDArray[np.bool_]] = {}
        self._ids: tuple[str, ...] = ()
        self._sent: npt.NDArray[np.bool_] = np.empty((0, len(SEED_CELLS)), np.bool_)
        self.last_unix_ns = 0

    def named(self, names: Iterable[str]) -> None:
        """Notes series of step metrics."""
        self._steps.update(names)

    def sent(self, frame: Frame) -> None:
        """Notes the seeds' series of one frame; those of its retired seeds must have been asked for before."""
        self.last_unix_ns = frame.time_unix_ns
        ids, cells = frame.seeds
        if ids:
            present = ~is_absent(cells)
            if ids == self._ids:
                self._sent |= present
            else:
                self._note()
                self._ids, self._sent = ids, present

    def _note(self) -> None:
        for seed_id, present in zip(self._ids, self._sent, strict=True):
            before = self._seeds.get(seed_id)
            self._seeds[seed_id] = present if before is None else before | present
        self._ids, self._sent = (), self._sent[:0]

    def ended(self, seed_ids: Iterable[str]) -> list[Stream]:
        """The series of seeds whose lives are over; they are forgotten."""
        self._note()
        return [
            (SEED_CELLS[column].name, {"seed_id": seed_id})
            for seed_id in seed_ids
            for column in np.flatnonzero(self._seeds.pop(seed_id, _NOTHING))
        ]

    def all_ended(self) -> list[Stream]:
        """Every series sent: the run is over. Empty when nothing was sent."""
        if not self.last_unix_ns:
            return []
        self._note()
        return [*((name, {}) for name in sorted(self._steps)), *self.ended(tuple(self._seeds))]
