"""Devices and addresses of one namespace, and what lies behind its veths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TypeVar

from msgspec.structs import replace

from k8sdiag.facts import Address, Link
from k8sdiag.host.inventory import netns, rtnetlink
from k8sdiag.host.inventory.rtnetlink import Device

_Key = TypeVar("_Key")
_Inner = TypeVar("_Inner", Link, Address)


class Interior:
    """The inside of a network namespace, kept to say what changed since the last look."""

    def __init__(self, inode: int, cookie: int) -> None:
        self.links: dict[int, Link] = {}
        self.addresses: dict[str, Address] = {}
        self._inode = inode
        self._cookie = cookie
        self._dump = b""
        self._nearby: dict[int, tuple[int, int]] = {}
        """(inode, cookie) by the number this namespace gave the other: each numbers the others by itself."""
        self.strangers: frozenset[int] = frozenset()
        """Numbers of namespaces that veths lead to and that nobody among the living has."""
        self._asked: frozenset[tuple[int, int]] = frozenset()

    def look(self, path: str, t_ns: int, living: dict[tuple[int, int], str]) -> list[Link | Address]:
        """What is new, different or gone. Raises OSError.

        `living` leads from inode and cookie of every namespace to a path that opens it, likely peers first.
        """
        with netns.inside(path, self._inode):
            route = rtnetlink.Route()
        with route:  # asked from home, where /proc/self means us
            dump = route.dump()
            if dump == self._dump and (not self.strangers or self._asked == living.keys()):
                return []
            devices, addresses = rtnetlink.parse(dump)
            wanted = {device.netnsid for device in devices if device.kind == "veth" and device.netnsid is not None}
            self._resolve(route, wanted, living)
        self._dump = dump
        return [
            *_changes(self.links, {device.ifindex: self._link(device, t_ns) for device in devices}, t_ns),
            *_changes(
                self.addresses,
                {address: Address(self._inode, address, self._cookie, t_ns) for address in addresses}, t_ns,
            ),
        ]  # fmt: skip

    def ended(self, t_ns: int) -> list[Link | Address]:
        """Everything that was inside, its namespace being gone."""
        return [*_changes(self.links, {}, t_ns), *_changes(self.addresses, {}, t_ns)]

    def _resolve(self, route: rtnetlink.Route, wanted: set[int], living: dict[tuple[int, int], str]) -> None:
        """Find out who is meant by the numbers `wanted`: one question for each candidate, so answers are kept."""
        # A number is given out again only after its namespace has ended.
        self._nearby = {number: ident for number, ident in self._nearby.items() if ident in living}
        answered = set(self._nearby.values())
        for ident, path in living.items():
            if wanted <= self._nearby.keys():
                break
            if ident in answered:
                continue
            try:
                fd = netns.opened(path, ident[0])
                try:
                    number = route.netnsid(fd)
                finally:
                    os.close(fd)
            except OSError:  # gone in this moment
                continue
            if number >= 0:
                self._nearby[number] = ident
        self.strangers = frozenset(wanted - self._nearby.keys())
        self._asked = frozenset(living)

    def _link(self, device: Device, t_ns: int) -> Link:
        peer = (0, 0)
        if device.kind == "veth":
            here = (self._inode, self._cookie)
            peer = here if device.netnsid is None else self._nearby.get(device.netnsid, (0, 0))
        return Link(
            self._inode, device.ifindex, device.name, self._cookie, device.kind, device.link, *peer, device.mtu, t_ns
        )


def _changes(known: dict[_Key, _Inner], now: dict[_Key, _Inner], t_ns: int) -> Iterator[_Inner]:
    """What is new, different or gone; `known` is brought up to date."""
    for ident in known.keys() - now.keys():
        yield replace(known.pop(ident), until_t_ns=t_ns)
    for ident, fact in now.items():
        before = known.get(ident)
        if before is not None:
            if replace(before, from_t_ns=fact.from_t_ns) == fact:
                continue
            yield replace(before, until_t_ns=t_ns)
        known[ident] = fact
        yield fact
