"""The catalogue as a registry of semantic conventions, in the format of OpenTelemetry's Weaver (version 1: groups).

No package that the project can install contains Weaver or its JSON schema. The files follow Weaver's documentation of
the format, and ``tests/schema/test_registry.py`` checks what it asks for; Weaver itself has not read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from esper_otel.export.scopes import SCHEMA_URL, SCHEMA_VERSION
from esper_otel.schema import DEVICE_INFO, METRICS, Metric
from esper_otel.schema.attribute_catalogue import ATTRIBUTES, Attribute, Carrier
from esper_otel.schema.events import COMMON_ATTRIBUTES, EVENTS, EventAttribute

_HEADER = "# Rendered by `make docs` from esper_otel/schema/; change that instead.\n"
# A placeholder: the registry is published nowhere.
_OURS = f"https://registry.invalid/esper_otel/{SCHEMA_VERSION}"
_CONVENTIONS = "https://github.com/open-telemetry/semantic-conventions/archive/refs/tags/v{version}.zip[model]"
_STABILITY = "development"
_RUN, _DEVICE = "esper.run", "esper.device"
_IDENTIFYING = {_RUN: ("esper.run.id", "esper.run.attempt", "esper.rank"), _DEVICE: ("esper.device.id",)}


def registry() -> dict[str, str]:
    """The files of the registry, by name."""
    version = SCHEMA_URL.rpartition("/")[2]
    manifest = {
        "description": "Metrics, events and attributes of Esper's training runs.",
        "schema_url": _OURS,
        "stability": _STABILITY,
        "dependencies": [{"schema_url": SCHEMA_URL, "registry_path": _CONVENTIONS.format(version=version)}],
    }
    placeholder = "# The address in schema_url is a placeholder: the registry is published nowhere.\n"
    return {
        "manifest.yaml": _HEADER + placeholder + _text(manifest),
        "attributes.yaml": _HEADER + _text({"groups": [_attributes()]}),
        "entities.yaml": _HEADER + _text({"groups": list(_entities())}),
        "metrics.yaml": _HEADER + _text({"groups": [_metric(metric) for metric in METRICS]}),
        "events.yaml": _HEADER + _text({"groups": list(_events())}),
    }


def _text(content: Any) -> str:
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def _id(attribute: Attribute) -> str:
    return attribute.name.removesuffix(".*")


def _is_several(attribute: Attribute) -> bool:
    """Whether it stands for several names of the conventions."""
    return attribute.is_of_conventions and attribute.name.endswith(".*")


def _attributes() -> dict[str, Any]:
    """The attributes of our own; a name that an event has, too, stands here once."""
    ours = {_id(each): _declared(each) for each in ATTRIBUTES if not each.is_of_conventions}
    for each in _of_events():
        if each.name.startswith("esper.") and each.name not in ours:
            ours[each.name] = _of_event(each)
    return {
        "id": "registry.esper",
        "type": "attribute_group",
        "display_name": "Esper's attributes",
        "brief": "Attributes of training runs.",
        "attributes": list(ours.values()),
    }


def _declared(attribute: Attribute) -> dict[str, Any]:
    is_chosen = attribute.name.endswith(".*")
    found = {
        "id": _id(attribute),
        "type": f"template[{attribute.type}]" if is_chosen else attribute.type,
        "stability": _STABILITY,
        "brief": attribute.meaning,
    }
    return found | ({"examples": [attribute.example]} if attribute.example else {})


def _of_event(attribute: EventAttribute) -> dict[str, Any]:
    found = {"id": attribute.name, "type": attribute.type, "stability": _STABILITY, "brief": attribute.meaning}
    return found | ({"examples": ["BLENDING"]} if attribute.type == "string" else {})


def _of_events() -> Iterator[EventAttribute]:
    yield from dict.fromkeys([*COMMON_ATTRIBUTES, *(each for kind in EVENTS for each in kind.attributes)])


def _entities() -> Iterator[dict[str, Any]]:
    """A rank of a run, and its device."""
    for name, brief, place in (
        (_RUN, "One rank of one attempt of a training run.", Carrier.RESOURCE),
        (_DEVICE, "The device that a rank trains on.", Carrier.DEVICE),
    ):
        refs = [each for each in ATTRIBUTES if place in each.places and not _is_several(each)]
        yield {
            "id": f"entity.{name}",
            "type": "entity",
            "name": name,
            "stability": _STABILITY,
            "brief": brief,
            "attributes": [
                {"ref": _id(each), "role": "identifying" if each.name in _IDENTIFYING[name] else "descriptive"}
                for each in refs
            ],
        }


def _metric(metric: Metric) -> dict[str, Any]:
    names = [metric.split_by] if metric.split_by else []
    if metric is DEVICE_INFO:
        names = [_id(each) for each in ATTRIBUTES if Carrier.DEVICE in each.places]
    found = {
        "id": f"metric.{metric.name}",
        "type": "metric",
        "metric_name": metric.name,
        "stability": _STABILITY,
        "brief": metric.description,
        "instrument": metric.kind,
        "unit": metric.unit,
        "entity_associations": [_RUN],
    }
    note = " ".join(text for text in (metric.source, metric.present, metric.misleads) if text)
    return found | ({"note": note} if note else {}) | ({"attributes": _refs(names)} if names else {})


def _events() -> Iterator[dict[str, Any]]:
    for kind in EVENTS:
        yield {
            "id": f"event.{kind.name}",
            "type": "event",
            "name": kind.name,
            "stability": _STABILITY,
            "brief": kind.meaning,
            "entity_associations": [_RUN],
            "attributes": _refs(each.name for each in (*COMMON_ATTRIBUTES, *kind.attributes)),
        }


def _refs(names: Iterable[str]) -> list[dict[str, str]]:
    return [{"ref": name} for name in names]
