"""The catalogue of events is whole and consistent."""

from __future__ import annotations

import pytest

from esper_otel.schema.events import COMMON_ATTRIBUTES, EVENTS, Severity

pytestmark = pytest.mark.own_code


def test_names_of_events_and_of_their_attributes_are_unique() -> None:
    """A receiver finds the meaning of a record by its event name, and of an attribute by its key."""
    assert len({kind.name for kind in EVENTS}) == len(EVENTS)
    for kind in EVENTS:
        keys = [each.name for each in (*COMMON_ATTRIBUTES, *kind.attributes)]
        assert len(set(keys)) == len(keys)
    attributes = {each for kind in EVENTS for each in (*COMMON_ATTRIBUTES, *kind.attributes)}
    assert len({each.name for each in attributes}) == len(attributes), "one key, one meaning"


def test_each_event_says_how_serious_it_is_in_words_of_otlp() -> None:
    """The severity is one of three."""
    for kind in EVENTS:
        assert {each.name for each in Severity} & set(kind.severity.replace(",", "").split()), kind.name
