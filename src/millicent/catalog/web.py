"""One file from the web, within limits of size and time, from the very address that was found to be public.

The host's name is resolved once, what comes is checked, and the connection goes to that address by number: a name that
changes its mind between check and connection gains nothing. TLS still verifies the certificate against the name. Each redirect
is treated as a new address. Proxies and cookies are not used, and nothing is decompressed.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urljoin

from millicent.catalog.addresses import Resolve, Target, is_public, parse_target, resolve
from millicent.errors import InputError, InputNotFoundError, MachineError

CHUNK_BYTES = 1 << 16
REDIRECTS = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429)  # and 500 and up: worth another try
_HEADERS = {"User-Agent": "millicent", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """max_bytes: of one file. connect_s: for each address that is tried. total_s: for everything, from name to last byte."""

    max_bytes: int = 50_000_000
    connect_s: float = 10.0
    total_s: float = 60.0
    max_redirects: int = 5


@functools.cache
def default_tls() -> ssl.SSLContext:
    """Certificates are verified, against the name, by the system's authorities."""
    return ssl.create_default_context()


@dataclass(frozen=True, slots=True)
class Network:
    """How names become addresses, which of these may be asked, and whom TLS trusts: the internet's, but in tests."""

    resolve: Resolve = resolve
    is_public: Callable[[str], bool] = is_public
    tls: Callable[[], ssl.SSLContext] = default_tls


INTERNET = Network()


def fetch(url: str, limits: FetchLimits, allowed_hosts: frozenset[str], network: Network = INTERNET) -> bytes:
    """The bytes at an https address.

    Raises InputError for an address that may not be asked, a redirect to one, too many bytes, and what a server refuses for good;
    InputNotFoundError where it has no such file; MachineError for what may pass: no connection, no time left, a server's trouble.
    """
    deadline = time.monotonic() + limits.total_s
    location = url
    for _ in range(limits.max_redirects + 1):
        target = parse_target(location, allowed_hosts)
        try:
            answer = _ask(target, limits, network, deadline)
        except TimeoutError as error:
            raise MachineError(
                f"{target.shown} did not come within {limits.total_s:g} s.", "Try again later, or allow more time."
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise InputError(
                f"The certificate of {target.host} does not hold: {error.verify_message}.", "Use a host whose does."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise MachineError(f"{target.shown} cannot be fetched: {why}.", "Try again later.") from error
        if isinstance(answer, bytes):
            return answer
        location = urljoin(location, answer.location)
    raise InputError(f"{url} is redirected more than {limits.max_redirects} times.", "Give the address where it ends.")


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


def _ask(target: Target, limits: FetchLimits, network: Network, deadline: float) -> bytes | _Redirect:
    """One request. Raises OSError and HTTPException besides what `fetch` raises."""
    raw = _connect(target, limits, network, deadline)
    with (
        raw,
        network.tls().wrap_socket(
            raw, server_hostname=target.host, do_handshake_on_connect=False, suppress_ragged_eofs=False
        ) as tls,
    ):
        tls.settimeout(_left_s(deadline))
        tls.do_handshake()
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = _TimedSocket(tls, deadline)  # all that http.client uses of a socket
        # it would write the port behind the name: servers expect it only where it is not https's own
        host = f"[{target.host}]" if ":" in target.host else target.host
        connection.request(
            "GET", target.path, headers={"Host": host if target.port == 443 else f"{host}:{target.port}", **_HEADERS}
        )
        with connection.getresponse() as response:
            if response.status in REDIRECTS:
                return _Redirect(_location(response, target))
            _check_status(response.status, target)
            return _read_body(response, target, limits)


def _connect(target: Target, limits: FetchLimits, network: Network, deadline: float) -> socket.socket:
    """A connection to one of the host's addresses, all of which were found to be public."""
    addresses = network.resolve(target.host, target.port, min(limits.connect_s, _left_s(deadline)))
    # one that is not public condemns them all: who mixes them is trying something
    if private := [address for address in addresses if not network.is_public(address)]:
        raise InputError(
            f"{target.shown} is at {private[0]}, which is no public address.", "Give the picture as a file, or at a public address."
        )
    failure: OSError = ConnectionError("the host has no address")
    for address in addresses:
        try:
            connected = socket.create_connection((address, target.port), min(limits.connect_s, _left_s(deadline)))
        except OSError as error:
            failure = ConnectionError(f"{address} does not answer ({error.strerror or 'no time left'})")
            continue
        assert network.is_public(connected.getpeername()[0]), "an address by number is not resolved again"
        return connected
    raise failure


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


class _TimedSocket:
    """What http.client needs of a socket, with one deadline over all that is read: a socket's own starts again with each piece."""

    def __init__(self, tls: ssl.SSLSocket, deadline: float) -> None:
        self._tls, self._deadline = tls, deadline

    def sendall(self, data: bytes) -> None:
        self._tls.settimeout(_left_s(self._deadline))
        self._tls.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(_TimedReader(self._tls, self._deadline), CHUNK_BYTES)

    def close(self) -> None:
        """The socket is closed by whoever opened it."""


class _TimedReader(io.RawIOBase):
    def __init__(self, tls: ssl.SSLSocket, deadline: float) -> None:
        self._tls, self._deadline = tls, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        self._tls.settimeout(_left_s(self._deadline))
        return self._tls.recv_into(buffer)  # type: ignore[arg-type]  # RawIOBase's own type for a buffer is not in typing


def _location(response: http.client.HTTPResponse, target: Target) -> str:
    location = response.headers.get("Location")
    if not location:
        raise InputError(f"{target.shown} is redirected to nowhere (status {response.status}).", "Check the address.")
    return location


def _check_status(status: int, target: Target) -> None:
    if status in (404, 410):
        raise InputNotFoundError(f"There is nothing at {target.shown} (status {status}).", "Check the address.")
    if status in PASSING or status >= 500:
        raise MachineError(f"{target.shown} answers with status {status}.", "Try again later.")
    if status != 200:
        raise InputError(f"{target.shown} answers with status {status}; 200 is wanted.", "Check that anybody may read it.")


def _read_body(response: http.client.HTTPResponse, target: Target, limits: FetchLimits) -> bytes:
    if (encoding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
        raise InputError(f"{target.shown} is sent as {encoding}, which was not asked for.", "Use a server that sends it as it is.")
    if response.length is not None and response.length > limits.max_bytes:
        raise _too_large(target, limits)
    pieces, count = [], 0
    while piece := response.read1(CHUNK_BYTES):
        count += len(piece)
        if count > limits.max_bytes:
            raise _too_large(target, limits)
        pieces.append(piece)
    # read1 takes a connection that ends too early for the file's end
    if response.length:
        raise MachineError(f"{target.shown} ends early, after {count:,} bytes.", "Try again later.")
    return b"".join(pieces)


def _too_large(target: Target, limits: FetchLimits) -> InputError:
    return InputError(f"{target.shown} has more than {limits.max_bytes:,} bytes, which is the limit.", "Make it smaller first.")
