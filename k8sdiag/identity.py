"""Who is it? Folds what inventory says into owners of namespaces, devices and addresses, at a given time.

Inodes of network namespaces and addresses of pods are given out again: everything here has a time span, and where
the kernel has namespace cookies (which never repeat) those decide. Owners that are gone stay known for a while,
because their last packets are counted after them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from ipaddress import ip_address
from typing import NamedTuple, TypeVar

from k8sdiag.facts import REMEMBERED_NS, Address, AnyFact, DropKey, HostPod, How, Link, NetnsOwner, Node
from k8sdiag.snapshot import Direction, Owner

_PRECEDENCE = ("pod", "container", "host", "netns")
_Spanned = TypeVar("_Spanned", NetnsOwner, Link, Address)
_Key = TypeVar("_Key")


class Attribution(NamedTuple):
    """Whose a drop is. `peer` is the other end, None where there is none or it is not known."""

    owner: Owner
    peer: Owner | None
    direction: Direction
    device: str | None
    inside: str
    """Command prefix that enters the namespace the packet was in."""


class Resident(NamedTuple):
    """A line of `k8sdiag pods`."""

    owner: Owner
    netns: int
    addresses: tuple[str, ...]
    source: str
    """The files it was read from."""


class Identity:
    """The inventory as of the last fact. `version` changes whenever an answer might."""

    def __init__(self) -> None:
        self.version = 0
        self._node: Node | None = None
        self._owners: dict[int, list[NetnsOwner]] = {}
        self._links: dict[tuple[int, int], list[Link]] = {}
        self._addresses: dict[str, list[Address]] = {}
        self._local: dict[int, list[Address]] = {}
        self.host_pods: dict[str, HostPod] = {}

    def fold(self, fact: AnyFact) -> None:
        """Take in one fact; those that are no business of identity are passed over."""
        if isinstance(fact, Node):
            if fact == self._node:
                return
            self._node = fact
        elif isinstance(fact, NetnsOwner):
            if not _replace(self._owners.setdefault(fact.netns, []), fact, ("netns_cookie", "kind", "name", "uid")):
                return
        elif isinstance(fact, Link):
            spans = self._links.setdefault((fact.netns, fact.ifindex), [])
            if not _replace(spans, fact, ("netns_cookie", "name", "peer_netns", "peer_ifindex")):
                return
        elif isinstance(fact, Address):
            if not _replace(self._addresses.setdefault(fact.address, []), fact, ("netns", "netns_cookie")):
                return
            _replace(self._local.setdefault(fact.netns, []), fact, ("address", "netns_cookie"))
        elif isinstance(fact, HostPod):
            if self.host_pods.get(fact.uid) == fact:
                return
            self.host_pods[fact.uid] = fact
        else:
            return
        self.version += 1

    def forget(self, t_ns: int) -> None:
        """Let go of what ended more than ten minutes of event time before `t_ns`."""
        before_ns = t_ns - REMEMBERED_NS
        forgot = _forget(self._owners, before_ns) + _forget(self._links, before_ns)
        forgot += _forget(self._addresses, before_ns) + _forget(self._local, before_ns)
        if forgot:
            self.version += 1

    def netns_owner(self, netns: int, cookie: int, t_ns: int, how: How = "netns") -> Owner | None:
        """Whose a network namespace is, or None where nobody said."""
        spans = _valid(self._owners.get(netns, ()), cookie, t_ns)
        spans.sort(key=lambda span: (_PRECEDENCE.index(span.kind) if span.kind in _PRECEDENCE else 9, -span.from_t_ns))
        if spans:
            best = spans[0]
            return Owner(
                best.kind, best.name, best.namespace or None, best.workload or None, best.uid or None,
                how, best.confidence,
            )  # fmt: skip
        if self._node and netns == self._node.netns:
            return Owner("host", self._node.name, how=how, confidence="proven")
        return None

    def residents(self, t_ns: int) -> list[Resident]:
        """Every living namespace and every pod in the node's own, for `k8sdiag pods`."""
        found = []
        for netns, spans in self._owners.items():
            for cookie in {span.netns_cookie for span in spans if span.until_t_ns is None}:
                owner = self.netns_owner(netns, cookie, t_ns)
                source = next((span.source for span in spans if owner and span.name == owner.name), "")
                if owner:
                    found.append(Resident(owner, netns, self._addresses_of(netns, cookie), source))
        if self._node:
            host = self._node.netns
            addresses = self._addresses_of(host, 0)
            found.append(
                Resident(
                    Owner("host", self._node.name, how="netns", confidence="proven"), host, addresses, "the node itself"
                )
            )
            found += [
                Resident(
                    Owner("pod", pod.name, pod.namespace or None, uid=pod.uid, how="cgroup", confidence="proven"),
                    host, addresses, pod.source + ", hostNetwork",
                )
                for pod in self.host_pods.values() if pod.until_t_ns is None
            ]  # fmt: skip
        return sorted(found, key=lambda row: (row.owner.namespace or "~", row.owner.kind, row.owner.name))

    def _addresses_of(self, netns: int, cookie: int) -> tuple[str, ...]:
        """Addresses local to a living namespace, loopback left out."""
        spans = self._local.get(netns, ())
        return tuple(
            sorted(
                span.address
                for span in spans
                if span.until_t_ns is None
                and (not cookie or span.netns_cookie in (0, cookie))
                and not ip_address(span.address).is_loopback
            )
        )

    def attribute(self, key: DropKey, t_ns: int) -> Attribution:
        """Whose drop it is.

        A packet whose source or destination is local to the namespace in which it died belongs to that
        namespace. A packet in transit belongs to the pod behind the veth on which it was (at POST_ROUTING: had come
        by); where the device is a bridge, to the pod that has its source address, else its destination. Translated
        addresses are seen through: who sent it, and who would have answered.
        """
        if not key.netns:
            return Attribution(Owner("unknown", "no network namespace"), None, "", None, "")
        here = (key.netns, key.netns_cookie, t_ns)
        destination = _destination(key)
        device = self._link(key.netns, key.netns_cookie, key.ifindex, t_ns)
        name = device.name if device else (f"if{key.ifindex}" if key.ifindex else None)
        how: How = {"SOCKET": "socket", "CONNTRACK": "conntrack"}.get(key.netns_from, "netns")  # type: ignore[assignment]
        resident = self.netns_owner(*here, how) or Owner("unknown", f"netns:{key.netns}")
        inside = self.entrance(*here)
        direction = self._direction(key, t_ns, resident)
        if direction != "forward":
            other = {"in": key.src, "out": destination}.get(direction, "")
            return Attribution(resident, self._peer(other, key, t_ns), direction, name, inside)
        # What is on its way out is held back from its sender; it is on the receiver's device already.
        devices = (key.iif, key.ifindex) if key.hook == "POST_ROUTING" else (key.ifindex, key.iif)
        for ifindex in devices:
            owner = self._behind(key, ifindex, t_ns)
            if owner:
                sender, receiver = self._at(key.src, key, t_ns), self._at(destination, key, t_ns)
                is_sender = sender is not None and sender.identity == owner.identity
                is_receiver = receiver is not None and receiver.identity == owner.identity
                other = destination if is_sender or (not is_receiver and sender is None) else key.src
                return Attribution(owner, self._peer(other, key, t_ns), direction, name, inside)
        for address, other in ((key.src, destination), (destination, key.src)):
            owner = self._at(address, key, t_ns)
            if owner:
                return Attribution(owner, self._peer(other, key, t_ns), direction, name, inside)
        return Attribution(resident, self._peer(key.src, key, t_ns), direction, name, inside)

    def entrance(self, netns: int, cookie: int, t_ns: int) -> str:
        """What to put before a command to run it in a namespace; empty for the node's own."""
        if self._node and netns == self._node.netns:
            return ""
        spans = _valid(self._owners.get(netns, ()), cookie, t_ns)
        named = next((span.name for span in spans if span.kind == "netns"), "")
        if named:
            return f"ip netns exec {shlex.quote(named)}"
        return f"nsenter -n -t $(lsns -t net -n -o NS,PID | awk '$1 == {netns} {{print $2}}')"

    def _direction(self, key: DropKey, t_ns: int, resident: Owner) -> Direction:
        if not key.src:
            # Folded or not IP: no addresses to go by. The node forwards, pods do not.
            transit = key.hook == "FORWARD" or (resident.kind == "host" and not key.hook.startswith("LOCAL"))
            return "forward" if transit and self._behind(key, key.ifindex, t_ns) else ""
        destination = _destination(key)
        to_us = self._is_local(destination, key, t_ns)
        from_us = self._is_local(key.src, key, t_ns)
        if to_us and from_us:
            return "local"
        if key.hook == "FORWARD" or not (to_us or from_us or _is_group(destination)):
            if resident.kind != "host" and not self._local.get(key.netns):
                return ""
            # A pod passes nothing on: what is not for it was flooded by a bridge, or is a broadcast.
            passes_on = key.hook == "FORWARD" or resident.kind not in ("pod", "container")
            return "forward" if passes_on else "in"
        return "out" if from_us else "in"

    def _link(self, netns: int, cookie: int, ifindex: int, t_ns: int) -> Link | None:
        spans = _valid(self._links.get((netns, ifindex), ()), cookie, t_ns)
        return max(spans, key=lambda span: span.from_t_ns) if spans else None

    def _behind(self, key: DropKey, ifindex: int, t_ns: int) -> Owner | None:
        """The owner of the namespace at the other end of a veth."""
        link = self._link(key.netns, key.netns_cookie, ifindex, t_ns)
        if not link or not link.peer_netns or link.peer_netns == key.netns:
            return None
        return self.netns_owner(link.peer_netns, link.peer_netns_cookie, t_ns, "veth")

    def owner_at(self, address: str, netns: int, cookie: int, t_ns: int) -> Owner:
        """Who has an address, seen from a namespace: an owner here, or one of kind "external" or "unknown"."""
        if not address:
            return Owner("unknown", "others")
        key = DropKey(0, 0, 0, netns=netns, netns_cookie=cookie)
        if self._is_local(address, key, t_ns):
            return self.netns_owner(netns, cookie, t_ns, "ip") or Owner("unknown", f"netns:{netns}")
        return self._peer(address, key, t_ns) or Owner("unknown", address)

    def is_gone(self, address: str, t_ns: int) -> bool:
        """Whether somebody here had the address, and nobody has it any more."""
        spans = self._addresses.get(address, ())
        return bool(spans) and all(span.until_t_ns is not None and span.until_t_ns < t_ns for span in spans)

    def _is_local(self, address: str, key: DropKey, t_ns: int) -> bool:
        if address.startswith("127.") or address == "::1":
            return True
        here = [span for span in self._addresses.get(address, ()) if span.netns == key.netns]
        return bool(_valid(here, key.netns_cookie, t_ns))

    def _at(self, address: str, key: DropKey, t_ns: int) -> Owner | None:
        """The owner of an address as seen from the packet's namespace: never guessed between two."""
        holders = self._holders(address, key, t_ns)
        if len(holders) != 1:
            return None
        owner = self.netns_owner(*holders.pop(), t_ns, "ip")
        return owner and Owner(owner.kind, owner.name, owner.namespace, owner.workload, owner.uid, "ip", "likely")

    def _holders(self, address: str, key: DropKey, t_ns: int) -> set[tuple[int, int]]:
        """Inode and cookie of the namespaces that have the address; those next to the packet's, if there are any."""
        spans = _valid(self._addresses.get(address, ()), 0, t_ns)
        if len(spans) > 1:
            near = {(link.peer_netns, link.peer_netns_cookie) for (netns, _), links in self._links.items()
                    if netns == key.netns for link in links}  # fmt: skip
            spans = [span for span in spans if (span.netns, span.netns_cookie) in near] or spans
        return {(span.netns, span.netns_cookie) for span in spans}

    def _peer(self, address: str, key: DropKey, t_ns: int) -> Owner | None:
        if not address or _is_group(address):
            return None
        if len(self._holders(address, key, t_ns)) > 1:
            return Owner("unknown", address)
        return self._at(address, key, t_ns) or Owner("external", address, how="ip", confidence="proven")


def _destination(key: DropKey) -> str:
    """Where the packet was going, translation seen through: whoever would have answered it."""
    return key.reply_src or key.dst


def _is_group(address: str) -> bool:
    """Multicast, broadcast or unspecified: an address that nobody holds."""
    if not address:
        return False
    parsed = ip_address(address)
    return parsed.is_multicast or parsed.is_unspecified or address == "255.255.255.255"


def _replace(spans: list[_Spanned], fact: _Spanned, same: tuple[str, ...]) -> bool:
    """Put a fact in the place of its earlier statement. False where it says nothing new."""
    for i, known in enumerate(spans):
        if all(getattr(known, field) == getattr(fact, field) for field in same) and (
            known.from_t_ns == fact.from_t_ns or known.until_t_ns is None
        ):
            if known == fact:
                return False
            spans[i] = fact
            return True
    spans.append(fact)
    return True


def _valid(spans: Sequence[_Spanned], cookie: int, t_ns: int) -> list[_Spanned]:
    """Those that speak of this namespace at this time.

    A cookie settles it, for the dead too. Without one, those whose time span holds `t_ns`, else whoever was there
    last: what a pod sent in its final moments is counted after it.
    """
    if cookie:
        exact = [span for span in spans if span.netns_cookie == cookie]
        if exact:
            return [span for span in exact if span.until_t_ns is None or t_ns <= span.until_t_ns] or exact
        spans = [span for span in spans if not span.netns_cookie]
    alive = [
        span for span in spans
        if span.from_t_ns <= t_ns and (span.until_t_ns is None or t_ns <= span.until_t_ns)
    ]  # fmt: skip
    if alive:
        return alive
    last_ns = max((span.until_t_ns or 0 for span in spans), default=0)
    return [span for span in spans if span.until_t_ns == last_ns]


def _forget(table: dict[_Key, list[_Spanned]], before_ns: int) -> int:
    forgot = 0
    for key, spans in list(table.items()):
        kept = [span for span in spans if span.until_t_ns is None or span.until_t_ns >= before_ns]
        forgot += len(spans) - len(kept)
        if not kept:
            del table[key]
        elif len(kept) < len(spans):
            table[key] = kept
    return forgot
