"""The registry of semantic conventions has what Weaver's documentation of the format asks for; Weaver is not here."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import opentelemetry.semconv._incubating.attributes as incubating
import opentelemetry.semconv.attributes as stable
import pytest
import yaml
from programs import ROOT

sys.path.insert(0, str(ROOT / "deploy" / "rendering"))

from registry import registry

from esper_otel.schema import METRICS
from esper_otel.schema.attribute_catalogue import ATTRIBUTES
from esper_otel.schema.events import EVENTS

pytestmark = pytest.mark.own_code

KINDS = {
    "attribute_group": {"attributes"},
    "entity": {"name", "stability", "attributes"},
    "metric": {"metric_name", "instrument", "unit", "stability"},
    "event": {"name", "stability"},
}
OPTIONAL = {"display_name", "note", "attributes", "entity_associations"}


def groups() -> Iterator[dict[str, Any]]:
    for name, text in registry().items():
        if name != "manifest.yaml":
            yield from yaml.safe_load(text)["groups"]


def of_conventions() -> set[str]:
    """All names of attributes in the package of the conventions."""
    found = set[str]()
    for package in (stable, incubating):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            values = vars(importlib.import_module(module.name)).values()
            found.update(value for value in values if isinstance(value, str))
    return found


def test_each_group_has_what_its_kind_asks_for_and_nothing_else() -> None:
    ids = [group["id"] for group in groups()]
    assert len(ids) == len(set(ids))
    for group in groups():
        needed = {"id", "type", "brief", *KINDS[group["type"]]}
        assert needed <= group.keys() <= needed | OPTIONAL, group["id"]
        assert all(group[field] for field in needed), group["id"]
        if group["type"] == "metric":
            assert group["instrument"] in {"counter", "gauge", "updowncounter", "histogram"}


def test_each_attribute_is_declared_once_here_or_in_the_conventions() -> None:
    """Texts have an example; a reference leads somewhere; an entity has something that identifies it."""
    [declared] = [group["attributes"] for group in groups() if group["type"] == "attribute_group"]
    ours = [attribute["id"] for attribute in declared]
    assert len(ours) == len(set(ours))
    for attribute in declared:
        assert attribute["type"] in {"string", "int", "double", "template[int]"}
        assert attribute["stability"] == "development"
        assert attribute["brief"]
        assert attribute["type"] != "string" or attribute["examples"], attribute["id"]
    known = {*ours, *of_conventions()}
    entities = {group["name"]: group for group in groups() if group["type"] == "entity"}
    for group in groups():
        if group["type"] == "attribute_group":
            continue
        assert {each["ref"] for each in group.get("attributes", ())} <= known, group["id"]
        assert entities.keys() >= set(group.get("entity_associations", ()))
    for entity in entities.values():
        assert any(each["role"] == "identifying" for each in entity["attributes"])


def test_the_names_that_we_say_are_the_conventions_are() -> None:
    known = of_conventions()
    for each in ATTRIBUTES:
        if each.is_of_conventions:
            beginning = each.name.removesuffix("*")
            is_known = each.name in known or (beginning != each.name and any(n.startswith(beginning) for n in known))
            assert is_known, each.name
    assert [each.name for each in ATTRIBUTES if not each.is_of_conventions and each.name in known] == []


def test_every_metric_and_event_is_in_it() -> None:
    assert [g["metric_name"] for g in groups() if g["type"] == "metric"] == [metric.name for metric in METRICS]
    assert [g["name"] for g in groups() if g["type"] == "event"] == [kind.name for kind in EVENTS]
