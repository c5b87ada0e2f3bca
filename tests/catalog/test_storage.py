"""Where bytes come from and go to: local files, the web behind its guard, and a store that speaks S3."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from gcs_server import serve_gcs
from moto.server import ThreadedMotoServer
from tls_server import HOST, TlsServer, serve_tls

from millicent.catalog import addresses, web
from millicent.catalog.addresses import is_public, parse_target
from millicent.catalog.manifest import Row, read_manifest
from millicent.catalog.storage import FetchLimits, exists, read_bytes, read_output, write_output
from millicent.errors import InputError, InputNotFoundError, MachineError, MissingExtraError, OutputError

OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
LIMITS = FetchLimits(max_bytes=100_000, total_s=5, connect_s=2)
NONE = frozenset[str]()

Get = Callable[..., bytes]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TlsServer]:
    with serve_tls(tmp_path) as server:
        yield server


@pytest.fixture
def get(server: TlsServer) -> Get:
    def fetch(url: str, limits: FetchLimits = LIMITS, hosts: tuple[str, ...] = ()) -> bytes:
        return read_bytes(url, limits, frozenset(hosts or (server.name,)), server.network())

    return fetch


def redirect(to: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


def test_a_file_from_the_web(server: TlsServer, get: Get) -> None:
    url = server.says("/a%20b.png?v=1", OK, b"Content-Length: 7\r\n\r\n", b"picture")
    assert get(url + "#fragment") == b"picture"
    (head,) = server.requests
    assert f"\r\nHost: {server.name}\r\n" in head
    assert "Accept-Encoding: identity" in head
    assert "Cookie" not in head


@pytest.mark.parametrize("coding", ["length", "chunked", "until the end"])
def test_bodies_of_every_kind(server: TlsServer, get: Get, coding: str) -> None:
    body = bytes(range(256)) * 300
    pieces = {
        "length": (f"Content-Length: {len(body)}\r\n\r\n".encode(), body),
        "chunked": (
            b"Transfer-Encoding: chunked\r\n\r\n",
            b"10000\r\n",
            body[:65536],
            b"\r\n2c00\r\n",
            body[65536:],
            b"\r\n0\r\n\r\n",
        ),
        "until the end": (b"\r\n", body),
    }
    assert get(server.says("/a", OK, *pieces[coding])) == body


def test_a_path_beyond_ascii_and_a_host_in_capitals(server: TlsServer, get: Get) -> None:
    server.says("/gr%C3%B6%C3%9Fe.png", OK, b"Content-Length: 1\r\n\r\nx")
    assert get(f"HTTPS://CDN.Example.com.:{server.port}/größe.png") == b"x"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://cdn.example.com/a.png", "scheme http"),
        ("file:///etc/passwd", "scheme file"),
        ("ftp://cdn.example.com/a.png", "scheme ftp"),
        ("gopher://127.0.0.1/", "scheme gopher"),
        ("https://user:secret@cdn.example.com/a.png", "user or a password"),
        ("https://user@cdn.example.com/a.png", "user or a password"),
        ("https://evil.example.com/a.png", "evil.example.com, which is not allowed"),
        ("https://cdn.example.com.evil.com/a.png", "not allowed"),
        ("https://sub.cdn.example.com/a.png", "not allowed"),
        ("https://cdn.example.com:8443/a.png", "cdn.example.com:8443, which is not allowed"),
        ("https://cdn.example.com:99999/a.png", "cannot be read"),
        ("https://cdn.example.com\\@evil.com/a.png", "user or a password"),
        ("https://evil.com#@cdn.example.com/", "not allowed"),
        ("https:///a.png", "no host"),
        ("https://cdn.example.com/a\r\nHost: evil", "cannot be read"),
        ("https://[::1/a.png", "cannot be read"),
    ],
)
def test_addresses_that_are_not_asked(url: str, why: str) -> None:
    def resolve(*_: object) -> list[str]:
        raise AssertionError("it must not come to that")

    with pytest.raises(InputError, match=why) as caught:
        read_bytes(url, LIMITS, frozenset({HOST}), web.Network(resolve))
    assert "secret" not in caught.value.message


def test_hosts_are_allowed_one_by_one() -> None:
    assert parse_target("https://CDN.example.com/a", frozenset({"cdn.Example.com."})).host == HOST
    assert parse_target("https://münchen.example/a", frozenset({"xn--mnchen-3ya.example"})).host == "xn--mnchen-3ya.example"
    assert parse_target("https://cdn.example.com:443/a", frozenset({HOST})).port == 443
    for pattern in ("*.example.com", "https://cdn.example.com", ""):
        with pytest.raises(InputError, match="no host's name"):
            parse_target("https://cdn.example.com/a", frozenset({pattern}))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::1", "2001:db8::1", "localhost", "",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "151.101.1.140", "2606:4700::6810:84e5", "2a00:1450:4001:80b::200e"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


def test_a_name_that_leads_inside_is_not_asked(server: TlsServer, get: Get) -> None:
    url = server.says("/a", OK, b"\r\n")
    for found in (["10.0.0.1"], ["8.8.8.8", "169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"]):
        server.addresses[HOST] = found
        with pytest.raises(InputError, match="which is no public address"):
            get(url)
    assert server.requests == []


def test_an_allowed_address_by_number_must_be_public_too() -> None:
    with pytest.raises(InputError, match="no public address"):
        read_bytes("https://127.0.0.1/a", LIMITS, frozenset({"127.0.0.1"}))
    with pytest.raises(InputError, match="no public address"):
        read_bytes("https://localhost/a", LIMITS, frozenset({"localhost"}))
    with pytest.raises(InputError, match="no public address"):
        read_bytes("https://[::1]/a", LIMITS, frozenset({"[::1]"}))


def test_the_connection_goes_to_the_address_that_was_checked(server: TlsServer, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    class Changing(dict[str, list[str]]):
        def __getitem__(self, host: str) -> list[str]:
            return ["127.0.0.1"] if server.asked == [host] else ["10.0.0.1"]

    server.addresses = Changing()
    connected: list[Any] = []
    real = socket.create_connection

    def create(address: tuple[str, int], *args: Any) -> socket.socket:
        connected.append(address)
        return real(address, *args)

    monkeypatch.setattr(socket, "create_connection", create)
    assert get(server.says("/a", OK, b"Content-Length: 1\r\n\r\nx")) == b"x"
    assert server.asked == [HOST]
    assert connected == [("127.0.0.1", server.port)]
    with pytest.raises(InputError, match="no public address"):
        get(server.url("/a"))
    assert len(connected) == 1


def test_the_next_address_is_tried(server: TlsServer, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    server.addresses[HOST] = ["8.8.8.8", "127.0.0.1"]
    real = socket.create_connection

    def create(address: tuple[str, int], *args: Any) -> socket.socket:
        if address[0] == "8.8.8.8":
            raise TimeoutError("timed out")
        return real(address, *args)

    monkeypatch.setattr(socket, "create_connection", create)
    assert get(server.says("/a", OK, b"Content-Length: 1\r\n\r\nx")) == b"x"


def test_redirects(server: TlsServer, get: Get) -> None:
    server.says("/end", OK, b"Content-Length: 1\r\n\r\nx")
    for number, status in enumerate((301, 302, 303, 307, 308)):
        server.says(f"/{number + 1}", redirect(f"/{number}" if number else server.url("/end"), status))
    assert get(server.url("/5")) == b"x"
    server.says("/6", redirect("/5"))
    with pytest.raises(InputError, match="redirected more than 5 times"):
        get(server.url("/6"))


@pytest.mark.parametrize(
    ("to", "why"),
    [
        ("http://cdn.example.com/a", "only https is fetched"),
        ("//evil.example.com/a", "evil.example.com, which is not allowed"),
        ("https://169.254.169.254/latest/meta-data", "169.254.169.254, which is not allowed"),
        ("file:///etc/passwd", "only https"),
        ("https://user:x@cdn.example.com/", "user or a password"),
        ("https://other.example.com/a", "at 10.0.0.1, which is no public address"),
    ],
)
def test_a_redirect_is_checked_as_an_address_is(server: TlsServer, get: Get, to: str, why: str) -> None:
    server.addresses["other.example.com"] = ["10.0.0.1"]
    with pytest.raises(InputError, match=why):
        get(server.says("/a", redirect(to)), hosts=(server.name, "other.example.com"))
    assert len(server.requests) == 1


def test_a_redirect_to_nowhere(server: TlsServer, get: Get) -> None:
    with pytest.raises(InputError, match="redirected to nowhere"):
        get(server.says("/a", b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"))


def test_a_certificate_for_another_name(tmp_path: Path) -> None:
    with (
        serve_tls(tmp_path, "wrong.example.com") as server,
        pytest.raises(InputError, match=f"certificate of {HOST} does not hold"),
    ):
        read_bytes(server.says("/a", OK, b"\r\n"), LIMITS, frozenset({server.name}), server.network())


def test_a_certificate_that_nobody_trusts(server: TlsServer) -> None:
    network = web.Network(server.network().resolve, lambda _: True)
    with pytest.raises(InputError, match="does not hold"):
        read_bytes(server.says("/a", OK, b"\r\n"), LIMITS, frozenset({server.name}), network)


def test_a_length_beyond_the_cap_is_refused_unread(server: TlsServer, get: Get) -> None:
    with pytest.raises(InputError, match="more than 100,000 bytes"):
        get(server.says("/a", OK, b"Content-Length: 100001\r\n\r\n"))


@pytest.mark.parametrize("head", [b"\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_an_endless_body_is_read_up_to_the_cap(server: TlsServer, get: Get, head: bytes) -> None:
    sent: list[int] = []

    def pour(connection: ssl.SSLSocket, _: str) -> None:
        connection.sendall(OK + head)
        piece = b"x" * 1000
        while True:
            connection.sendall(piece if head == b"\r\n" else b"3e8\r\n" + piece + b"\r\n")
            sent.append(len(piece))

    server.answers["/a"] = pour
    with pytest.raises(InputError, match="more than 100,000 bytes"):
        get(server.url("/a"))


def drip(what: bytes) -> Callable[[ssl.SSLSocket, str], None]:
    def answer(connection: ssl.SSLSocket, _: str) -> None:
        connection.sendall(what)
        for _ in range(100):
            time.sleep(0.05)
            connection.sendall(b"x")

    return answer


@pytest.mark.parametrize("start", [OK + b"Content-Length: 1000\r\n\r\n", OK + b"X-Slow: "])
def test_a_server_that_drips_is_left_in_time(server: TlsServer, get: Get, start: bytes) -> None:
    server.answers["/a"] = drip(start)
    begun = time.monotonic()
    with pytest.raises(MachineError, match=r"did not come within 0\.4 s"):
        get(server.url("/a"), FetchLimits(total_s=0.4))
    assert time.monotonic() - begun < 1.5


def test_a_server_that_never_speaks_tls(server: TlsServer, get: Get) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        name = f"{HOST}:{mute.getsockname()[1]}"
        with pytest.raises(MachineError, match="did not come within"):
            get(f"https://{name}/a", FetchLimits(total_s=0.3), (name,))


def test_nobody_listens(server: TlsServer, get: Get) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        name = f"{HOST}:{closed.getsockname()[1]}"
    with pytest.raises(MachineError, match=r"127\.0\.0\.1 does not answer"):
        get(f"https://{name}/a", hosts=(name,))


def test_a_name_that_nobody_knows_and_a_resolver_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(MachineError, match=r"cdn.example.com cannot be found: Name or service not known"):
        addresses.resolve(HOST, 443, 1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(0.5) or [])
    with pytest.raises(MachineError, match="no answer"):
        addresses.resolve(HOST, 443, 0.1)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, InputNotFoundError), (410, InputNotFoundError), (401, InputError), (403, InputError), (204, InputError),
        (206, InputError),
        (429, MachineError), (500, MachineError), (503, MachineError),
    ],
)  # fmt: skip
def test_what_a_status_means(server: TlsServer, get: Get, status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=str(status)):
        get(server.says("/a", f"HTTP/1.1 {status} Hm\r\nContent-Length: 0\r\n\r\n".encode()))


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 100\r\n\r\nshort",
        OK + b"Transfer-Encoding: chunked\r\n\r\n64\r\nshort",
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        OK + b"X: " + b"x" * 70_000 + b"\r\n\r\n",
    ],
)
def test_an_answer_that_breaks_off_or_is_none_may_pass(server: TlsServer, get: Get, answer: bytes) -> None:
    with pytest.raises(MachineError):
        get(server.says("/a", answer))


def test_a_connection_that_is_cut_is_no_end_of_a_file(server: TlsServer, get: Get) -> None:
    def cut(connection: ssl.SSLSocket, _: str) -> None:
        connection.sendall(OK + b"\r\nhalf a pict")
        os.close(connection.detach())

    server.answers["/a"] = cut
    with pytest.raises(MachineError, match="cannot be fetched"):
        get(server.url("/a"))


def test_a_compressed_answer_is_refused(server: TlsServer, get: Get) -> None:
    with pytest.raises(InputError, match="sent as gzip"):
        get(server.says("/a", OK, b"Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx"))


def test_what_may_be_secret_is_not_shown(server: TlsServer, get: Get) -> None:
    url = server.says("/a?signature=secret", b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(InputError) as caught:
        get(url)
    assert "secret" not in str(caught.value)
    assert f"{server.name}/a?..." in caught.value.message


def test_a_local_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 100)
    assert read_bytes(str(path), FetchLimits(max_bytes=100), NONE) == b"x" * 100
    with pytest.raises(InputError, match="more than 99 bytes"):
        read_bytes(str(path), FetchLimits(max_bytes=99), NONE)


def test_a_local_file_reserves_no_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 100)
    tracemalloc.start()
    try:
        read_bytes(str(path), FetchLimits(max_bytes=50_000_000), NONE)
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most_bytes < 1_000_000


def test_a_local_file_that_grows_is_to_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 100)
    look = os.fstat

    def look_and_grow(number: int) -> os.stat_result:
        found = look(number)
        with path.open("ab") as file:
            file.write(b"more")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", look_and_grow)
        with pytest.raises(MachineError, match="is being written"):
            read_bytes(str(path), LIMITS, NONE)
    assert len(read_bytes(str(path), LIMITS, NONE)) == 104


def test_what_is_no_local_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, kind, why in [
        ("none.png", InputNotFoundError, "There is no file"),
        ("", InputError, "is no file|Is a directory|cannot be read"),
        ("pipe", InputError, "is no file"),
        ("a\0b", InputError, "cannot be read"),
    ]:
        with pytest.raises(kind, match=why):
            read_bytes(str(tmp_path / name), LIMITS, NONE)
    with pytest.raises(InputError, match="/dev/zero is no file"):
        read_bytes("/dev/zero", LIMITS, NONE)


def test_an_output(tmp_path: Path) -> None:
    root = str(tmp_path / "out")
    assert not exists(root, "a/b/c.png")
    with pytest.raises(InputNotFoundError):
        read_output(root, "a/b/c.png")
    write_output(root, "a/b/c.png", b"first")
    write_output(root, "a/b/c.png", b"second")
    assert exists(root, "a/b/c.png")
    assert read_output(root, "a/b/c.png") == b"second"
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["c.png"]


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "a\\x.png", ".x.png"])
def test_an_output_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    for act in (
        lambda: write_output(str(tmp_path), name, b""),
        lambda: exists(str(tmp_path), name),
        lambda: read_output("s3://b", name),
    ):
        with pytest.raises(OutputError):
            act()


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_output(str(tmp_path), "a.png", b"older")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device\. Make room"):
        write_output(str(tmp_path), "a.png", b"newer")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"older"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_output(str(tmp_path), "a/b.png", b"x")


def test_what_is_written_is_synced_before_and_after_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(number: int) -> None:
        steps.append("sync " + Path(f"/proc/self/fd/{number}").readlink().name.split(".png")[0])
        real_sync(number)

    def replace(path: Path, target: Path) -> Path:
        steps.append("rename")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_output(str(tmp_path), "new/a.png", b"x")
    assert steps == [f"sync {tmp_path.name}", "sync .a", "rename", "sync new"]


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    settings = {
        "AWS_ENDPOINT_URL": moto,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3", use_listings_cache=False).mkdir("catalog")
    yield "s3://catalog"
    fsspec.filesystem("s3", use_listings_cache=False).rm("catalog", recursive=True)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_s3(bucket: str) -> None:
    root = f"{bucket}/out"
    assert not exists(root, "a/ö b.png")
    with pytest.raises(InputNotFoundError):
        read_output(root, "a/ö b.png")
    write_output(root, "a/ö b.png", b"first")
    write_output(root, "a/ö b.png", b"second")
    assert exists(root, "a/ö b.png")
    assert read_output(root, "a/ö b.png") == b"second"
    assert read_bytes(f"{root}/a/ö b.png", FetchLimits(max_bytes=6), NONE) == b"second"
    with pytest.raises(InputError, match="has 6 bytes; 5 is the limit"):
        read_bytes(f"{root}/a/ö b.png", FetchLimits(max_bytes=5), NONE)
    write_output(root, "empty.png", b"")
    assert read_output(root, "empty.png") == b""


def test_what_is_wrong_with_s3(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputNotFoundError):
        read_bytes(f"{bucket}/none.png", LIMITS, NONE)
    with pytest.raises(InputNotFoundError):
        read_bytes("s3://no-such-bucket/none.png", LIMITS, NONE)
    with pytest.raises(OutputError):
        write_output("s3://no-such-bucket", "a.png", b"x")


def test_a_manifest_and_its_pictures_at_s3(bucket: str) -> None:
    write_output(bucket, "in/products.csv", "sku,picture\nA1,pictures/a.png\nA2,s3://other/b.png\n".encode("utf-8-sig"))
    write_output(bucket, "in/pictures/a.png", b"a")
    one, two = read_manifest(f"{bucket}/in/products.csv")
    assert isinstance(one, Row)
    assert isinstance(two, Row)
    assert (one.picture, two.picture) == (f"{bucket}/in/pictures/a.png", "s3://other/b.png")
    assert read_bytes(one.picture, LIMITS, NONE) == b"a"
    (only,) = read_manifest(f"{bucket}/in/pictures/")
    assert isinstance(only, Row)
    assert (only.id, only.picture) == ("a", f"{bucket}/in/pictures/a.png")
    with pytest.raises(InputNotFoundError):
        list(read_manifest(f"{bucket}/nothing/"))
    with pytest.raises(InputNotFoundError):
        list(read_manifest(f"{bucket}/in/none.csv"))


def test_a_store_that_cannot_be_reached_may_pass(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = fsspec.get_filesystem_class("s3")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with monkeypatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", nowhere)
        patched.setenv("AWS_MAX_ATTEMPTS", "1")
        patched.setattr(cls, "retries", 1)
        cls.clear_instance_cache()
        with pytest.raises(MachineError, match="cannot be reached"):
            read_bytes(f"{bucket}/a.png", LIMITS, NONE)
    cls.clear_instance_cache()


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    with serve_gcs() as (address, objects):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        kind = fsspec.get_filesystem_class("gs")
        kind.clear_instance_cache()
        yield objects
        kind.clear_instance_cache()


def test_gs(gcs: dict[str, bytes]) -> None:
    root = "gs://catalog/out"
    assert not exists(root, "a/b.png")
    with pytest.raises(InputNotFoundError):
        read_output(root, "a/b.png")
    write_output(root, "a/b.png", b"picture")
    assert gcs == {"catalog/out/a/b.png": b"picture"}
    assert exists(root, "a/b.png")
    assert read_output(root, "a/b.png") == b"picture"
    with pytest.raises(InputError, match="has 7 bytes; 6 is the limit"):
        read_bytes(f"{root}/a/b.png", FetchLimits(max_bytes=6), NONE)
    write_output(root, "products.csv", b"id,picture\nA,a/b.png\n")
    (row,) = read_manifest(f"{root}/products.csv")
    assert isinstance(row, Row)
    assert row.picture == f"{root}/a/b.png"


def test_a_store_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(MissingExtraError, match=r"millicent\[cloud\]"):
        read_bytes("s3://bucket/a.png", LIMITS, NONE)


def test_an_output_folder_at_an_address() -> None:
    with pytest.raises(OutputError, match="at an address"):
        write_output("https://example.com/out", "a.png", b"")
