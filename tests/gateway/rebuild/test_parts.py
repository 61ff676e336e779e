"""Parts: merging into a large part gives what merging value by value gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.parts import part as parts
from esper_otel.parts.part import Part, PartShape, merged
from esper_otel.schema import FRAME_POINTS, FRAME_SEQUENCE, SEED_CELLS, SEED_RETIRED

_NAMES = ["loss", "gradient_norm", "esper.global_step", "esper.epoch", "esper.seeds", "esper.seeds.digest"]
_of_step = st.tuples(st.sampled_from([*_NAMES, FRAME_SEQUENCE.name, FRAME_POINTS.name]), st.just(""))
_of_seed = st.tuples(
    st.sampled_from([*(metric.name for metric in SEED_CELLS), SEED_RETIRED.name]), st.sampled_from("abcdefg")
)
_numbers = st.sampled_from([0.0, 1.0, 2.0, float("nan")])
_values = st.dictionaries(_of_step | _of_seed, _numbers, min_size=1, max_size=12)


def _part(values: dict[tuple[str, str], float]) -> Part:
    return Part(PartShape.of(list(values)), np.array(list(values.values())))


@given(st.lists(_values, min_size=2, max_size=2), st.booleans())
def test_large_parts_are_merged_as_small_ones_are(two: list[dict[tuple[str, str], float]], last_counts: bool) -> None:
    both = [_part(values) for values in two]
    small = merged(both, last_counts=last_counts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parts, "LARGE", 1)
        large = merged(both, last_counts=last_counts)
    assert large.differing == small.differing
    assert _by_stream(large.part) == _by_stream(small.part)
    for name in ("has_repeats", "retired", "ids", "columns"):
        assert getattr(large.part.shape, name) == getattr(small.part.shape, name)
    for name in ("sequence", "points", "step", "epoch", "live", "digest"):
        said = [part.number(getattr(part.shape, name)) for part in (large.part, small.part)]
        assert repr(said[0]) == repr(said[1])
    assert repr(sorted(large.part.values().items())) == repr(sorted(small.part.values().items()))
    assert large.part.seeds().cells.tobytes() == small.part.seeds().cells.tobytes()


def _by_stream(part: Part) -> dict[tuple[str, str], bytes]:
    return {stream: number.tobytes() for stream, number in zip(part.shape.streams, part.numbers, strict=True)}


@given(_values, st.data())
def test_what_is_left_of_a_shape_is_what_those_streams_make(
    values: dict[tuple[str, str], float], data: st.DataObject
) -> None:
    shape = PartShape.of(list(values))
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))), np.bool_)
    left = [stream for stream, is_kept in zip(values, keep.tolist(), strict=True) if is_kept]
    one, other = shape.selected(keep), PartShape.of(left)
    for field in dataclasses.fields(PartShape):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            mine, theirs = (each.tolist() for each in (mine, theirs))
        assert mine == theirs, field.name
