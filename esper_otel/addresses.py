"""Checks whether an address belongs to this machine, judging by its text alone."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from urllib.parse import urlsplit

# A URL's scheme, or the scheme of a gRPC target with the authority that may follow it.
_SCHEME = re.compile(r"^(?:https?://|(?:dns|ipv4|ipv6):(?://[^/]*/)?)")


def is_on_this_machine(address: str) -> bool:
    """Whether ``host:port``, a URL or a gRPC target is an address of this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    with contextlib.suppress(ValueError):
        host = urlsplit(f"//{_SCHEME.sub('', address)}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False
