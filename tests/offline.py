"""Refuse every connection that leaves the machine. Loopback and unix sockets stay open.

Ranks and notebook kernels talk over these two. Native code is out of reach, so the libraries that
could download are also told to be offline by their environment variables (conftest.py).
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

__all__ = ["NetworkBlockedError", "block_network"]


class NetworkBlockedError(RuntimeError):
    """A test tried to reach another machine."""


def block_network() -> None:
    """Guard connecting, sending and resolving names in this process. Calling it twice changes nothing."""
    if getattr(socket.socket.connect, "guarded", False):
        return
    for method in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, method, _guarded(getattr(socket.socket, method)))
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise NetworkBlockedError(f"getaddrinfo: the tests are offline, yet {host!r} was looked up.")
        return resolve(host, *args, **kwargs)

    socket.getaddrinfo = getaddrinfo


def _guarded(method: Any) -> Any:
    def checked(self: socket.socket, *args: Any) -> Any:
        # The address comes last: sendto takes (data, address) or (data, flags, address).
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(args[-1][0]):
            raise NetworkBlockedError(f"{method.__name__}: the tests are offline, yet went to {args[-1]!r}.")
        return method(self, *args)

    checked.guarded = True  # type: ignore[attr-defined]
    return checked


def _is_local(host: Any) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
