"""Text that others have written, such as ids, names and reasons, as it may be shown."""

from __future__ import annotations

MOST_SHOWN = 256


def printable(text: object, most: int = MOST_SHOWN) -> str:
    """The text in one line that a terminal only shows: what cannot be printed is escaped, what is too long is cut.

    Line breaks, terminal controls, marks that turn the direction of writing, and code points that no encoding has are
    all among what cannot be printed.
    """
    shown = str(text)
    if len(shown) > most:
        shown = f"{shown[: most - 1]}…"
    if shown.isprintable():
        return shown
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in shown)
