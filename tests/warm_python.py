"""The program that ``warm.executable()`` names: does what Python would do with its arguments, by a fork of a server.

It imports little, and stands between the fork and whoever has started it: streams are theirs, signals are passed on,
and the exit status is the fork's.
"""

import json
import os
import signal
import socket
import sys

_ALSO = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def _main(address: str, *command: str) -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [word for number, word in enumerate(command) if number or word != "-u"]
    order = {"command": words, "environ": dict(os.environ), "folder": os.getcwd(), "descriptors": None}  # noqa: PTH109
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(order).encode()], [theirs.fileno(), 0, 1, 2])
    theirs.close()
    pid = int(mine.recv(64))
    for number in _ALSO:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int(mine.recv(64))
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    _main(*sys.argv[1:])
