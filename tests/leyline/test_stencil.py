"""Messages from bytes with holes are the messages that setters would have made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline import MetricPoint, SeedState, SystemStatePacket, TelemetryPacket
from esper_otel.leyline.stencil import Stencil

pytestmark = pytest.mark.own_code

COLUMNS = 3
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
doubles = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(max_size=6) | st.sampled_from(["\x00\x00\x00@", "\x00" * 8, "@" * 200])


def state_of(seed_id: str, number: Callable[[int], float]) -> SystemStatePacket:
    seed = SeedState(seed_id=seed_id, risk_score=number(0), metrics={"alpha": number(1), "b": 1.0, "a": number(2)})
    return SystemStatePacket(seed_states=[seed])


def telemetry_of(seed_id: str, number: Callable[[int], float]) -> TelemetryPacket:
    points = [MetricPoint(name=seed_id, value=number(2)), MetricPoint(name="x", value=number(0))]
    return TelemetryPacket(packet_id=seed_id, metrics=points)


@given(st.lists(st.tuples(texts, st.tuples(floats, floats, floats)), max_size=4))
def test_a_filled_table_of_floats_is_the_message_that_setters_make(
    rows: list[tuple[str, tuple[float, float, float]]],
) -> None:
    """Whatever the texts around the holes are: ids come from users."""
    stencils = [Stencil.of(partial(state_of, text), 4) for text, _ in rows]
    table = np.array([cells for _, cells in rows]).reshape(-1, COLUMNS)
    filled = Stencil.joined(stencils, 4, COLUMNS).filled(table)
    expected = SystemStatePacket()
    for text, cells in rows:
        expected.MergeFrom(state_of(text, cells.__getitem__))
    assert SystemStatePacket.FromString(filled) == expected


@given(st.lists(st.tuples(texts, st.tuples(doubles, doubles, doubles)), max_size=4))
def test_the_slices_of_a_filled_table_of_doubles_are_its_rows_messages(
    rows: list[tuple[str, tuple[float, float, float]]],
) -> None:
    """A seed must never get another seed's numbers."""
    stencils = [Stencil.of(partial(telemetry_of, text), 8) for text, _ in rows]
    stencil = Stencil.joined(stencils, 8, COLUMNS)
    filled = stencil.filled(np.array([cells for _, cells in rows]).reshape(-1, COLUMNS))
    messages = [TelemetryPacket.FromString(filled[part]) for part in stencil.slices()]
    assert messages == [telemetry_of(text, cells.__getitem__) for text, cells in rows]


def test_filling_leaves_the_stencil_as_it_was() -> None:
    """Stencils are shared between threads and steps."""
    stencil = Stencil.of(lambda hole: state_of("seed", hole), 4)
    before = stencil.filled(np.array([[1.0, 2.0, 3.0]]))
    stencil.filled(np.array([[4.0, 5.0, 6.0]]))
    assert stencil.filled(np.array([[1.0, 2.0, 3.0]])) == before
