"""The answer to the question where a run's hours went, as a message."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from esper_otel.gateway.hours.file import AttemptRank
from esper_otel.hours.account import Account
from esper_otel.hours.bar import Bar, RunHours
from esper_otel.hours.whole import account_text
from esper_otel.pull.messages import Bar as BarMessage
from esper_otel.pull.messages import HoursResponse

NO_ACCOUNTS: Mapping[AttemptRank, Account] = MappingProxyType({})


def hours_message(hours: RunHours, accounts: Mapping[AttemptRank, Account] = NO_ACCOUNTS) -> HoursResponse:
    """Returns the message."""
    response = HoursResponse()
    _fill(response.run, hours.run)
    for rank, bar in hours.ranks.items():
        _fill(response.ranks.add(rank=rank).bar, bar)
    for phase in hours.phases:
        response.phases.add(**phase._asdict())
    for writer, account in accounts.items():
        response.accounts.add(rank=writer.rank, attempt=writer.attempt, account=account_text(account))
    return response


def _fill(message: BarMessage, bar: Bar) -> None:
    message.start_unix_ns, message.end_unix_ns, message.attempts = bar.start_unix_ns, bar.end_unix_ns, bar.attempts
    for name, spent_ms in bar.parts.items():
        message.parts.add(name=name, spent_ms=spent_ms)
