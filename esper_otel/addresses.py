"""Addresses: whether what is sent to one stays on this machine, by its name alone."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from urllib.parse import urlsplit

# A URL's scheme, or that of gRPC's own target names with the authority that may follow.
_SCHEME = re.compile(r"^(?:https?://|(?:dns|ipv4|ipv6):(?://[^/]*/)?)")


def is_on_this_machine(address: str) -> bool:
    """Whether ``host:port``, a URL or one of gRPC's target names is of this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    with contextlib.suppress(ValueError):
        host = urlsplit(f"//{_SCHEME.sub('', address)}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False
