"""Which addresses of the web may be asked: https, hosts that the user allows, and machines that anybody can reach.

A catalog's addresses come from a spreadsheet. Whoever wrote it must not be able to make this machine ask for what only this
machine can reach: a cloud's metadata service, a router, a database next door.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from millicent.catalog.rows import hide_query
from millicent.errors import InputError, MachineError

Resolve = Callable[[str, int, float], list[str]]
_TEREDO, _SIX_TO_FOUR = ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


@dataclass(frozen=True, slots=True)
class Target:
    """host: in lower-case ASCII. path: with the query, as it is sent. shown: the address without what may be secret."""

    host: str
    port: int
    path: str
    shown: str


def parse_target(url: str, allowed_hosts: frozenset[str]) -> Target:
    """Raises InputError for another scheme than https, a user or password, a host or port that is not among those allowed.

    allowed_hosts: names as "cdn.example.com", for port 443, or "cdn.example.com:8443"; each exactly, with no subdomains.
    """
    shown = hide_query(url)
    try:
        if not url.isprintable() or " " in url:
            raise ValueError("it has a space or a control character")
        parts = urlsplit(url)
        port = 443 if parts.port is None else parts.port
        host = as_host(parts.hostname or "")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        sent = _quote(path)
    except ValueError as error:  # UnicodeError is one of its kinds
        raise InputError(f"The address {shown} cannot be read: {error}.", "Correct it.") from error
    if parts.scheme != "https":
        raise InputError(f"The address {shown} has the scheme {parts.scheme or 'of none'}; only https is fetched.", "Use https.")
    if parts.username is not None or parts.password is not None:
        raise InputError(f"The address {shown} has a user or a password in it.", "Use an address that needs none.")
    if not host:
        raise InputError(f"The address {shown} has no host.", "Correct it.")
    if (host if port == 443 else f"{host}:{port}") not in normalize_hosts(allowed_hosts):
        name = host if port == 443 else f"{host}:{port}"
        raise InputError(f"{shown} is at {name}, which is not allowed.", f"Add --allow-host {name} if you trust it.")
    return Target(host, port, sent, shown)


def as_host(name: str) -> str:
    """A host's name as it is compared and sent: lower case, international names in their ASCII form, no dot at the end."""
    name = name.rstrip(".").lower()
    return name if name.isascii() else name.encode("idna").decode()


@functools.lru_cache(maxsize=16)
def normalize_hosts(hosts: frozenset[str]) -> frozenset[str]:
    """Allowed hosts as `parse_target` compares them. Raises InputError for one that is an address or a pattern."""
    return frozenset(map(_normalize_host, hosts))


def _normalize_host(host: str) -> str:
    if "/" in host or "*" in host or "@" in host or not host.strip():
        raise InputError(f"The allowed host {host!r} is no host's name.", "Give a name as cdn.example.com, without scheme or *.")
    name, colon, port = host.strip().rpartition(":")
    if not colon or "]" in port:  # no port, or an IPv6 address in brackets
        return as_host(host.strip().strip("[]"))
    return as_host(name.strip("[]")) + ("" if port == "443" else f":{port}")


def _quote(path: str) -> str:
    """Letters beyond ASCII as browsers send them; what is quoted already stays."""
    return path if path.isascii() else "".join(char if char.isascii() else _percent(char) for char in path)


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode())


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody on the internet may be asked at.

    Not: loopback, private, link-local, shared, multicast, reserved; nor IPv6 forms that carry an IPv4 address (mapped, NAT64,
    6to4, Teredo), which a translator may turn into any of them.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast and not ip.is_reserved
    return ip in _GLOBAL_UNICAST and ip.is_global and ip not in _TEREDO and ip not in _SIX_TO_FOUR


def resolve(host: str, port: int, limit_s: float) -> list[str]:
    """The IP addresses of a host, in the system's order. Raises MachineError where none comes, or not in time."""
    found: list[str] = []
    failed: list[OSError] = []

    def ask() -> None:
        try:
            found.extend(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except (OSError, UnicodeError) as error:
            failed.append(error if isinstance(error, OSError) else OSError(str(error)))

    # the system's resolver knows no time limit
    asking = threading.Thread(target=ask, daemon=True, name="resolve")
    asking.start()
    asking.join(limit_s)
    if found:
        return found
    why = str(failed[0].strerror or failed[0]) if failed else f"no answer in {limit_s:.0f} s"
    raise MachineError(f"The host {host} cannot be found: {why}.", "Check the address and the network.")
