"""Shapes: splits the points of a request into parts of frames, and caches the shapes that most steps share."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock

import numpy as np
import numpy.typing as npt

from esper_otel.frames import digest
from esper_otel.gateway.receive.request import PointBlock
from esper_otel.parts.part import LARGE, POINTS, SEQUENCE, MergedParts, Part, PartShape, Stream

# An empty shape takes as much memory as this many values.
_EMPTY_SHAPE = 16
# Kinds of blocks whose shapes are known.
_MOST_KINDS = 1_000


class PartShapes:
    """A cache of shapes, because most steps have the same streams. Its size is limited by the total number of values.

    Threads: call ``parts`` from one thread and ``prepare`` from another; they share the cache.
    """

    def __init__(self, most_values: int = 500_000) -> None:
        self._most_values = most_values
        self._values = 0
        self._words = 0
        self._known: dict[tuple[int, bytes], PartShape] = {}
        self._numbers = itertools.count()
        self._of_kinds: OrderedDict[object, list[tuple[int, slice, PartShape]]] = OrderedDict()
        self._kind_values = 0
        self._vocabularies: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
        self._lock = Lock()

    def prepare(self, block: PointBlock) -> None:
        """Computes the shapes of large frames in advance, because that takes long, and what their digests need."""
        if len(block.seeds) >= LARGE:
            digest.prepare(block.seeds)
        vocabulary = self._vocabulary(block)
        for some in _frames(block.times):
            if some.stop - some.start >= LARGE:
                self._part(block, vocabulary, some)

    def parts(self, block: PointBlock) -> Iterator[tuple[int, MergedParts]]:
        """Yields the times in a block, each with its part."""
        kind = block.kind
        if kind is not None and kind in self._of_kinds:
            self._of_kinds.move_to_end(kind)
            for start, some, shape in self._of_kinds[kind]:
                yield block.times.item(start), MergedParts(Part(shape, block.values[some].copy()), 0)
            return
        vocabulary = self._vocabulary(block)
        known: list[tuple[int, slice, PartShape]] = []
        for some in _frames(block.times):
            part = self._part(block, vocabulary, some)
            known.append((some.start, some, part.part.shape))
            yield block.times.item(some.start), part
        if kind is None or kind in self._of_kinds:  # another request of its kind may have been read in between
            return
        if not any(len(shape.streams) < some.stop - some.start for _, some, shape in known):
            self._of_kinds[kind] = known
            self._kind_values += len(block.times)
            while self._kind_values > self._most_values or len(self._of_kinds) > _MOST_KINDS:
                self._kind_values -= self._of_kinds.popitem(last=False)[1][-1][1].stop

    def _part(self, block: PointBlock, vocabulary: int, some: slice) -> MergedParts:
        streams, values = block.streams[some], block.values[some]
        shape = self._shape(block, vocabulary, streams)
        if not shape.has_repeats:
            return MergedParts(Part(shape, values.copy()), 0)  # a waiting frame must not keep the whole request
        _, first, of_stream = np.unique(streams, return_index=True, return_inverse=True)
        known = values[first[of_stream]]
        differs = (values != known) & ~(np.isnan(values) & np.isnan(known))
        keep = np.sort(first)
        names = dict(zip(block.names, itertools.count()))
        if (differs & (streams == names.get(SEQUENCE[0], -1))).any():
            keep = keep[streams[keep] != names.get(POINTS[0], -1)]
        return MergedParts(Part(self._shape(block, vocabulary, streams[keep]), values[keep]), int(differs.sum()))

    def _vocabulary(self, block: PointBlock) -> int:
        """Returns a number for the block's names and seeds, so that these long tuples are hashed once per block."""
        words = (block.names, block.seeds)
        with self._lock:
            number = self._vocabularies.pop(words, None)
            if number is None:
                number = next(self._numbers)
                self._words += len(block.names) + len(block.seeds)
                while self._words > self._most_values and self._vocabularies:
                    names, seeds = next(iter(self._vocabularies))
                    del self._vocabularies[names, seeds]
                    self._words -= len(names) + len(seeds)
            self._vocabularies[words] = number
        return number

    def _shape(self, block: PointBlock, vocabulary: int, streams: npt.NDArray[np.int64]) -> PartShape:
        key = (vocabulary, streams.tobytes())
        with self._lock:
            shape = self._known.pop(key, None)
            if shape is not None:
                self._known[key] = shape  # keep the most recently used last
                return shape
        shape = PartShape.of(_streams(block, streams))
        with self._lock:
            if key not in self._known:
                self._values += len(streams) + _EMPTY_SHAPE
            self._known[key] = shape
            while self._values > self._most_values and len(self._known) > 1:
                self._values -= len(self._known.pop(next(iter(self._known))).streams) + _EMPTY_SHAPE
        return shape


def _frames(times: npt.NDArray[np.uint64]) -> Iterator[slice]:
    """Yields the range of points for each time."""
    bounds = [0, *(np.flatnonzero(times[1:] != times[:-1]) + 1).tolist(), len(times)]
    return itertools.starmap(slice, itertools.pairwise(bounds))


def _streams(block: PointBlock, streams: npt.NDArray[np.int64]) -> list[Stream]:
    seed, name = np.divmod(streams, len(block.names))
    names, seeds = block.names, block.seeds
    return [(names[n], seeds[s - 1] if s else "") for s, n in zip(seed.tolist(), name.tolist(), strict=True)]
