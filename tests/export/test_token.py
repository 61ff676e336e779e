"""The bearer token: from a file that others replace while a run goes on, and never shown."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from endpoints import PROTOCOLS, at, body, grpc_server, http_answer, http_server, opened, to
from grpc import StatusCode

from esper_otel.bearer import TokenFile
from esper_otel.errors import ConfigurationError
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.token import NAME, Headers, read_one
from esper_otel.export.transport import Result, open_sender
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code


class Clock:
    """Stands still until it is set."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def token_file(path: Path, clock: Callable[[], float] = time.monotonic) -> TokenFile[str]:
    """As the exporter reads it."""
    return TokenFile(path, NAME, read_one, clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("first-token\n")
    return file


def written_again(path: Path) -> None:
    path.write_text("other-token\n")


def renamed_over(path: Path) -> None:
    path.with_name("new").write_text("other-token\n")
    path.with_name("new").replace(path)


def as_long_within_a_tick_of_the_clock(path: Path) -> None:
    before = path.stat()
    path.write_text("other-token\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("replaced", [written_again, renamed_over, as_long_within_a_tick_of_the_clock])
def test_a_token_that_was_replaced_is_found_within_a_second(
    replaced: Callable[[Path], None], path: Path, clock: Clock
) -> None:
    """However it was; the file is not read more often than once a second."""
    file = token_file(path, clock)
    replaced(path)
    clock.now_s = 0.9
    assert (file.look(), file.content) == (False, "first-token")
    clock.now_s = 1.0
    assert (file.look(), file.content) == (True, "other-token")
    path.write_text("third-token")
    clock.now_s = 1.9
    assert (file.look(), file.content) == (False, "other-token")
    assert (file.look_now(), file.content) == (True, "third-token")
    clock.now_s = 2.9
    assert (file.look(), file.content) == (False, "third-token")


def test_a_link_that_moves_leads_to_the_new_token(tmp_path: Path, clock: Clock) -> None:
    """As Kubernetes replaces a secret: token is a link into ..data, which is itself a link to a folder."""
    for name, token in (("..1", "first-token"), ("..2", "other-token")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(token)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "token").symlink_to("..data/token")
    file = token_file(tmp_path / "token", clock)
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").replace(tmp_path / "..data")
    assert (file.look_now(), file.content) == (True, "other-token")


def removed(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_text(" \n")


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def made_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def given_two_lines(path: Path) -> None:
    path.write_text("hunter2-a\nhunter2-b\n")


def given_a_letter_that_is_not_ascii(path: Path) -> None:
    path.write_text("hunter2-é")


def given_a_whole_header(path: Path) -> None:
    path.write_text("Bearer hunter2")


def made_huge(path: Path) -> None:
    path.write_bytes(b"hunter2-" * 10_000)


FAULTS = [
    (removed, "no such file or directory"),
    (emptied, "it contains no token"),
    (made_a_folder, "is a directory"),
    (made_a_pipe, "it is not a regular file"),
    (made_a_loop, "too many levels of symbolic links"),
    (given_two_lines, "it holds 2 tokens; keep only the one to send"),
    (given_a_letter_that_is_not_ascii, "line 1 must contain a token (ASCII without spaces), or"),
    (given_a_whole_header, "line 1 begins with the word Bearer, which is added automatically: write only the token"),
    (made_huge, "line 1 must contain a token (ASCII without spaces), or"),
]


@pytest.mark.parametrize(("spoilt", "words"), FAULTS)
def test_without_a_token_to_begin_with_the_setting_is_named(
    spoilt: Callable[[Path], None], words: str, path: Path
) -> None:
    """When the session starts, and without what the file holds."""
    spoilt(path)
    with pytest.raises(ConfigurationError) as raised:
        token_file(path)
    assert str(raised.value).startswith(f"setting token_file (or ESPER_TOKEN_FILE) = {str(path)!r}: {words}")
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(("spoilt", "words"), FAULTS)
def test_a_file_that_is_spoilt_for_a_while_leaves_the_last_token_in_force(
    spoilt: Callable[[Path], None], words: str, path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """And is warned about once a minute, not with every request."""
    file = token_file(path, clock)
    spoilt(path)
    opened_before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        clock.now_s += 1.0
        assert (file.look(), file.content) == (False, "first-token")
    assert len(list(Path("/proc/self/fd").iterdir())) == opened_before
    [record] = caplog.records
    assert record.getMessage().startswith(f"setting token_file (or ESPER_TOKEN_FILE) = {str(path)!r}: {words}")
    assert record.getMessage().endswith("its earlier content stays valid")
    assert "hunter2" not in record.getMessage()
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    path.write_text("other-token")
    assert (file.look_now(), file.content) == (True, "other-token")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_we_may_not_read_is_told(path: Path) -> None:
    """A secret mounted for another user."""
    path.chmod(0)
    with pytest.raises(ConfigurationError, match="permission denied"):
        token_file(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_token_goes_with_every_request_and_its_file_wins(protocol: str, path: Path) -> None:
    """A platform's OTEL_EXPORTER_OTLP_HEADERS may hold a token for all; the other headers go on being sent."""
    required = {"authorization": "Bearer first-token", "x-scope": "here"}
    with MemoryCollector(headers=required) as collector:
        environ = at(collector, protocol, HEADERS="authorization=Bearer%20another,x-scope=here")
        with opened(environ, path) as sender:
            assert [sender.send(body(), 5.0).result for _ in range(2)] == [Result.DELIVERED] * 2
        with opened(environ) as sender:
            assert sender.send(body(), 5.0).result is Result.UNAUTHENTICATED


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_token_that_has_expired_is_read_again_at_once(protocol: str, path: Path) -> None:
    """Not after a second: the exporter's own pause after a refusal grows to half a minute."""
    with MemoryCollector(headers={"authorization": "Bearer other-token"}) as collector:
        with opened(at(collector, protocol), path) as sender:
            outcome = sender.send(body(), 5.0)
            assert outcome.result is Result.UNAUTHENTICATED
            assert outcome.reason.endswith("(ESPER_TOKEN_FILE)")
            path.write_text("other-token")
            assert sender.send(body(), 5.0).result is Result.DELIVERED
        assert collector.frames_received == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_an_endpoint_repeats_of_a_secret_is_not_shown(protocol: str, path: Path) -> None:
    """Its words stand in logs and in our own health."""
    words = "unknown token first-token, or key hunter2-key"

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        return context.abort(StatusCode.UNAUTHENTICATED, words)

    expected = "unknown token <secret>, or key <secret>"
    refusal = http_answer("401 Unauthorized", "", words.encode())
    with grpc_server(answer) as port, http_server(refusal) as (address, _):
        url = f"http://127.0.0.1:{port}" if protocol == "grpc" else f"http://{address}"
        with opened(to(protocol, url, HEADERS="api-key=hunter2-key"), path) as sender:
            assert expected in sender.send(body(), 5.0).reason


def test_there_is_one_authorization_only(path: Path) -> None:
    """gRPC would send both, and leave it to the endpoint which one counts."""
    endpoint = endpoint_from_environment(to("grpc", "http://127.0.0.1:1", HEADERS="Authorization=Basic%20x,a=data"))
    assert Headers(endpoint, path).now() == (("a", "data"), ("authorization", "Bearer first-token"))
    assert Headers(endpoint, None).now() == (("authorization", "Basic x"), ("a", "data"))


def test_words_of_ordinary_sentences_are_no_secrets() -> None:
    """A password that is as short as "wrong" would make every message unreadable."""
    headers = Headers(endpoint_from_environment(to("grpc", "http://127.0.0.1:1", HEADERS="api-key=wrong,a=data")), None)
    assert headers.said("wrong data\n\x07for x") == "wrong data for x"


@pytest.mark.parametrize(
    ("url", "settings", "is_told"),
    [
        ("http://collector:4317", {}, True),
        ("http://192.0.2.1:4317", {}, True),
        ("dns:///collector:4317", {"INSECURE": "true"}, True),
        ("https://collector:4317", {}, False),
        ("http://localhost:4317", {}, False),
        ("http://127.8.0.1:4317", {}, False),
        ("http://[::1]:4317", {}, False),
        ("unix:///run/otel.sock", {"INSECURE": "true"}, False),
    ],
)
def test_a_token_that_others_can_read_on_the_way_is_told_once(
    url: str, settings: dict[str, str], is_told: bool, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sent all the same: inside a cluster plain text is common."""
    caplog.set_level(logging.INFO)
    with opened(to("grpc", url, **settings), path) as sender:
        for _ in range(2):
            sender.send(b"", 0.01)
    told = [record.getMessage() for record in caplog.records]
    target = endpoint_from_environment(to("grpc", url, **settings)).target
    assert told == is_told * [
        (
            f"the token of ESPER_TOKEN_FILE goes to {target} over plain text, where anyone on the way can read it: "
            "give https://"
        )
    ]


@pytest.mark.parametrize(("url", "is_told"), [("http://collector:4317", True), ("http://localhost:4317", False)])
def test_a_token_in_a_header_is_told_too(url: str, is_told: bool, caplog: pytest.LogCaptureFixture) -> None:
    environ = to("grpc", url, HEADERS="authorization=Bearer%20secret")
    open_sender(endpoint_from_environment(environ)).close()
    told = [record.getMessage() for record in caplog.records]
    words = "the token of OTEL_EXPORTER_OTLP_HEADERS goes to collector:4317 over plain text"
    assert told == is_told * [f"{words}, where anyone on the way can read it: give https://"]


def test_a_header_that_is_no_secret_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    open_sender(endpoint_from_environment(to("grpc", "http://collector:4317", HEADERS="x-team=vision"))).close()
    assert not caplog.records


def test_a_token_is_neither_logged_nor_shown(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At any level, by any library that we use."""
    caplog.set_level(logging.DEBUG)
    with MemoryCollector(headers={"authorization": "Bearer other"}) as collector:
        for protocol in PROTOCOLS:
            with opened(at(collector, protocol), path) as sender:
                assert "first-token" not in repr(sender.send(body(), 5.0))
    assert "first-token" not in caplog.text
