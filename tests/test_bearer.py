"""Files of bearer tokens: one reader for the exporter, the gateway and the clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_otel.bearer import Token, read_tokens


def test_a_line_is_a_token_and_perhaps_a_prefix(tmp_path: Path) -> None:
    """Comments and empty lines say nothing; a client reads the gateway's own file."""
    file = tmp_path / "tokens"
    file.write_text("# of the trainers\n\nfirst\n  second   run=größe-7  \r\nthird#\n")
    assert read_tokens(file) == [Token("first", ""), Token("second", "größe-7"), Token("third#", "")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hunter2 ru", "line 2 must contain a token"),
        ("hunter2 run=a b", "line 2 must contain a token"),
        ("hunter2é", "line 2 must contain a token"),
        ("hunter2\x00", "line 2 must contain a token"),
        ("hunter2 run=", "line 2: run= without a prefix"),
        ("run=hunter2", "line 2 begins with run="),
        ("Bearer hunter2", "line 2 begins with the word Bearer"),
        ("hunter2" + " " * 1024 * 1024, "it has more than 1048576 bytes"),
    ],
)
def test_a_line_that_is_something_else_is_named_and_not_shown(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"hunter2\n{line}\n")
    with pytest.raises(ValueError, match=f"^{words}") as raised:
        read_tokens(file)
    assert "hunter2" not in str(raised.value)


def test_a_token_is_not_shown() -> None:
    """In a traceback with local variables, for one."""
    assert repr(Token("hunter2", "a")) == "Token(prefix='a')"
