"""Who is who on this node: network namespaces, whose they are, their devices and addresses.

Says what changed since it was last asked. A look inside a namespace costs 0.1 ms, so one happens when it appears,
when something unexplained points at it, and else in turn, which comes to each of a hundred within seven ticks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from k8sdiag.facts import AnyFact, HostPod, NetnsOwner, OwnerKind
from k8sdiag.host.inventory import netns
from k8sdiag.host.inventory.links import Interior
from k8sdiag.host.inventory.procfs import PodLogs, PodName, Process, Processes

LOOKS_PER_TURN = 16
"""Namespaces looked into again per tick although nothing points at a change: 0.1 ms each."""

_Owning = TypeVar("_Owning", NetnsOwner, HostPod)


class _Held(NamedTuple):
    """Who keeps a namespace alive, as far as it can be seen."""

    processes: list[Process]
    names: list[netns.Name]

    def shares(self, other: _Held) -> bool:
        """Whether anyone is in both, who then saw the namespace live on."""
        if not set(self.names).isdisjoint(other.names):
            return True
        return not {process.pid for process in self.processes}.isdisjoint(process.pid for process in other.processes)


class _Space:
    """One network namespace while it lives."""

    def __init__(self, inode: int, cookie: int) -> None:
        self.inode = inode
        self.cookie = cookie
        self.path = ""
        self.held = _Held([], [])
        self.owners: dict[tuple[str, str], NetnsOwner] = {}
        self.claimed: tuple[_Held, dict[str, PodName]] | None = None
        """What the owners were last made of."""
        self.interior = Interior(inode, cookie)


class Inventory:
    """Facts about this machine's namespaces. All methods belong to one thread."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._processes = Processes(root)
        self._logs = PodLogs(root)
        self._spaces: dict[int, _Space] = {}
        self._host_pods: dict[str, HostPod] = {}
        self._suspects: set[int] = set()
        self._arrived: set[int] = set()
        """Namespaces that were noticed and not yet looked into."""
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
        return not ifindex or ifindex in space.interior.links

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

    def notice(self) -> None:
        """See which namespaces there are, so that they can be entered: a first look before there is time for facts."""
        self._arrived |= self._arrivals(self._holders())

    def facts(self, t_ns: int) -> Iterator[AnyFact]:
        """What changed since the last call: new, different and ended owners, devices and addresses."""
        holders = self._holders()
        pods = self._logs.names()
        doubted = self._suspects | self._in_turn()
        self._suspects = set()
        yield from self._endings(holders, doubted, t_ns)
        look = (self._arrived | self._arrivals(holders)) & self._spaces.keys()
        self._arrived = set()
        if look:  # perhaps one of them is where a veth leads
            look |= {inode for inode, space in self._spaces.items() if space.interior.strangers}
        for space in self._spaces.values():
            yield from self._owners(space, pods, t_ns)
        yield from self._host_pod_facts(holders[self.host_inode].processes, pods, t_ns)
        look |= doubted & self._spaces.keys()
        paths = {(space.inode, space.cookie): space.path for space in self._spaces.values()}
        for inode in look:
            space = self._spaces[inode]
            try:
                changes = space.interior.look(space.path, t_ns, paths)
            except OSError:
                continue  # it has just gone: the next scan says so
            yield from changes

    def _holders(self) -> dict[int, _Held]:
        """By inode. The node's own namespace is always among them, and first."""
        holders = {self.host_inode: _Held([], [])}
        for process in self._processes.scan():
            holders.setdefault(process.netns, _Held([], [])).processes.append(process)
        for name in netns.named(self._root):
            holders.setdefault(name.inode, _Held([], [])).names.append(name)
        return holders

    def _endings(self, holders: dict[int, _Held], doubted: set[int], t_ns: int) -> Iterator[AnyFact]:
        for inode, space in list(self._spaces.items()):
            held = holders.get(inode)
            if held is None or not self._lives(space, held, doubted=inode in doubted):
                del self._spaces[inode]
                yield from (_ended(owner, t_ns) for owner in space.owners.values())
                yield from space.interior.ended(t_ns)

    def _lives(self, space: _Space, held: _Held, *, doubted: bool) -> bool:
        """Whether the inode still is the namespace it was: the kernel gives it out again within moments."""
        if space.inode == self.host_inode:
            return True
        strangers = held != space.held and not held.shares(space.held)
        if not strangers and not doubted:
            return True
        cookie = self._cookie(space.inode, held)
        return cookie == space.cookie if cookie else not strangers

    def _arrivals(self, holders: dict[int, _Held]) -> set[int]:
        """Notice new namespaces, and by whom each is held now."""
        arrived = set()
        for inode, held in holders.items():
            space = self._spaces.get(inode)
            if space is None:
                cookie = self._cookie(inode, held)
                if cookie is None:
                    continue
                space = self._spaces[inode] = _Space(inode, cookie)
                arrived.add(inode)
            if not space.path or held != space.held:
                space.held = held
                space.path = self._path(held)
        return arrived

    def _in_turn(self) -> set[int]:
        inodes = sorted(self._spaces)
        first = self._turn
        self._turn += LOOKS_PER_TURN
        return {inodes[(first + i) % len(inodes)] for i in range(min(LOOKS_PER_TURN, len(inodes)))}

    def _cookie(self, inode: int, held: _Held) -> int | None:
        """0 where the kernel has none. None: it cannot be entered, because it is gone or because we may not."""
        try:
            with netns.inside(self._path(held), inode):
                return netns.cookie_here()
        except OSError:
            return None

    def _path(self, held: _Held) -> str:
        """Something that opens a namespace: a name lives longer than a process."""
        if held.names:
            return str(self._root / "run/netns" / held.names[0].name)
        if held.processes:
            return str(self._root / "proc" / str(held.processes[0].pid) / "ns/net")
        return "/proc/self/ns/net"  # only the node's own can be held by nobody we see

    def _owners(self, space: _Space, pods: dict[str, PodName], t_ns: int) -> Iterator[AnyFact]:
        if space.claimed is not None and space.claimed == (space.held, pods):
            return
        space.claimed = space.held, pods
        claims = {(fact.kind, fact.uid or fact.name): fact for fact in self._claims(space, pods, t_ns)}
        for ident in [ident for ident in space.owners if ident not in claims]:
            yield _ended(space.owners.pop(ident), t_ns)
        for ident, fact in claims.items():
            known = space.owners.get(ident)
            if known is not None:
                # Log directories may go before their pod: it does not lose its name with them.
                if (known.name, known.namespace) == (fact.name, fact.namespace) or fact.name == fact.uid:
                    continue
                yield _ended(known, t_ns)
            space.owners[ident] = fact
            yield fact

    def _claims(self, space: _Space, pods: dict[str, PodName], t_ns: int) -> Iterator[NetnsOwner]:
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
        processes, names = space.held
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
            yield owner("netns", name.name, source=f"/run/netns/{name.name}")
        if not names and processes and not any(process.pod_uid or process.container for process in processes):
            first = min(processes, key=lambda process: process.pid)
            yield owner("process", first.comm, source=f"process {first.pid}")

    def _host_pod_facts(self, processes: list[Process], pods: dict[str, PodName], t_ns: int) -> Iterator[AnyFact]:
        alive = {process.pod_uid: process for process in processes if process.pod_uid}
        for uid, process in alive.items():
            named = pods.get(uid, PodName("", uid))
            known = self._host_pods.get(uid)
            if known is not None and named.name in (known.name, uid):
                continue
            self._host_pods[uid] = HostPod(
                uid, named.name, named.namespace,
                from_t_ns=known.from_t_ns if known else t_ns, source=f"cgroup of process {process.pid}",
            )  # fmt: skip
            yield self._host_pods[uid]
        for uid in self._host_pods.keys() - alive.keys():
            yield _ended(self._host_pods.pop(uid), t_ns)


def _ended(fact: _Owning, t_ns: int) -> _Owning:
    return replace(fact, until_t_ns=t_ns)
