"""Text from outside: in terminals, logs and errors; tokens and hosts that are not what they should be."""

from __future__ import annotations

import contextlib
import time

import grpc

from attack.otlp import Point, body
from attack.target import Attack, Target

_ESCAPES = "\x1b[2J\x1b]0;owned\x07\nrun-fake  attempt 1  rank 0 of 1\x7f"
_LONGEST_WORDS = 2_000
_MOST_LOG = 1024 * 1024


def _escapes(target: Target) -> None:
    """Two processes of one rank: the second is named after what it says about itself."""
    now = time.time_ns()
    for process in ("first", _ESCAPES):
        for number in range(3):
            points = [Point("loss", 1.0, now), Point("esper.global_step", 7.0 + number, now)]
            target.post(body("rogue-writer", points, service__instance__id=process, host__name=process))
    time.sleep(min(1.0, target.left_s()))
    token = ("--target", target.gateway.grpc, "--token-file", str(target.gateway.folder / "rogue"))
    for arguments in (("pull", *token), ("pull", "rogue-writer", *token)):
        done = target.command(*arguments)
        for said in (done.stdout, done.stderr):
            raw = [each for each in said if not each.isprintable() and each != "\n"]
            target.hold(holds=not raw, otherwise="control characters of a sender reach a terminal")
            forged = any(line.startswith("run-fake") for line in said.splitlines())
            target.hold(holds=not forged, otherwise="a sender forges a line of `esper-otel pull`")


def _logs(target: Target) -> None:
    """Requests that aiohttp cannot read, each with a token, and connections that end in the middle."""
    secret = "very-secret-token-of-somebody"
    for number in target.rounds(0.002):
        bad = f"bad header {number}: x" if number % 2 else "x" * 9_000
        target.raw(f"GET / HTTP/1.1\r\nAuthorization: Bearer {secret}\r\n{bad}\r\n\r\n".encode(), 0.5)
        if number > 500:
            break
    log = target.gateway.log.read_bytes()
    target.hold(holds=secret.encode() not in log, otherwise="a token is in the log")
    target.hold(holds=b"Traceback" not in log, otherwise="a traceback is in the log")
    target.hold(holds=len(log) < _MOST_LOG, otherwise=f"the log has {len(log)} bytes")


def _hosts(target: Target) -> None:
    """A page of another site, whose name leads here by a trick with DNS."""
    for method, path in (("GET", "/metrics"), ("GET", "/healthz"), ("GET", "/readyz"), ("POST", "/v1/metrics")):
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
            head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 0\r\n"
            head += "Content-Type: application/x-protobuf\r\nAuthorization: Bearer rogue-token\r\n\r\n"
            line = target.raw(head.encode()).partition(b"\r\n")[0].decode(errors="replace")
            target.hold(holds=line.split(" ")[1:2] in (["403"], ["421"], ["400"]), otherwise=f"{path} answers any Host")


def _tokens(target: Target) -> None:
    """What is no token, and tokens for another's runs."""
    now = time.time_ns()
    honest = body("honest-http", [Point("loss", 1.0, now)])
    wrong = {"Bearer \xff\xfe": 401, "Bearer ": 401, "Basic cm9ndWU6": 401, "": 401, "Bearer honest": 401}
    for value, expected in wrong.items():
        head = f"POST /v1/metrics HTTP/1.1\r\nHost: {target.gateway.http}\r\nConnection: close\r\nContent-Length: 0\r\n"
        head += f"Content-Type: application/x-protobuf\r\nAuthorization: {value}\r\n\r\n"
        line = target.raw(head.encode("latin-1")).partition(b"\r\n")[0]
        target.hold(holds=f" {expected} ".encode() in line, otherwise=f"{value!r} is answered {line!r}")
    for token, expected in (("rogue-token", 403), ("wrong", 401)):
        status, _ = target.post(honest, token=token)
        target.hold(holds=status == expected, otherwise=f"{token} for an honest run: {status}")
    with target.channel() as channel:
        code, _ = target.pull(channel, "honest-http")
        target.hold(holds=code == grpc.StatusCode.PERMISSION_DENIED, otherwise=f"a pull of another's run: {code}")
    names = {run.run_id for run in target.runs() if not run.run_id.startswith("rogue-")}
    target.hold(holds=not names, otherwise="runs of others are listed")
    log = target.gateway.log.read_text(encoding="utf-8", errors="replace")
    target.hold(holds="Traceback" not in log, otherwise="a traceback is in the log")


def _long_ids(target: Target) -> None:
    """Errors repeat what they were asked for, not all of it."""
    with target.channel() as channel:
        for run in ("rogue-" + "x" * 10_000, "rogue-" + "é" * 100_000, "rogue-\n\x1b[2J", "x" * 10_000):
            code, words = target.pull(channel, run)
            known = {
                *(grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED),
            }
            target.hold(holds=code in known, otherwise=f"a pull of a long run id: {code}")
            target.hold(holds=len(words or "") < _LONGEST_WORDS, otherwise="an error repeats a whole run id")
    for points in ([Point("x" * 100_000, 1.0, time.time_ns())], [Point("loss", 1.0, time.time_ns(), "s" * 100_000)]):
        _, answer = target.post(body("rogue-long", points))
        target.hold(holds=len(answer) < _LONGEST_WORDS, otherwise="an answer repeats a whole name")
    _, answer = target.post(body("rogue-" + "x" * 100_000, [Point("loss", 1.0, time.time_ns())]))
    target.hold(holds=len(answer) < _LONGEST_WORDS, otherwise="an answer repeats a whole run id")


def _cursors(target: Target) -> None:
    """Cursors that nobody issued, numbers that no pull can mean."""
    with target.channel() as channel:
        for cursor in ("x", "a:b:c:d", "-1:-1", "9" * 400, "\x00", "e30=", "rogue-run:1:2"):
            code, _ = target.pull(channel, "rogue-writer", cursor)
            target.hold(holds=code != grpc.StatusCode.UNKNOWN, otherwise=f"cursor {cursor[:20]!r}: {code}")
        for asked in ({"wait_s": float("nan")}, {"wait_s": float("-inf")}, {"max_packets": 2**31}, {"rank": 2**32 - 1}):
            code, _ = target.pull(channel, "rogue-writer", **asked)
            target.hold(holds=code != grpc.StatusCode.UNKNOWN, otherwise=f"{asked}: {code}")


def _smuggling(target: Target) -> None:
    """HTTP that two readers could read in two ways, and headers and encodings without end."""
    host = target.gateway.http
    start = f"POST /v1/metrics HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer rogue-token\r\n"
    start += "Content-Type: application/x-protobuf\r\n"
    for head in (
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
        "Content-Length: -1\r\n\r\n",
        "Content-Length: 99999999999999999999\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
        "X: " + "x" * 100_000 + "\r\n\r\n",
        "".join(f"X-{number}: x\r\n" for number in range(5_000)) + "\r\n",
        "Content-Encoding: deflate\r\nContent-Length: 1\r\n\r\nx",
        "Content-Encoding: gzip, gzip\r\nContent-Length: 1\r\n\r\nx",
        "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b",
    ):
        with contextlib.suppress(OSError):
            answer = target.raw((start + head).encode("latin-1"), 1.0)
            target.hold(holds=not answer.startswith(b"HTTP/1.1 5"), otherwise=f"{head[:40]!r} is answered 5xx")


ATTACKS = (
    Attack("terminal-escapes", "escapes and newlines as the name of a writer", _escapes),
    Attack("tokens-in-logs", "malformed headers next to a token, again and again", _logs),
    Attack("foreign-hosts", "requests for other hosts", _hosts),
    Attack("broken-tokens", "Authorization that is no token, and tokens for others' runs", _tokens),
    Attack("long-ids", "ids and names of up to 200,000 bytes", _long_ids),
    Attack("forged-cursors", "cursors and numbers that nobody issued", _cursors),
    Attack("smuggling", "HTTP with two lengths, endless headers and odd encodings", _smuggling),
)
