"""What is rendered of the documents: METRICS.md, the tables of docs/reference, and the page of the command line."""

from __future__ import annotations

from pathlib import Path

from command_line import command_line_page

from esper_otel.errors import ConfigurationError
from esper_otel.leyline.risk import LOSS_STEP, RULES, Rule
from esper_otel.record.peak import PEAKS
from esper_otel.schema.attribute_catalogue import ATTRIBUTES
from esper_otel.schema.events import COMMON_ATTRIBUTES, EVENTS, EventAttribute
from esper_otel.schema.render import markdown_table, metrics_markdown, request_tables
from esper_otel.settings import COMPUTE_DTYPES, PREFIX, EsperSettings


def settings_table() -> str:
    """The table of settings: name, variable, default as shipped, meaning."""
    return markdown_table(
        ("setting", "environment", "default", "meaning"),
        (
            (f"`{name}`", f"`{PREFIX}{name.upper()}`", f"`{setting.shipped}`", setting.meaning)
            for name, setting in EsperSettings.settings.items()
        ),
    )


def risks_table() -> str:
    """The table of risks: signal, condition, level, route."""
    return markdown_table(
        ("signal", "when", "severity", "route"),
        ((f"`{rule.name}`", _condition(rule), _level(rule), _route(rule)) for rule in RULES),
    )


def _condition(rule: Rule) -> str:
    what = "the loss is above that of the step before by" if rule.metric == LOSS_STEP else f"`{rule.metric}`"
    text = f"{what} {'at least' if rule.is_inclusive else 'more than'} {rule.threshold:g}"
    if rule.and_below is not None:
        text += f", and `{rule.and_below[0]}` at most {rule.and_below[1]:g}"
    if rule.only_unrouted:
        text += "; no signal above it"
    if rule.unless and not rule.only_unrouted:
        text += f"; not with `{rule.unless}`"
    return text


def _level(rule: Rule) -> str:
    level = rule.level.lower()
    return f"{level}; only a note on pages and on Oona if the run trains on its CPU" if rule.only_note_on_cpu else level


def _route(rule: Rule) -> str:
    is_conditional = not rule.overrules and not rule.only_unrouted
    return f"{rule.route}, unless a signal above it has decided" if is_conditional else rule.route


def attributes_table() -> str:
    """The table of attributes: name, what has it, meaning, where it is from."""
    return markdown_table(
        ("attribute", "of", "meaning", "from"),
        (
            (
                f"`{each.name}`",
                ", ".join(each.places),
                each.meaning,
                each.source or ", ".join(f"`{name}`" for name in each.variables),
            )
            for each in ATTRIBUTES
        ),
    )


def peaks_table() -> str:
    """The table of devices: its names, rates by dtype, and where the vendor states them."""
    return markdown_table(
        ("device", *COMPUTE_DTYPES, "source"),
        (
            (
                ", ".join(f"`{name}`" for name in row.names),
                *(f"{row.tflops[each]:g}" if each in row.tflops else "" for each in COMPUTE_DTYPES),
                row.source,
            )
            for row in PEAKS
        ),
    )


def events_tables() -> str:
    """The table of events (name, meaning, severity, attributes), and that of their attributes."""
    attributes = dict.fromkeys([*COMMON_ATTRIBUTES, *(each for kind in EVENTS for each in kind.attributes)])
    events = markdown_table(
        ("event", "when", "severity", "attributes of its own"),
        (
            (f"`{kind.name}`", kind.meaning, kind.severity, ", ".join(f"`{each.name}`" for each in kind.attributes))
            for kind in EVENTS
        ),
    )
    return f"{events}\n\n{markdown_table(('attribute', 'type', 'meaning'), map(_attribute_row, attributes))}"


def _attribute_row(attribute: EventAttribute) -> tuple[str, str, str]:
    return f"`{attribute.name}`", attribute.type, attribute.meaning


# In docs/reference: the page, the name of its markers, and what stands between them.
TABLES = {
    "metrics.md": ("metrics", request_tables),
    "settings.md": ("settings", settings_table),
    "attributes.md": ("attributes", attributes_table),
    "throughput.md": ("peaks", peaks_table),
    "signals.md": ("risks", risks_table),
    "events.md": ("events", events_tables),
}


def with_section(text: str, name: str, section: str) -> str:
    """The text with what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->`` replaced.

    Raises:
        ConfigurationError: the text does not have each marker once, in this order.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, *rest = text.split(begin)
    parts = rest[0].split(end) if len(rest) == 1 else []
    if len(parts) != 2 or end in before:
        raise ConfigurationError(f"the page must have {begin.strip()} and {end}, each once and in this order")
    return f"{before}{begin}{section}\n{end}{parts[1]}"


def documents(root: Path) -> dict[Path, str]:
    """Every rendered document of the source tree with the text that it should have.

    Raises:
        ConfigurationError: a page with a rendered table is missing, or lacks a marker.
    """
    reference = root / "docs" / "reference"
    rendered = {
        root / "esper_otel" / "schema" / "METRICS.md": metrics_markdown(),
        reference / "command-line.md": command_line_page(),
    }
    for name, (section, table) in TABLES.items():
        page = reference / name
        if not page.is_file():
            raise ConfigurationError(f"{page} is not there: render the documents in a checkout")
        try:
            rendered[page] = with_section(page.read_text(encoding="utf-8"), section, table())
        except ConfigurationError as error:
            raise ConfigurationError(f"{page}: {error}") from None
    return rendered
