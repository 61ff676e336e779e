"""Attacks a gateway on loopback, kind by kind, and prints what honest peers had of it: ``make attack``.

For each attack a gateway with an empty store starts, with an honest trainer and an honest puller over gRPC and over
HTTP. After it the gateway is killed with SIGKILL and started again on the same store. The exit status is 1 if a bound
is broken: memory, an honest step lost or pulled twice, the delay of honest steps, the CPU time of one turn of the event
loop, /healthz within a second, a restart that serves, or what an attack itself looks for. Delays are printed next to
those without an attack, the first line; SECURITY.md says why that of http2-floods is accepted. It ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from certificates import Authority

from attack import beside, connections, costs, files, fuzzing, tenants, texts
from attack.target import MOST_MIB, Attack, Gateway, GatewayEnded, HonestProcess, Target

BASELINE = Attack("baseline", "no attack", lambda target: time.sleep(target.left_s()))
ATTACKS = (
    *costs.ATTACKS,
    *beside.ATTACKS,
    *connections.ATTACKS,
    *tenants.ATTACKS,
    *texts.ATTACKS,
    *files.ATTACKS,
    *fuzzing.ATTACKS,
)
_HEALTH_MS = 1_000.0
_TURN_MS = 100.0
# Of honest steps, the 99th percentile: on a machine that is quiet, and else so many times that without an attack.
_DELAY_MS, _TIMES = 250.0, 25.0
_MOST_S = 1_800.0  # for all of them
_LEAST_S = 1.0
_LATE_S = 10.0  # for what an attack has begun before its end
_PROTOCOLS = ("grpc", "http/protobuf")


@dataclass(frozen=True)
class Row:
    """What came of an attack.

    Attributes:
        name: of the attack.
        delays_ms: of honest steps, from the end of the step to the puller.
        missing: honest steps that the puller never got.
        twice: honest steps that it got twice.
        peak_mib: the gateway's memory at its highest, the restart included.
        cpu_s: the gateway's CPU time during the attack.
        turn_ms: CPU time of the longest turn of the event loop.
        health_ms: the longest answer of /healthz; infinite when there was none.
        restart_s: from starting it again until it serves; NaN if it does not.
        faults: what did not hold.
    """

    name: str
    delays_ms: tuple[float, float, float]
    missing: int
    twice: int
    peak_mib: float
    cpu_s: float
    turn_ms: float
    health_ms: float
    restart_s: float
    faults: tuple[str, ...]

    def line(self) -> str:
        """For the table."""
        delays = "".join(f"{each:8.0f}" for each in self.delays_ms)
        numbers = f"{self.missing:8}{self.twice:6}{self.peak_mib:8.0f}{self.cpu_s:7.1f}{self.turn_ms:6.0f}"
        times = f"{self.health_ms:8.0f}{self.restart_s:8.1f}"
        return f"{self.name:20}{delays}{numbers}{times}  {'; '.join(self.faults) or 'held'}"


HEAD = (
    f"{'attack':20}{'p50 ms':>8}{'p99 ms':>8}{'max ms':>8}"
    f"{'missing':>8}{'twice':>6}{'MiB':>8}{'CPU s':>7}{'turn':>6}{'health':>8}{'restart':>8}"
)


def run(
    attack: Attack, seconds: float, folder: Path, most_delay_ms: float = math.inf, most_turn_ms: float = math.inf
) -> Row:
    """One attack, from an empty store to the restart after it."""
    tls = None
    if attack.has_tls:
        authority = Authority(folder)
        tls = (*authority.pair("gateway"), authority.certificate)
    with contextlib.ExitStack() as closing:
        gateway = Gateway(folder, attack.options, has_pull_tokens=attack.has_pull_tokens, tls=tls)
        closing.callback(gateway.close)
        honest = [HonestProcess(gateway, protocol) for protocol in _PROTOCOLS]
        for each in honest:
            closing.callback(each.close)
        gateway.start()
        if not all(answer["ready"] for answer in _all(honest, "ready")):
            raise GatewayEnded("no honest step has come, before the attack began")
        _all(honest, "begin")
        cpu_s = gateway.cpu_s()
        target = Target(gateway, time.monotonic() + seconds)
        _attacked(attack, target)
        time.sleep(min(target.left_s(), _LEAST_S))  # so that there are honest steps to look at
        cpu_s = gateway.cpu_s() - cpu_s
        windows = _all(honest, "end")
        turn_ms = gateway.longest_turn_ms()
        target.hold(holds=turn_ms <= most_turn_ms, otherwise=f"a turn of the event loop took {turn_ms:.0f} ms of CPU")
        restart_s = _restarted(attack, target)
        ends = _all(honest, "finish")
        return _row(attack, target, windows, ends, (cpu_s, turn_ms), restart_s, most_delay_ms)


def _attacked(attack: Attack, target: Target) -> None:
    """Runs the attack, for no longer than it may take."""
    failed: list[BaseException] = []

    def attacks() -> None:
        try:
            attack.run(target)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=attacks, daemon=True)
    thread.start()
    thread.join(target.left_s() + _LATE_S)
    gateway = target.gateway
    if not gateway.is_running():
        words = f"stopped at {gateway.peak_mib:.0f} MiB" if gateway.was_stopped else f"ended: {gateway.last_words()}"
        target.fault(f"the gateway {words}")
    elif failed:
        target.fault(f"the attack had {type(failed[0]).__name__}: {failed[0]}")


def _restarted(attack: Attack, target: Target) -> float:
    """kill -9, then another gateway on the same store."""
    target.gateway.kill()
    if attack.between is not None:
        attack.between(target)
    try:
        restart_s = target.gateway.start()
    except GatewayEnded as error:
        target.fault(str(error))
        return math.nan
    if attack.after is not None:
        attack.after(target)
    return restart_s


def _row(
    attack: Attack,
    target: Target,
    windows: list[dict[str, Any]],
    ends: list[dict[str, Any]],
    took: tuple[float, float],
    restart_s: float,
    most_delay_ms: float,
) -> Row:
    delays = np.array([each for window in windows for each in window["delays_ms"]] or [math.nan])
    health_ms = max((each for window in windows for each in window["health_ms"]), default=math.inf)
    missing, twice = (sum(end[name] for end in ends) for name in ("missing", "twice"))
    peak_mib = target.gateway.peak_mib
    target.hold(holds=missing == 0, otherwise=f"{missing} honest steps are lost")
    target.hold(holds=twice == 0, otherwise=f"{twice} honest steps came twice")
    target.hold(holds=peak_mib <= MOST_MIB, otherwise=f"more than {MOST_MIB} MiB")
    target.hold(holds=health_ms <= _HEALTH_MS, otherwise="/healthz did not answer within a second")
    p50, p99 = np.percentile(delays, [50, 99]).tolist()
    is_in_time = attack.is_delay_accepted or p99 <= most_delay_ms
    target.hold(holds=is_in_time, otherwise=f"honest steps came late: more than {most_delay_ms:.0f} ms")
    delays_ms = (p50, p99, float(delays.max()))
    return Row(attack.name, delays_ms, missing, twice, peak_mib, *took, health_ms, restart_s, tuple(target.faults))


def _all(honest: list[HonestProcess], command: str) -> list[dict[str, Any]]:
    for each in honest:
        each.ask(command)
    return [each.answer() for each in honest]


def main() -> int:
    """The command line; 1 if a bound is broken."""
    parser = argparse.ArgumentParser(
        prog="make attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="this attack; may be given again")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each one lasts (%(default)g)")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args()
    known = {attack.name: attack for attack in ATTACKS}
    if unknown := set(options.only or ()) - known.keys():
        parser.error(f"no attack {', '.join(sorted(unknown))}: --list shows those that there are")
    if options.list:
        for attack in ATTACKS:
            print(f"{attack.name:20} {attack.what}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what it has started
    print(HEAD, flush=True)
    begun_s, broken, most_delay_ms = time.monotonic(), 0, math.inf
    for attack in (BASELINE, *(attack for attack in ATTACKS if attack.name in (options.only or known))):
        if time.monotonic() - begun_s > _MOST_S:
            print(f"{attack.name:20}  not run: the time for all of them is over", flush=True)
            broken += 1
            continue
        with tempfile.TemporaryDirectory(prefix="esper-attack-", ignore_cleanup_errors=True) as folder:
            try:
                row = run(attack, options.seconds, Path(folder), most_delay_ms, _TURN_MS)
            except GatewayEnded as error:
                print(f"{attack.name:20}  {error}", flush=True)
                broken += 1
                continue
        print(row.line(), flush=True)
        if attack is BASELINE:
            most_delay_ms = max(_DELAY_MS, _TIMES * row.delays_ms[1])
        broken += bool(row.faults)
    print(f"{broken} broken" if broken else "all held")
    return int(broken > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
