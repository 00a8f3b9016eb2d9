"""Who is who on this node: network namespaces, whose they are, their devices and addresses.

Says what changed since it was last asked. Looking at everything anew costs milliseconds for each namespace, so a
look inside one happens when it appears, when something unexplained points at it, and else in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from k8sdiag.facts import Address, AnyFact, HostPod, Link, NetnsOwner, OwnerKind
from k8sdiag.host.inventory import netns
from k8sdiag.host.inventory.links import Peers, interior
from k8sdiag.host.inventory.procfs import PodLogs, PodName, Process, Processes

LOOKS_PER_TURN = 2
"""Namespaces looked into again per tick although nothing points at a change."""


_Key = TypeVar("_Key")
_Inner = TypeVar("_Inner", Link, Address)
_Lasting = TypeVar("_Lasting", NetnsOwner, HostPod, Link, Address)


class _Space:
    """One network namespace while it lives."""

    def __init__(self, inode: int, cookie: int, t_ns: int) -> None:
        self.inode = inode
        self.cookie = cookie
        self.from_t_ns = t_ns
        self.path = ""
        self.owners: dict[tuple[str, str], NetnsOwner] = {}
        self.links: dict[int, Link] = {}
        self.addresses: dict[str, Address] = {}
        self.holders: frozenset[object] = frozenset()


class Inventory:
    """Facts about this machine's namespaces. All methods belong to one thread."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._processes = Processes(root)
        self._logs = PodLogs(root)
        self._spaces: dict[int, _Space] = {}
        self._host_pods: dict[str, HostPod] = {}
        self._suspects: set[int] = set()
        self._turn = 0
        self.host_inode = netns.own_inode()

    def suspect(self, inodes: Iterable[int]) -> None:
        """These namespaces answered with a device, cookie or inode that is not known: look into them next."""
        self._suspects.update(inodes)

    def knows(self, inode: int, cookie: int, ifindex: int) -> bool:
        """Whether a counted drop's namespace and device are known; if not, it is worth looking before naming."""
        space = self._spaces.get(inode)
        if space is None or (cookie and space.cookie and space.cookie != cookie):
            return False
        return not ifindex or ifindex in space.links

    def path(self, inode: int) -> str | None:
        """Something to open or to enter for a living namespace."""
        space = self._spaces.get(inode)
        return space.path if space else None

    def cookie(self, inode: int) -> int:
        """Cookie of a living namespace, 0 where there is none."""
        space = self._spaces.get(inode)
        return space.cookie if space else 0

    @property
    def inodes(self) -> list[int]:
        return list(self._spaces)

    def facts(self, t_ns: int) -> Iterator[AnyFact]:
        """What changed since the last call: new, different and ended owners, devices and addresses."""
        self._turn += 1
        processes = self._processes.scan()
        names = netns.named(self._root)
        pods = self._logs.names()
        holders: dict[int, tuple[list[Process], list[str]]] = {self.host_inode: ([], [])}
        for process in processes:
            holders.setdefault(process.netns, ([], []))[0].append(process)
        for name, inode in names.items():
            holders.setdefault(inode, ([], []))[1].append(name)

        yield from self._endings(holders, t_ns)
        look = self._arrivals(holders, t_ns)
        for inode in look:
            if self._spaces[inode].from_t_ns == t_ns:
                yield from self._owners(self._spaces[inode], holders[inode], pods, t_ns)
        for inode, space in self._spaces.items():
            if space.from_t_ns != t_ns:
                yield from self._owners(space, holders[inode], pods, t_ns)
        yield from self._host_pod_facts(holders[self.host_inode][0], pods, t_ns)
        look.update(self._suspects & self._spaces.keys())
        look.update(self._in_turn())
        self._suspects.clear()
        for inode in look:
            yield from self._interior(self._spaces[inode], t_ns)

    def _endings(self, holders: dict[int, tuple[list[Process], list[str]]], t_ns: int) -> Iterator[AnyFact]:
        for inode, space in list(self._spaces.items()):
            held = _held(holders.get(inode))
            if held and not (space.holders and held.isdisjoint(space.holders)):
                space.holders = held
                continue
            # Nobody, or only strangers: the inode may have been given to a new namespace.
            if held and self._cookie(_path(self._root, inode, holders[inode], self.host_inode)) == space.cookie != 0:
                space.holders = held
                continue
            del self._spaces[inode]
            yield from (_ended(owner, t_ns) for owner in space.owners.values())
            yield from (_ended(link, t_ns) for link in space.links.values())
            yield from (_ended(address, t_ns) for address in space.addresses.values())

    def _arrivals(self, holders: dict[int, tuple[list[Process], list[str]]], t_ns: int) -> set[int]:
        arrived = set()
        for inode, held in holders.items():
            path = _path(self._root, inode, held, self.host_inode)
            space = self._spaces.get(inode)
            if space is None or inode in self._suspects:
                cookie = self._cookie(path)
                if cookie is None:
                    continue
                if space is None or cookie != space.cookie:
                    space = self._spaces[inode] = _Space(inode, cookie, t_ns)
                    space.holders = _held(held)
                    arrived.add(inode)
            space.path = path
        return arrived

    def _in_turn(self) -> list[int]:
        inodes = sorted(self._spaces)
        count = len(inodes)
        return [inodes[(self._turn * LOOKS_PER_TURN + i) % count] for i in range(min(LOOKS_PER_TURN, count))]

    def _cookie(self, path: str) -> int | None:
        """None: it cannot be entered, because it is gone or because we may not."""
        try:
            with netns.inside(path):
                return netns.cookie_here()
        except OSError:
            return None

    def _owners(
        self, space: _Space, held: tuple[list[Process], list[str]], pods: dict[str, PodName], t_ns: int
    ) -> Iterator[AnyFact]:
        wanted = {(fact.kind, fact.uid or fact.name): fact for fact in self._claims(space, held, pods, t_ns)}
        for ident, fact in wanted.items():
            known = space.owners.get(ident)
            if known is None or (known.name, known.namespace) != (fact.name, fact.namespace):
                space.owners[ident] = fact
                yield fact

    def _claims(
        self, space: _Space, held: tuple[list[Process], list[str]], pods: dict[str, PodName], t_ns: int
    ) -> Iterator[NetnsOwner]:
        def owner(kind: OwnerKind, name: str, source: str, uid: str = "", namespace: str = "") -> NetnsOwner:
            return NetnsOwner(
                space.inode,
                kind,
                name,
                space.cookie,
                namespace,
                uid=uid,
                how="netns" if kind == "netns" else "cgroup",
                confidence="likely" if kind == "process" else "proven",
                from_t_ns=t_ns,
                source=source,
            )

        if space.inode == self.host_inode:
            return
        processes, names = held
        for process in processes:
            if process.pod_uid:
                named = pods.get(process.pod_uid)
                source = f"cgroup of process {process.pid}" + (", /var/log/pods" if named else "")
                yield owner("pod", named.name if named else process.pod_uid, uid=process.pod_uid, source=source,
                            namespace=named.namespace if named else "")  # fmt: skip
            elif process.container:
                yield owner("container", process.container[:12], uid=process.container,
                            source=f"cgroup of process {process.pid}")  # fmt: skip
        for name in names:
            yield owner("netns", name, source=f"/run/netns/{name}")
        if not names and processes and not any(process.pod_uid or process.container for process in processes):
            first = min(processes, key=lambda process: process.pid)
            yield owner("process", first.comm, source=f"process {first.pid}")

    def _host_pod_facts(self, processes: list[Process], pods: dict[str, PodName], t_ns: int) -> Iterator[AnyFact]:
        alive = {process.pod_uid: process for process in processes if process.pod_uid}
        for uid, process in alive.items():
            if uid not in self._host_pods:
                named = pods.get(uid, PodName("", uid))
                self._host_pods[uid] = HostPod(
                    uid, named.name, named.namespace, from_t_ns=t_ns, source=f"cgroup of process {process.pid}"
                )
                yield self._host_pods[uid]
        for uid in self._host_pods.keys() - alive.keys():
            yield _ended(self._host_pods.pop(uid), t_ns)

    def _interior(self, space: _Space, t_ns: int) -> Iterator[AnyFact]:
        order = sorted(self._spaces.values(), key=lambda other: other.inode != self.host_inode)
        peers = Peers({other.inode: (other.path, other.cookie) for other in order if other is not space})
        try:
            with netns.inside(space.path):
                links, addresses = interior(space.inode, space.cookie, t_ns, peers)
        except OSError:
            return  # it has just gone: the next scan says so
        yield from _changes(space.links, {link.ifindex: link for link in links}, t_ns)
        yield from _changes(space.addresses, {address.address: address for address in addresses}, t_ns)


def _held(holders: tuple[list[Process], list[str]] | None) -> frozenset[object]:
    if holders is None:
        return frozenset()
    return frozenset([*(process.pid for process in holders[0]), *holders[1]])


def _path(root: Path, inode: int, held: tuple[list[Process], list[str]], host_inode: int) -> str:
    processes, names = held
    if names:
        return f"{root}/run/netns/{names[0]}".replace("//", "/")
    if processes:
        return f"{root}/proc/{processes[0].pid}/ns/net".replace("//", "/")
    return "/proc/self/ns/net" if inode == host_inode else ""


def _changes(known: dict[_Key, _Inner], now: dict[_Key, _Inner], t_ns: int) -> Iterator[AnyFact]:
    """What is new, different or gone; `known` is brought up to date."""
    for ident in known.keys() - now.keys():
        yield _ended(known.pop(ident), t_ns)
    for ident, fact in now.items():
        before = known.get(ident)
        if before is not None:
            if replace(before, from_t_ns=fact.from_t_ns) == fact:
                continue
            yield _ended(before, t_ns)
        known[ident] = fact
        yield fact


def _ended(fact: _Lasting, t_ns: int) -> _Lasting:
    return replace(fact, until_t_ns=t_ns)
