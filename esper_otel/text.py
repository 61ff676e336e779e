"""Makes text from outside, such as ids, names and reasons, safe to display."""

from __future__ import annotations

MOST_SHOWN = 256


def printable(text: object, most: int = MOST_SHOWN) -> str:
    """Returns the text as one line that is safe to print: unprintable characters are escaped, long text is cut.

    Unprintable characters include line breaks, terminal control characters, marks that change the direction of
    writing, and surrogates, which cannot be encoded.
    """
    shown = str(text)
    if len(shown) > most:
        shown = f"{shown[: most - 1]}…"
    if shown.isprintable():
        return shown
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in shown)
