"""The page of the command line, rendered from the parsers that ``esper-otel`` uses."""

from __future__ import annotations

import argparse

from esper_otel.cli import build_parser
from esper_otel.schema.render import markdown_table

# The groups that argparse makes itself.
_PLAIN = {"positional arguments", "options"}

_INTRODUCTION = """\
<!-- Rendered from the parsers of esper_otel/cli.py by `make docs`. Edit the commands, not this page. -->

# Command line

`esper-otel COMMAND` is also `python -m esper_otel COMMAND`. The exit status is 0 for success, 1 for a negative result and 2
for a mistake, such as an option that cannot be used; the message names the mistake and the repair. `esper-otel run` has the
exit status of the script that it runs. `esper-otel --version` prints the version.
"""


def command_line_page() -> str:
    """Returns the text of the page: each command with its arguments, by group, and an example."""
    commands = _commands(build_parser([]))
    table = markdown_table(
        ("command", "what it does"),
        ((f"[`{name}`](#esper-otel-{name})", parser.description or "") for name, parser in commands.items()),
    )
    return "\n".join((_INTRODUCTION, table, *(_section(name) for name in commands)))


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    [action] = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


def _section(name: str) -> str:
    parser = _commands(build_parser([name]))[name]
    summary, example = parser.description or "", (parser.epilog or "").removeprefix("example:\n").strip()
    parts = [f"\n## esper-otel {name}\n", f"{summary[:1].upper()}{summary[1:]}.\n", f"```console\n$ {example}\n```"]
    plain = [each for group in parser._action_groups if group.title in _PLAIN for each in group._group_actions]
    grouped = [
        (group.title or "", group._group_actions) for group in parser._action_groups if group.title not in _PLAIN
    ]
    for title, actions in [("", plain), *grouped]:
        rows = [(_spelling(each), _meaning(each)) for each in actions if each.dest != "help"]
        if rows:
            heading = f"\n{title[:1].upper()}{title[1:]}:\n" if title else ""
            parts += [heading, markdown_table(("argument", "meaning"), rows)]
    return "\n".join(parts)


def _spelling(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(f"`{f'{option} {value}'.strip()}`" for option in action.option_strings)


def _meaning(action: argparse.Action) -> str:
    return (action.help or "") % vars(action)
