"""What is rendered of the documents: the README's tables and METRICS.md."""

from __future__ import annotations

from pathlib import Path

from esper_otel.errors import ConfigurationError
from esper_otel.leyline.risk import LOSS_STEP, RULES, Rule
from esper_otel.schema.render import markdown_table, metrics_markdown, readme_table
from esper_otel.settings import PREFIX, EsperSettings


def settings_table() -> str:
    """The README's table of settings: name, variable, default as shipped, meaning."""
    return markdown_table(
        ("setting", "environment", "default", "meaning"),
        (
            (f"`{name}`", f"`{PREFIX}{name.upper()}`", f"`{setting.shipped}`", setting.meaning)
            for name, setting in EsperSettings.settings.items()
        ),
    )


def risks_table() -> str:
    """The README's table of risks: signal, condition, level, route."""
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


def with_section(text: str, name: str, section: str) -> str:
    """The text with what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->`` replaced.

    Raises:
        ConfigurationError: the text does not have each marker once, in this order.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, *rest = text.split(begin)
    parts = rest[0].split(end) if len(rest) == 1 else []
    if len(parts) != 2 or end in before:
        raise ConfigurationError(f"README.md must have {begin.strip()} and {end}, each once and in this order")
    return f"{before}{begin}{section}\n{end}{parts[1]}"


def documents(root: Path) -> dict[Path, str]:
    """Every rendered document of the source tree with the text that it should have.

    Raises:
        ConfigurationError: the README is not there, or lacks a marker.
    """
    readme = root / "README.md"
    if not readme.is_file():
        raise ConfigurationError(f"{readme} is not there: render the documents in a checkout")
    text = readme.read_text(encoding="utf-8")
    for name, section in (("metrics", readme_table()), ("settings", settings_table()), ("risks", risks_table())):
        text = with_section(text, name, section)
    return {readme: text, root / "esper_otel" / "schema" / "METRICS.md": metrics_markdown()}
