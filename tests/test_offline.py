"""Nothing in the suite reaches another machine, and what stays on this one still works."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from tests.offline import NetworkBlockedError

ELSEWHERE = ("192.0.2.1", 80)  # reserved for documentation: nobody answers there


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_connecting_elsewhere_is_refused(method: str) -> None:
    with socket.socket() as client, pytest.raises(NetworkBlockedError, match=r"192\.0\.2\.1"):
        getattr(client, method)(ELSEWHERE)


def test_sending_elsewhere_is_refused() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as client, pytest.raises(NetworkBlockedError):
        client.sendto(b"hello", ELSEWHERE)


def test_looking_up_a_name_is_refused() -> None:
    with pytest.raises(NetworkBlockedError, match=r"example\.invalid"):
        urllib.request.urlopen("http://example.invalid/")


def test_loopback_stays_open() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        client.connect(server.getsockname())
        peer, _ = server.accept()
        with peer:
            client.sendall(b"x")
            assert peer.recv(1) == b"x"


def test_unix_sockets_stay_open() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"x")
        assert right.recv(1) == b"x"
