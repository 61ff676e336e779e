"""Waits for the marked run in Prometheus, and compares it with what was sent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import requests

from esper_otel.check.differences import differences, of_end, of_times, steps_in_words
from esper_otel.check.marked_run import BY_NAME, DIES, ENDED, FIRST_STEP, OUTCOME, RANKS, Key, MarkedRun
from esper_otel.check.stages import QUIET_S, CheckStage, Difference, ReadBack
from esper_otel.schema import SEED_RETIRED
from esper_otel.schema.prometheus import prometheus_name

_LOSS, _LATENCY = "loss", "step_latency_ms"
_AGAIN_S = 0.2
_REQUEST_S = 5.0
_MS = 10**6

Samples = Mapping[Key, Mapping[int, float]]


def at_prometheus(back: ReadBack, marked: MarkedRun, sent_s: float, *, has_it: bool) -> CheckStage:
    """Checks how the run arrived in Prometheus; ``has_it`` says whether it arrived at the gateway."""
    where = f"Prometheus {back.prometheus}"
    sent = marked.samples()
    found: list[Any] = []
    try:
        found = _found(back, marked.run_id, sent, sent_s + back.timeout_s)
        delay_s = time.monotonic() - sent_s
        fault = next(_faults(sent, found), None)
    except (requests.RequestException, ValueError, KeyError) as error:
        return CheckStage(where, False, f"it cannot be queried: {error}", "give the address of Prometheus' own page")
    if not found:
        between = "the collector and Prometheus" if has_it else "the endpoint and Prometheus"
        return CheckStage(
            where,
            False,
            f"nothing of run {marked.run_id} arrived within {back.timeout_s:g} s; look between {between}",
            "Prometheus must be started with --web.enable-otlp-receiver, or scrape the collector; their logs say more",
        )
    if fault is not None:
        return CheckStage(where, False, *fault)
    return CheckStage(where, True, _praise(sent, found, delay_s))


def end_at_prometheus(back: ReadBack, marked: MarkedRun) -> Difference | str:
    """Checks that the run's end arrived.

    Returns:
        What is different, or a sentence about what arrived.
    """
    deadline_s = time.monotonic() + back.timeout_s
    while True:
        series = _series(back.prometheus or "", marked.run_id)
        name = prometheus_name(BY_NAME[ENDED], suffixes=_has_suffixes(series))
        ends = [each for each in series if each["metric"]["__name__"] == name]
        others = {each["metric"].get("outcome", "") for each in ends} - {OUTCOME}
        if not others and {key.rank for key in _samples(ends)} == {*range(RANKS)}:
            return "the run's end arrived"
        if time.monotonic() + _AGAIN_S > deadline_s:
            return of_end(others)
        time.sleep(_AGAIN_S)


def _praise(sent: Samples, found: list[Any], delay_s: float) -> str:
    came = _samples(found)
    labels = next(series["metric"] for series in found if series["metric"]["__name__"] == _LOSS)
    count = len({key.metric for key in came})
    message = f"{count} metrics arrived after {delay_s:.2f} s, NaN as NaN, missing values still missing"
    message += (
        "; names with units, as rules and dashboards of `stock` expect"
        if _has_suffixes(found)
        else "; names as in the catalogue"
    )
    message += (
        ", labels run_id and rank" if {"run_id", "rank"} <= labels.keys() else ", the run only in the label instance"
    )
    if _is_scraped(sent, came):
        message += "; scraped: the newest value at the time of the scrape, not every step"
    return message


def _found(back: ReadBack, run_id: str, sent: Samples, deadline_s: float) -> list[Any]:
    """Returns the series of the run, once all have arrived unchanged or nothing new arrives."""
    found: list[Any] = []
    quiet_from_s = deadline_s
    while True:
        before, found = found, _series(back.prometheus or "", run_id)
        if found and next(_faults(sent, found), None) is None:
            return found
        if found and (before != found and not _is_scraped(sent, _samples(found))):
            quiet_from_s = time.monotonic()
        if time.monotonic() + _AGAIN_S >= min(deadline_s, quiet_from_s + QUIET_S):
            return found
        time.sleep(_AGAIN_S)


def _series(address: str, run_id: str) -> list[Any]:
    """Returns every series of the run with its samples, found by the label ``run_id`` or else ``instance``."""
    for selector in (f'{{run_id="{run_id}"}}', f'{{instance=~"{run_id}/[0-9]+"}}'):
        answer = requests.get(
            f"{address.rstrip('/')}/api/v1/query", params={"query": f"{selector}[10m]"}, timeout=_REQUEST_S
        )
        answer.raise_for_status()
        result: list[Any] = answer.json()["data"]["result"]
        found = [series for series in result if series["metric"]["__name__"] != "target_info"]
        if found:
            return found
    return []


def _has_suffixes(found: list[Any]) -> bool:
    name = prometheus_name(BY_NAME[_LATENCY], suffixes=True)
    return any(series["metric"]["__name__"] == name for series in found)


def _samples(found: list[Any]) -> Samples:
    """Returns the samples by time in milliseconds, with the catalogue's name for each known metric."""
    has_suffixes = _has_suffixes(found)
    ours = {prometheus_name(metric, suffixes=has_suffixes): name for name, metric in BY_NAME.items()}
    samples: dict[Key, dict[int, float]] = {}
    for series in found:
        labels = series["metric"]
        rank = labels.get("rank", labels.get("instance", "").rpartition("/")[2])
        name = ours.get(labels["__name__"], labels["__name__"])
        key = Key(name, int(rank) if rank.isdecimal() else -1, labels.get("seed_id", ""))
        samples.setdefault(key, {}).update({round(time_s * 1000): float(value) for time_s, value in series["values"]})
    return samples


def _is_scraped(sent: Samples, came: Samples) -> bool:
    """Whether the samples come from scrapes, whose times are later than the last step."""
    newest = max(time_ms for of_series in sent.values() for time_ms in of_series)
    return all(time_ms > newest for of_series in came.values() for time_ms in of_series)


def _faults(sent: Samples, found: list[Any]) -> Iterator[Difference]:
    """Yields differences from what was sent, with possible causes. Only the first is reliable.

    Later checks assume that the earlier ones found no difference.
    """
    came = _samples(found)
    names = {key.metric for key in came}
    if _LOSS not in names:
        yield Difference(
            f"there is no {_LOSS}; there are {', '.join(sorted(names))}", "it was renamed or filtered on the way"
        )
    if _LATENCY not in names:
        near = (
            ", ".join(name for name in sorted(names) if "latency" in name and "seed" not in name) or "nothing like it"
        )
        yield Difference(f"{_LATENCY} was renamed on the way: there is {near}", "see the translation of names there")
    is_scraped = _is_scraped(sent, came)
    if not is_scraped:  # checked first: if two steps get the same time, Prometheus may refuse a whole rank
        newest_ms = max(ms for of_series in sent.values() for ms in of_series)
        yield from of_times(_times(sent, newest_ms), _times(came, newest_ms))
    yield from _of_ranks({key.rank for key in sent}, {key.rank for key in came})
    if is_scraped:
        latest = {key: max(of_series.items())[1] for key, of_series in sent.items() if _lasts(key)}
        yield from differences(
            _named(latest), _named({k: max(v.items())[1] for k, v in came.items() if _lasts(k)}), "it"
        )
        return
    yield from _of_steps(sent, came)


def _times(samples: Samples, newest_ms: int) -> set[tuple[int, int]]:
    """Returns the times of steps in nanoseconds, all under rank 0, without the times at which series end."""
    return {(0, ms * _MS) for of_series in samples.values() for ms in of_series if ms <= newest_ms}


def _of_ranks(sent: set[int], came: set[int]) -> Iterator[Difference]:
    if not sent <= came:
        said = ", ".join("unknown" if rank < 0 else str(rank) for rank in sorted(came))
        yield Difference(
            f"steps of ranks 0 and 1 were sent, but only those of rank {said} arrived",
            "a processor on the way deletes or changes esper.rank or service.instance.id of the Resource",
        )


def _of_steps(sent: Samples, came: Samples) -> Iterator[Difference]:
    """Yields differences for the case that Prometheus received every step."""
    times = {(key.rank, time_ms) for key, of_series in sent.items() for time_ms in of_series}
    newest = max(time_ms for _, time_ms in times)
    inside = {(key.rank, time_ms) for key, of_series in came.items() for time_ms in of_series if time_ms <= newest}
    yield from of_times({(rank, ms * _MS) for rank, ms in times}, {(rank, ms * _MS) for rank, ms in inside})
    for rank in sorted({rank for rank, _ in times}):
        of_rank = sorted(time_ms for its, time_ms in times if its == rank)
        lost = [FIRST_STEP + place for place, time_ms in enumerate(of_rank) if (rank, time_ms) not in inside]
        if lost:
            what = f"{len(lost)} of {len(of_rank)} steps of rank {rank} did not arrive: {steps_in_words(lost)}"
            yield Difference(
                what, "something on the way drops points, or keeps the newest only: an interval processor, a sampler"
            )
        for place, time_ms in enumerate(of_rank):
            yield from differences(
                _named(_at(sent, rank, time_ms)), _named(_at(came, rank, time_ms)), f"step {FIRST_STEP + place}"
            )


def _at(samples: Samples, rank: int, time_ms: int) -> dict[Key, float]:
    return {key: of_series[time_ms] for key, of_series in samples.items() if key.rank == rank and time_ms in of_series}


def _lasts(key: Key) -> bool:
    """Whether the series can still be scraped after the last step; the series of a retired seed have ended."""
    return key.seed != DIES and key.metric != SEED_RETIRED.name


def _named(values: Mapping[Key, float]) -> dict[str, float | str]:
    return {f"{key.metric} of seed {key.seed}" if key.seed else key.metric: value for key, value in values.items()}
