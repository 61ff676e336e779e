"""Writes OTLP requests to files instead of sending them: JSON lines, as the Collector's ``otlpjsonfile`` reads them."""

from __future__ import annotations

import errno
import os
import secrets
import time
from pathlib import Path

from esper_otel import unix
from esper_otel.errors import ConfigurationError
from esper_otel.export.endpoint import Endpoint, TelemetrySignal
from esper_otel.export.otlp_json import json_of
from esper_otel.export.outcome import CLOSED, Outcome, Result
from esper_otel.native import threads

SUFFIX = ".jsonl"
MOST_BYTES = 64 * 1024 * 1024  # of one file; then the next one begins
_CLOSE_S = 2.0  # as long may the disk take for the last lines
_PRIVATE = 0o700  # metrics may be confidential
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | unix.FILE


def file_endpoint(directory: Path, signal: TelemetrySignal = "metrics") -> Endpoint:
    """Returns the endpoint that stands for files in a directory."""
    path = str(directory.absolute())
    return Endpoint(protocol="file", target=path, address=path, is_insecure=False, signal=signal)


class FileSender:
    """Writes requests to files in a directory: see ``Sender``.

    Each line is one request, of metrics or of logs. A session has files of its own, named by its start and numbered; a
    file is closed when the next line would make it larger than 64 MiB. A line is written by a single call, so a process
    that is killed leaves whole lines, and what a full disk cut short is removed again and retried later.

    Args:
        directory: where the files are; made if it does not exist.
        signal: what the requests contain; events are logs, in files of their own.
        most_bytes: size of a file.

    Raises:
        ConfigurationError: nothing can be written there.
    """

    def __init__(self, directory: Path, *, signal: TelemetrySignal = "metrics", most_bytes: int = MOST_BYTES) -> None:
        self._directory = directory
        self._signal = signal
        self._most_bytes = most_bytes
        self._session = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}"  # names sort by age
        self._number = 0
        self._size = 0
        self._file: int | None = None
        self._is_closed = False
        self._writing = threads().Lock()
        try:
            directory.mkdir(_PRIVATE, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"setting export_file = {directory}: {error.strerror or error}") from None
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigurationError(f"setting export_file = {directory}: this process may not write there")

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """See ``Sender``."""
        del timeout_s
        line = json_of(body, self._signal) + b"\n"
        with self._writing:
            if self._is_closed:
                return CLOSED
            try:
                self._write(line)
            except OSError as error:
                return Outcome(Result.TEMPORARY, f"{self._directory}: {error.strerror or error}")
        return Outcome(Result.DELIVERED)

    def close(self) -> None:
        """See ``Sender``. A disk that does not answer is left to a thread that ends with the process.

        Raises:
            OSError: the last lines may not be on the disk.
        """
        self._is_closed = True
        errors: list[OSError] = []

        def end(wait_s: float = -1) -> None:
            if self._writing.acquire(timeout=wait_s):
                try:
                    self._end()
                except OSError as error:
                    errors.append(error)
                finally:
                    self._writing.release()

        ending = threads().Thread(target=end, name="esper-otel-file", daemon=True)
        try:
            ending.start()
        except RuntimeError:  # the interpreter is ending, and starts no more threads
            end(_CLOSE_S)
        else:
            ending.join(_CLOSE_S)
            if ending.is_alive():
                raise TimeoutError(errno.ETIMEDOUT, f"{self._directory} has not answered for {_CLOSE_S:g} s")
        if errors:
            raise errors[0]

    def _write(self, line: bytes) -> None:
        if self._file is None or (self._size and self._size + len(line) > self._most_bytes):
            self._end()
            mark = "events-" if self._signal == "logs" else ""
            name = f"{self._session}-{mark}{self._number:06d}{SUFFIX}"
            self._file = os.open(self._directory / name, _FLAGS, 0o600)
            self._number, self._size = self._number + 1, 0
        try:
            written = os.write(self._file, line)
        except OSError:
            self._cut()
            raise
        if written < len(line):
            self._cut()
            raise OSError(errno.ENOSPC, "the disk is full: a line could be written only in part")
        self._size += len(line)

    def _cut(self) -> None:
        """Removes what was written of a line in part."""
        if self._file is not None:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)

    def _end(self) -> None:
        """Closes the file, with its content on the disk."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.fsync(file)
            finally:
                os.close(file)
