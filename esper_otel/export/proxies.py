"""Finds the proxy on the way to an endpoint, by the same environment variables as gRPC and ``requests``."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import urlsplit

from esper_otel.export.endpoint import Endpoint

_OF_GRPC = ("grpc_proxy", "https_proxy", "http_proxy")
_NOT_OF_GRPC = ("no_grpc_proxy", "no_proxy")


class Proxy(NamedTuple):
    """A proxy, without its credentials.

    Attributes:
        variable: the environment variable that names it.
        address: its host and port, or "without a host".
        is_used: False if gRPC ignores it because it is not an ``http://host:port``.
    """

    variable: str
    address: str
    is_used: bool = True

    def __str__(self) -> str:
        return f"{self.address} ({self.variable})"


def proxy_of(endpoint: Endpoint) -> Proxy | None:
    """Returns the proxy on the way to the endpoint; None for a direct connection."""
    return _of_grpc(endpoint.address, os.environ) if endpoint.protocol == "grpc" else _of_requests(endpoint.address)


def way_of(endpoint: Endpoint) -> str:
    """Returns a phrase that names the proxy, for use after the endpoint's name; empty without a proxy."""
    proxy = proxy_of(endpoint)
    return f" through the proxy {proxy}" if proxy is not None and proxy.is_used else ""


def _proxy(variable: str, url: str, *, is_used: bool = True) -> Proxy:
    scheme, separator, rest = url.partition("://")
    # A password may contain "@" and other separators; it ends at the last "@".
    address = re.split("[/?#]", (rest if separator else scheme).rpartition("@")[2], maxsplit=1)[0]
    return Proxy(variable, address or "without a host", is_used)


def _of_grpc(target: str, environ: Mapping[str, str]) -> Proxy | None:
    """Follows gRPC's http_proxy_mapper.cc: names in lower case; the first that is set counts, even if it is empty."""
    variable = next((name for name in _OF_GRPC if name in environ), None)
    if variable is None or not environ[variable] or target.startswith("unix:"):
        return None
    without = next((environ[name] for name in _NOT_OF_GRPC if name in environ), "")
    host = _host(target)
    if any(_is_among(host, entry.strip()) for entry in without.split(",") if entry.strip()):
        return None
    is_used = re.match(r"[hH][tT][tT][pP]://[^/?#]", environ[variable]) is not None
    return _proxy(variable, environ[variable], is_used=is_used)


def _host(target: str) -> str:
    """Returns the host in a gRPC target name, by gRPC's own rules."""
    path = re.sub(r"^(?:(?:dns|ipv4|ipv6):(?://[^/]*/)?|unix-abstract:)", "", target).removeprefix("/")
    if path.startswith("["):
        return path[1:].partition("]")[0]
    return path.partition(":")[0] if path.count(":") == 1 else path


def _is_among(host: str, entry: str) -> bool:
    """Whether an entry of ``no_proxy`` makes gRPC skip the proxy: it is the host, its domain, or its network.

    Older versions of gRPC, such as 1.72, do not compare domains and skip the proxy for every host whose name ends with
    the entry.
    """
    address, _, bits = entry.partition("/")
    with suppress(ValueError):
        mine, theirs = ipaddress.ip_address(host), ipaddress.ip_address(address)
        bits = str(min(int(bits), theirs.max_prefixlen))  # a longer prefix counts as the full length
        if mine in ipaddress.ip_network(f"{address}/{bits}", strict=False):
            return True
    domain = entry.lower().removeprefix(".")
    return f".{host.lower()}".endswith(f".{domain}")


def _of_requests(url: str) -> Proxy | None:
    from requests.utils import get_environ_proxies, select_proxy  # imported late: gRPC does not need it

    proxies = get_environ_proxies(url)
    found = select_proxy(url, proxies)
    if not found:
        return None
    scheme = urlsplit(url).scheme
    name = f"{scheme if proxies.get(scheme) == found else 'all'}_proxy"
    # Names in lower case take precedence.
    variables = [each for each, text in sorted(os.environ.items(), reverse=True) if each.lower() == name and text]
    return _proxy(variables[0] if variables else name, found)
