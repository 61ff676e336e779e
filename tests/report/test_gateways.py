"""Reports of a gateway that answers whatever it likes: bounded, one line, and nothing that moves the cursor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from esper_otel.cli import main
from esper_otel.leyline import messages
from esper_otel.pull.calls import method
from esper_otel.pull.messages import PullRequest, PullResponse, Run, RunsResponse, Step
from esper_otel.report import recording

pytestmark = pytest.mark.lengthy

Answer = Callable[[PullRequest], bytes]


@contextmanager
def answering(answer: Answer, runs: RunsResponse) -> Iterator[str]:
    """A gateway that gives these answers; its address."""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not generic when it runs
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
            if details.method == method("Pull")[0]:
                return grpc.unary_unary_rpc_method_handler(
                    lambda said, _: answer(said), request_deserializer=PullRequest.FromString
                )
            return grpc.unary_unary_rpc_method_handler(lambda _, __: runs.SerializeToString())

    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_send_message_length", -1)])
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def step_at(time_ns: int, *, state: bytes | None = None, names: Sequence[str] = ("loss",), writer: str = "") -> Step:
    made = messages.SystemStatePacket(timestamp_ns=time_ns, training_metrics={"loss": 1.0}).SerializeToString()
    return Step(state=made if state is None else state, attempt=1, step=2**64 - 1, names=names, writer=writer)


def endless(request: PullRequest) -> bytes:
    first = int(request.cursor or 0)
    steps = [step_at(first + number) for number in range(500)]
    return PullResponse(steps=steps, cursor=str(first + 500)).SerializeToString()


def of_numbers(request: PullRequest) -> bytes:
    steps = [] if request.cursor else [step_at(number, names=[str(each) for each in range(99)]) for number in range(99)]
    return PullResponse(steps=steps, cursor="1").SerializeToString()


HOSTILE: dict[str, tuple[Answer, str]] = {
    "steps without end": (endless, "goes on giving steps"),
    "the same page for ever": (lambda _: PullResponse(steps=[step_at(1)] * 999).SerializeToString(), "goes on giving"),
    "numbers without end": (of_numbers, "more numbers than a report takes"),
    "a message without end": (lambda _: PullResponse(cursor="x" * 70_000_000).SerializeToString(), "larger than max"),
    "no packets": (lambda _: PullResponse(steps=[step_at(1, state=b"\xff")]).SerializeToString(), "Leyline packets"),
    "no message": (lambda _: b"\xff", "INTERNAL"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_gateway_answers_without_end_or_sense_ends_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recording, "_MOST_STEPS", 2_000)
    monkeypatch.setattr(recording, "_MOST_NUMBERS", 6_000)
    answer, why = HOSTILE[name]
    with answering(answer, RunsResponse()) as address:
        assert main(["report", "run", "--target", address]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert why in said.err
    assert len(said.err) < 600
    assert not list(tmp_path.iterdir())


def test_what_a_gateway_says_in_texts_and_extreme_numbers_is_only_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = "\x1b[2J\n<script>alert(1)</script>"
    state = messages.SystemStatePacket(timestamp_ns=2**62, training_metrics={evil: float("inf"), "loss": 1e308})
    steps = [step_at(1), step_at(2**62, state=state.SerializeToString(), names=[evil, "loss"], writer=evil)]
    runs = RunsResponse(runs=[Run(run_id="run", attempt=1, rank=0, ended=evil)])

    def answer(request: PullRequest) -> bytes:
        return PullResponse(steps=[] if request.cursor else steps, cursor="1").SerializeToString()

    with answering(answer, runs) as address:
        assert main(["report", "run", "--target", address]) == 0
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.split("\n"))
    assert "<script>" not in (tmp_path / "run.html").read_text(encoding="utf-8")
