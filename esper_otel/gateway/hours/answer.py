"""The answer to the question where a run's hours went, as a message."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from types import MappingProxyType

from esper_otel.gateway.hours.file import AttemptRank
from esper_otel.hours.account import Account
from esper_otel.hours.bar import Bar, RunHours
from esper_otel.hours.whole import account_text
from esper_otel.pull.messages import Bar as BarMessage
from esper_otel.pull.messages import HoursResponse

NO_ACCOUNTS: Mapping[AttemptRank, Account] = MappingProxyType({})
_MOST_TOLD = 128 * 1024  # of the details of all accounts together: about 14 MB


def hours_message(
    hours: RunHours, accounts: Mapping[AttemptRank, Account] = NO_ACCOUNTS
) -> Generator[None, None, HoursResponse]:
    """Returns the message, in parts. The more accounts there are, the fewer details are told of each."""
    response = HoursResponse()
    _fill(response.run, hours.run)
    for rank, bar in hours.ranks.items():
        _fill(response.ranks.add(rank=rank).bar, bar)
        yield
    for phase in hours.phases:
        response.phases.add(**phase._asdict())
    most = _MOST_TOLD // max(len(accounts), 1)
    for writer, account in accounts.items():
        yield
        response.accounts.add(rank=writer.rank, attempt=writer.attempt, account=account_text(account, most))
    return response


def _fill(message: BarMessage, bar: Bar) -> None:
    message.start_unix_ns, message.end_unix_ns, message.attempts = bar.start_unix_ns, bar.end_unix_ns, bar.attempts
    for name, spent_ms in bar.parts.items():
        message.parts.add(name=name, spent_ms=spent_ms)
