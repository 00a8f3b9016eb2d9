"""rtnetlink: what the kernel says of the devices and addresses of a network namespace.

pyroute2 reads the messages. Only the socket is ours: every namespace of the node is asked every few seconds, and
mostly answers with the same bytes as before, which are then not read again; that takes a twentieth of the time that
the library needs for a question of its own. Layout: include/uapi/linux/netlink.h, rtnetlink.h, net_namespace.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""
_ATTRIBUTE = struct.Struct("=HHi")
"""struct nlattr (length, type) and a number in it."""
_NUMBER = struct.Struct("=i")
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_NEWLINK, _GETLINK, _NEWADDR, _GETADDR, _GETNSID = 16, 18, 20, 22, 90
_EXT_MASK, _SKIP_STATS = 29, 8
_NSID, _NETNS_FD = 1, 3


class Device(NamedTuple):
    ifindex: int
    name: str
    kind: str
    """IFLA_INFO_KIND such as "veth"; empty for hardware and loopback."""
    mtu: int
    link: int
    """Interface index of what it is bound to: a veth's other end, a VLAN's lower device. 0 where nothing."""
    netnsid: int | None
    """In which namespace `link` counts, by the number that this one gave it; None: in this one."""


class Interior(NamedTuple):
    devices: list[Device]
    addresses: list[str]


class Route:
    """A socket to rtnetlink. It speaks of the namespace in which it was opened, wherever its thread goes later.

    It keeps that namespace alive until it is closed. Every method raises OSError.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)

    def __enter__(self) -> Route:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self) -> bytes:
        """All devices and addresses as the kernel wrote them: the same bytes again while nothing changes."""
        return self._all(_GETLINK, bytes(16) + _attribute(_EXT_MASK, _SKIP_STATS)) + self._all(_GETADDR, bytes(8))

    def netnsid(self, fd: int) -> int:
        """The number under which this namespace knows the one that `fd` refers to, -1 where it has none."""
        self._send(_GETNSID, 0, bytes(4) + _attribute(_NETNS_FD, fd))
        answer = self._socket.recv(1 << 12)
        for kind, at, end in _messages(answer):
            _check(kind, answer, at)
            for place in range(at + 4, end - _ATTRIBUTE.size + 1, _ATTRIBUTE.size):
                _, attribute, number = _ATTRIBUTE.unpack_from(answer, place)
                if attribute == _NSID:
                    return int(number)
        return -1

    def _all(self, question: int, body: bytes) -> bytes:
        self._send(question, _DUMP, body)
        parts = []
        while True:
            part = self._socket.recv(1 << 16)
            parts.append(part)
            for kind, at, _ in _messages(part):
                _check(kind, part, at)
                if kind == _DONE:
                    return b"".join(parts)

    def _send(self, question: int, flags: int, body: bytes) -> None:
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), question, _REQUEST | flags, 1, 0) + body)


def parse(dump: bytes) -> Interior:
    """The devices and addresses in the answer of Route.dump()."""
    # 150 ms and 24 MB: only once something is to be read.
    from pyroute2.netlink.rtnl.marshal import MarshalRtnl

    found = Interior([], [])
    for message in MarshalRtnl().parse(dump):
        kind = message["header"]["type"]
        if kind == _NEWLINK:
            about = message.get("linkinfo")
            found.devices.append(
                Device(
                    message["index"],
                    message.get("ifname") or "",
                    (about.get("kind") if about else None) or "",
                    message.get("mtu") or 0,
                    message.get("link") or 0,
                    message.get("link_netnsid"),
                )
            )
        elif kind == _NEWADDR:
            # On a point-to-point link IFA_ADDRESS is the other end's.
            address = message.get("local") or message.get("address")
            if address:
                found.addresses.append(address)
    return found


def _messages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(type, where the body begins, where it ends) of each whole message."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            return
        yield kind, at + _HEADER.size, at + length
        at += length + 3 & ~3


def _check(kind: int, data: bytes, at: int) -> None:
    """Errors are negative numbers; a dump that failed half-way has one at its end."""
    number = _NUMBER.unpack_from(data, at)[0] if kind in (_ERROR, _DONE) and len(data) >= at + 4 else 0
    if number < 0:
        raise OSError(-number, os.strerror(-number))


def _attribute(kind: int, number: int) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size, kind, number)
