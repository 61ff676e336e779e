"""Layout: the names of a step's values in their order, compiled once for all steps that have the same names."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt

# The beginning of a row, 48 bytes: step number, epoch, time, digest of the live seeds, number of live seeds, numbers
# of the layout and of the seed ids within the chunk, flags.
HEAD = struct.Struct("@QQQQIIII")
HEAD_WORDS = HEAD.size // 8

# The numbers of layout and seed ids in it, and where they are.
NUMBERS, NUMBERS_PLACE = struct.Struct("@II"), 36

# Flag of a row whose recorded cells are those of every live seed.
WHOLE = 1


class Layout:
    """The values of a row, in the order of their precedence: of two values of one name, the later one counts.

    Args:
        derived: names of the values that processors derived in the step.
        context: names of values that stay until they are replaced.
        probed: names of the readings of probes.
        recorded: names of the values put or measured, and of what is noted about the step.

    Attributes:
        width: how many values a row has.
        size: how many bytes a row takes without the cells of seeds.
        pack_into: writes the beginning and the values of a row; see ``HEAD``.
    """

    def __init__(
        self, derived: tuple[str, ...], context: tuple[str, ...], probed: tuple[str, ...], recorded: tuple[str, ...]
    ) -> None:
        self.derived = derived
        self.context = context
        self.probed = probed
        self.recorded = recorded
        self.width: int = len(derived) + len(context) + len(probed) + len(recorded)
        row = struct.Struct(f"{HEAD.format}{self.width}d")
        self.size: int = row.size
        self.pack_into: Callable[..., None] = row.pack_into
        self.number: int = 0  # in ``chunk``, the one that it was written to last
        self.chunk: object = None

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The names by where their values are from, in the order of the arguments."""
        return self.derived, self.context, self.probed, self.recorded

    @cached_property
    def text(self) -> bytes:
        """The names as JSON, for files: the groups, and no metrics of the user's own."""
        return json.dumps([self.groups, []]).encode()

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Where the value of each name is in a row."""
        return {name: place for place, name in enumerate(chain.from_iterable(self.groups))}

    @cached_property
    def columns(self) -> npt.NDArray[np.intp]:
        """The values of ``places``."""
        return np.array(tuple(self.places.values()), np.intp)

    @cached_property
    def bounds(self) -> tuple[int, int, int]:
        """Where context, readings of probes and recorded values begin in a row."""
        context = len(self.derived)
        probed = context + len(self.context)
        return context, probed, probed + len(self.probed)
