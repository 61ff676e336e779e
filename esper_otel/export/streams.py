"""Records which series have been sent, so that the series of a retired seed can be ended."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from esper_otel.frames.block import Block
from esper_otel.frames.frame import ABSENT_BITS, WIDTH
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
        self.last_unix_ns: int = 0

    def named(self, names: Iterable[str]) -> None:
        """Records that the series of these step metrics were sent."""
        self._steps.update(names)

    def note(self, blocks: Sequence[Block]) -> Mapping[int, Sequence[Stream]]:
        """Records the seed series of frames that are about to be sent. A frame that is sent again may be noted again.

        Args:
            blocks: the frames, consecutive, at least one.

        Returns:
            The series that end with these frames, by the frame's number.
        """
        for number in [number for number in self._ended if number < blocks[0].first]:
            self._go_on(self._ended.pop(number))  # the frame was dropped, so the ends of its series were not sent
        for block in blocks:
            self._note(block)
        return {
            number: [stream for seed_id, columns in ended.items() for stream in _streams_of(seed_id, columns)]
            for number, ended in self._ended.items()
        }

    def _note(self, block: Block) -> None:
        known = max(self._noted + 1 - block.first, 0)
        present = block.present
        for start, stop in pairwise(sorted({known, *(row for row in block.retired if row >= known), block.rows})):
            if start in block.retired:
                self._ended[block.first + start] = self._ended_by(block, start)
            self._add(block.ids, np.logical_or.reduce(present[start:stop], axis=0))
        if known < block.rows:
            self._noted, self.last_unix_ns = block.last, int(block.times[-1])

    def settled(self, number: int) -> None:
        """Records that frames up to this one are settled, so that the series they end have ended."""
        for settled in [other for other in self._ended if other <= number]:
            del self._ended[settled]

    def _go_on(self, ended: Mapping[str, npt.NDArray[np.bool_]]) -> None:
        for seed_id, columns in ended.items():
            self._seeds[seed_id] = self._seeds.get(seed_id, _NOTHING) | columns

    def _add(self, ids: tuple[str, ...], sent: npt.NDArray[np.bool_]) -> None:
        if not ids:
            return
        if ids != self._ids:
            self._merge()
            self._ids, self._sent = ids, sent
        elif sent.shape == self._sent.shape:
            self._sent |= sent
        else:
            self._sent = _wide(self._sent) | _wide(sent)

    def _merge(self) -> None:
        wide, used = _wide(self._sent), np.logical_or.reduce(self._sent, axis=1).tolist()
        for seed_id, present, is_used in zip(self._ids, wide, used, strict=True):
            if is_used:
                before = self._seeds.get(seed_id)
                self._seeds[seed_id] = present if before is None else before | present
        self._ids, self._sent = (), self._sent[:0]

    def _ended_by(self, block: Block, row: int) -> dict[str, npt.NDArray[np.bool_]]:
        """Removes the seeds that this frame retires, and returns the columns whose series end.

        If a seed is recorded again in the frame that retires it, the series it has points for continue.
        """
        ended = {}
        for seed_id in block.retired[row]:
            over = self._seeds.pop(seed_id, _NOTHING)
            if seed_id in self._ids:
                place = self._ids.index(seed_id)
                over = over | _wide(self._sent[place : place + 1])[0]
                self._sent[place] = False
            if seed_id in block.ids:
                cells = block.cells[row, [block.ids.index(seed_id)]]
                over = over & ~_wide(cells.view(np.uint64) != ABSENT_BITS)[0]
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


def before_a_return(blocks: Iterable[Block]) -> list[Block]:
    """Returns the frames before the first one in which a seed is recorded that an earlier one of them retired.

    The seed's series must be ended in between; otherwise their end would be older than their next point.
    """
    before: list[Block] = []
    retired: set[str] = set()
    for block in blocks:
        count = _rows_before_a_return(block, retired)
        if count < block.rows:
            return [*before, block.part(0, count)] if count else before
        before.append(block)
        retired.update(*block.retired.values())
    return before


def _rows_before_a_return(block: Block, retired: Collection[str]) -> int:
    """Returns the number of the block's rows before the first in which a retired seed is recorded.

    Args:
        block: the frames.
        retired: the seeds that were retired before them, in addition to those retired in them.
    """
    count = block.rows
    if block.ids and (retired or block.retired):
        recorded = np.logical_or.reduce(block.present, axis=2)
        places = {seed_id: place for place, seed_id in enumerate(block.ids)}
        for row, ids in ((-1, retired), *block.retired.items()):
            of_ids = [places[seed_id] for seed_id in ids if seed_id in places]
            returns = np.flatnonzero(recorded[row + 1 : count, of_ids].any(axis=1))
            if returns.size:
                count = row + 1 + int(returns[0])
    return count
