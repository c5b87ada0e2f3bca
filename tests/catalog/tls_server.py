"""An https server on 127.0.0.1 that says exactly the bytes that a test wants, under names that only the test's resolver knows."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from millicent.catalog.addresses import is_public
from millicent.catalog.web import Network

HOST = "cdn.example.com"
Handler = Callable[[ssl.SSLSocket, str], None]


def make_certificate(folder: Path, *names: str) -> Path:
    """A self-signed certificate for these names, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return path


@dataclass
class TlsServer:
    """answers: by path, what is sent. requests: the head of each that came."""

    port: int
    certificate: Path
    answers: dict[str, Handler] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    addresses: dict[str, list[str]] = field(default_factory=lambda: {HOST: ["127.0.0.1"]})
    asked: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{HOST}:{self.port}"

    def url(self, path: str) -> str:
        return f"https://{self.name}{path}"

    def says(self, path: str, *pieces: bytes) -> str:
        def answer(connection: ssl.SSLSocket, _: str) -> None:
            connection.sendall(b"".join(pieces))

        self.answers[path] = answer
        return self.url(path)

    def network(self) -> Network:
        """The internet of a test: its own names, this machine as the one public place besides the real ones."""

        def resolve(host: str, port: int, limit_s: float) -> list[str]:
            self.asked.append(host)
            return self.addresses[host]

        return Network(resolve, lambda address: address == "127.0.0.1" or is_public(address), self._trust)

    def _trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))


@contextmanager
def serve_tls(folder: Path, *names: str) -> Iterator[TlsServer]:
    certificate = make_certificate(folder, *(names or (HOST, "other.example.com")))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    listener = socket.create_server(("127.0.0.1", 0))
    server = TlsServer(listener.getsockname()[1], certificate)
    threads: list[threading.Thread] = []

    def accept() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=_serve, args=(server, context, plain))
            thread.start()
            threads.append(thread)

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (accepting, *threads):
            thread.join(5)


def _serve(server: TlsServer, context: ssl.SSLContext, plain: socket.socket) -> None:
    # clients of these tests leave in the middle
    with plain, suppress(OSError):
        plain.settimeout(5)
        with context.wrap_socket(plain, server_side=True) as connection:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += connection.recv(4096) or b"\r\n\r\n"
            text = head.decode("latin-1")
            server.requests.append(text)
            path = text.split(" ")[1]
            server.answers[path](connection, text)
            with suppress(OSError):
                connection.unwrap()
