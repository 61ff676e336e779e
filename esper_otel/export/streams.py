"""Records which series have been sent, so that the series of a retired seed can be ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import WIDTH, Frame, is_absent
from esper_otel.schema import SEED_CELLS

# A metric's name and the attributes that distinguish its series from others of that name.
Stream = tuple[str, Mapping[str, str]]


_NOTHING = np.zeros(WIDTH, np.bool_)


class Streams:
    """The series of all frames that were sent. Threads: only the exporter's.

    The record of a seed has all 19 columns, even if its table has fewer: a seed may be recorded with the first 10
    columns in one step and with more in the next.

    Attributes:
        last_unix_ns: the time of the last frame noted; 0 before the first.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._ended: dict[int, dict[str, npt.NDArray[np.bool_]]] = {}
        self._steps: set[str] = set()
        self._seeds: dict[str, npt.NDArray[np.bool_]] = {}
        self._ids: tuple[str, ...] = ()
        self._sent: npt.NDArray[np.bool_] = np.empty((0, WIDTH), np.bool_)
        self.last_unix_ns = 0

    def named(self, names: Iterable[str]) -> None:
        """Records that the series of these step metrics were sent."""
        self._steps.update(names)

    def note(self, frames: Sequence[Frame]) -> Mapping[int, Sequence[Stream]]:
        """Records the seed series of frames that are about to be sent. A frame that is sent again may be noted again.

        Returns:
            The series that end with these frames, by the frame's number.
        """
        for number in [number for number in self._ended if number < frames[0].sequence]:
            self._go_on(self._ended.pop(number))  # the frame was dropped, so the ends of its series were not sent
        for frame in frames:
            if frame.sequence > self._noted:
                if frame.retired:
                    self._ended[frame.sequence] = self._ended_by(frame)
                self._add(frame)
                self._noted = frame.sequence
        return {
            number: [stream for seed_id, columns in ended.items() for stream in _streams_of(seed_id, columns)]
            for number, ended in self._ended.items()
        }

    def settled(self, number: int) -> None:
        """Records that frames up to this one are settled, so that the series they end have ended."""
        for settled in [other for other in self._ended if other <= number]:
            del self._ended[settled]

    def _go_on(self, ended: Mapping[str, npt.NDArray[np.bool_]]) -> None:
        for seed_id, columns in ended.items():
            self._seeds[seed_id] = self._seeds.get(seed_id, _NOTHING) | columns

    def _add(self, frame: Frame) -> None:
        self.last_unix_ns = frame.time_unix_ns
        ids, cells = frame.seeds
        if ids:
            if ids != self._ids:
                self._merge()
                self._ids, self._sent = ids, ~is_absent(cells)
            elif cells.shape == self._sent.shape:
                self._sent |= ~is_absent(cells)
            else:
                self._sent = _wide(self._sent)
                self._sent[:, : cells.shape[1]] |= ~is_absent(cells)

    def _merge(self) -> None:
        for seed_id, present in zip(self._ids, _wide(self._sent), strict=True):
            before = self._seeds.get(seed_id)
            self._seeds[seed_id] = present if before is None else before | present
        self._ids, self._sent = (), self._sent[:0]

    def _ended_by(self, frame: Frame) -> dict[str, npt.NDArray[np.bool_]]:
        """Removes the seeds that this frame retires, and returns the columns whose series end.

        If a seed is recorded again in the frame that retires it, the series it has points for continue.
        """
        ids, cells = frame.seeds.wide()
        rows = {seed_id: row for row, seed_id in enumerate(ids)}
        self._merge()
        ended = {}
        for seed_id in frame.retired:
            over = self._seeds.pop(seed_id, _NOTHING)
            if seed_id in rows:
                over = over & is_absent(cells[rows[seed_id]])
            ended[seed_id] = over
        return ended

    def all_ended(self, names: Iterable[str] = ()) -> list[Stream]:
        """Returns every series that was sent, and those of the given step metrics, for the end of a run."""
        self._merge()
        ended: list[Stream] = [(name, {}) for name in sorted(self._steps.union(names))]
        for seed_id, sent in self._seeds.items():
            ended += _streams_of(seed_id, sent)
        return ended


def _wide(sent: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Widens the array to all columns; returns the same array if it already has them."""
    if sent.shape[1] == WIDTH:
        return sent
    wide = np.zeros((len(sent), WIDTH), np.bool_)
    wide[:, : sent.shape[1]] = sent
    return wide


def _streams_of(seed_id: str, columns: npt.NDArray[np.bool_]) -> list[Stream]:
    return [(SEED_CELLS[column].name, {"seed_id": seed_id}) for column in np.flatnonzero(columns)]


def before_a_return(frames: Sequence[Frame]) -> int:
    """Counts the frames before the first one in which a seed is recorded that an earlier one of them retired.

    The seed's series must be ended in between; otherwise their end would be older than their next point.
    """
    retired: set[str] = set()
    for count, frame in enumerate(frames):
        if retired and not retired.isdisjoint(frame.seeds.ids):
            return count
        retired.update(frame.retired)
    return len(frames)
