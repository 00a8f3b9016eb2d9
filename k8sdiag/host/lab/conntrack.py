"""Faults of connection tracking and address translation, each with a tally that does not come from conntrack."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from k8sdiag.host.lab.fault import Case, Fault, settled
from k8sdiag.host.lab.netns import LabError, Netns, Server, inside
from k8sdiag.host.lab.topology import Lab, Pod
from k8sdiag.host.lab.traffic import Tally

# Translated and held connections lead to SERVED; nothing is done to those to OTHER.
SERVED, OTHER = 5300, 9000
SNAT_PORT = 40000
SNAT_RANGE = 10
SYN_TIMEOUT_S = 0.7
"""Shorter than the second after which a SYN is sent again: one attempt, one packet."""
RACE_S = 10

MAX, BUCKETS = "net.netfilter.nf_conntrack_max", "net.netfilter.nf_conntrack_buckets"
COUNT, LOOSE = "net.netfilter.nf_conntrack_count", "net.netfilter.nf_conntrack_tcp_loose"
HELD_MIN, HELD_MAX = 64, 8192
FEW_BUCKETS = 512
"""As few as the kernel takes: a page of pointers."""
CHAIN_MIN, CHAIN_MAX = 50, 80
"""The kernel gives up at a random length of the chain between these. Each entry is in two chains."""


@dataclass(frozen=True)
class Attempts:
    """What several clients tried at once."""

    tallies: dict[str, Tally]
    """By owner, each counted by the client itself. One packet an attempt; what got no answer was lost."""
    counter: int
    """Lost packets by the statistics of the node's connection table."""
    limit: int = 0
    """Entries that the table was allowed (nf_conntrack_max), where it was full; it had no fewer. 0: the usual."""
    bystander: Tally = field(default_factory=Tally)
    """Datagrams of the pod that met no fault; `connected` are those that arrived."""

    @property
    def lost(self) -> dict[str, int]:
        """Attempts without an answer, by owner."""
        return {owner: tally.sent - tally.connected for owner, tally in self.tallies.items()}


def refused(counters: Mapping[str, int]) -> int:
    """Packets for which there was no room: an unresolved clash raises both of these."""
    return counters["drop"] - counters["insert_failed"]


def share_snat_port(
    lab: Lab,
    attempts: Mapping[Pod, int],
    server: Pod,
    *,
    family: Literal[4, 6] = 4,
    bystander: Pod | None = None,
    packets: int = 5_000,
) -> Attempts:
    """Clients send datagrams to one server, each from a source port of its own; the node has one port for all.

    So one single attempt succeeds. Meanwhile `bystander` sends `packets` to another port, without translation.
    """
    node, address = lab.node, _address(server, family)
    source = _endpoint(server.gateway_ipv4 if family == 4 else server.gateway_ipv6, SNAT_PORT)
    rule = f"{_ip(family)} daddr {address} udp dport {SERVED} snat to {source}"
    with (
        server.sink(SERVED, echo=True),
        server.sink(OTHER) as other,
        _translated(node, family, "postrouting", rule),
        _clients(attempts, address, udp=True) as begin,
    ):
        before = node.conntrack()["insert_failed"]
        collect = begin()
        aside = bystander.udp(address, OTHER, packets) if bystander else Tally()
        tallies = collect()
        lost = sum(tally.sent - tally.connected for tally in tallies.values())
        counter = settled(lambda: node.conntrack()["insert_failed"] - before, lost)
        arrived = settled(other.received, aside.sent)
    return Attempts(tallies, counter, bystander=Tally(sent=aside.sent, refused=aside.refused, connected=arrived))


def fill_table(
    lab: Lab, attempts: Mapping[Pod, int], server: Pod, culprit: Pod, *, family: Literal[4, 6] = 4
) -> Attempts:
    """Clients try to connect while `culprit` holds as many connections as the table may have entries. Host-wide.

    The limit is one for the machine and lowered for a second, but never to what another table of the machine needs.
    """
    node, address = lab.node, _address(server, family)
    node.flush_conntrack()
    held = HELD_MIN + _fullest_table()
    if held > HELD_MAX:
        raise LabError(
            f"another network namespace tracks {held - HELD_MIN} connections and would be hurt by a limit below. "
            "Try again when it has fewer."
        )
    # Established connections are never evicted to make room, as a one-way flow would be.
    with (
        server.tcp_server(SERVED),
        culprit.tcp_held(address, SERVED, held),
        _clients(attempts, address, udp=False) as begin,
    ):
        before = node.conntrack()
        if before["entries"] < held:
            raise LabError(f"{held} connections are held, but the node tracks {before['entries']}. Is it on the way?")
        with lab.host_sysctl(MAX, held):
            tallies = begin()()
            lost = sum(tally.sent - tally.connected for tally in tallies.values())
            counter = settled(lambda: refused(node.conntrack()) - refused(before), lost)
    return Attempts(tallies, counter, limit=held)


def _address(pod: Pod, family: Literal[4, 6]) -> str:
    return pod.ipv4 if family == 4 else pod.ipv6


def _ip(family: Literal[4, 6]) -> str:
    return "ip" if family == 4 else "ip6"


def _endpoint(address: str, ports: int | str) -> str:
    return f"[{address}]:{ports}" if ":" in address else f"{address}:{ports}"


@contextlib.contextmanager
def _translated(netns: Netns, family: Literal[4, 6], hook: str, *rules: str) -> Iterator[None]:
    """A NAT chain with these rules. What was translated before is forgotten, and with the rules what was by them."""
    table = f"fault_{hook}"
    priority = -100 if hook == "prerouting" else 100
    netns.flush_conntrack()
    netns.add_nft_rule(_ip(family), table, f"type nat hook {hook} priority {priority};", "\n".join(rules))
    try:
        yield
    finally:
        netns.tool(["nft", "delete", "table", _ip(family), table])
        netns.flush_conntrack()


@contextlib.contextmanager
def _clients(
    attempts: Mapping[Pod, int], address: str, *, udp: bool
) -> Iterator[Callable[[], Callable[[], dict[str, Tally]]]]:
    """Processes in their pods, ready to try. Call to have them all begin, and what that returns for the tallies."""
    what = {"dst": address, "port": SERVED, "timeout_s": SYN_TIMEOUT_S, "udp": udp, "wait": True}
    with contextlib.ExitStack() as stack:
        children = {
            pod.owner: stack.enter_context(pod.child("attempts", count=count, **what))
            for pod, count in attempts.items()
        }
        for child in children.values():
            child.answer()  # ready

        def begin() -> Callable[[], dict[str, Tally]]:
            for child in children.values():
                child.tell()
            return lambda: {owner: Tally(**child.answer()) for owner, child in children.items()}

        yield begin


def _fullest_table() -> int:
    """Entries of the fullest connection table of all network namespaces that a process or a name holds."""
    paths: dict[int, str] = {}
    for path in (*Path("/run/netns").glob("*"), *Path("/proc").glob("[0-9]*/ns/net")):
        with contextlib.suppress(OSError):  # it ended meanwhile
            paths[os.stat(path).st_ino] = str(path)

    def count() -> int:
        return int(Path("/proc/sys", *COUNT.split(".")).read_text())

    fullest = 0
    for found in paths.values():
        with contextlib.suppress(OSError):
            fullest = max(fullest, inside(found, count))
    return fullest


# ----------------------------------------------------------------------------------------------------
# No entry to be had


def _snat_clash(case: Case) -> tuple[int, int]:
    done = share_snat_port(case.lab, {case.pod: case.count + 1}, case.peer, family=case.fault.family)
    return done.lost[case.pod.owner], done.counter


def _snat_clash_input(case: Case) -> tuple[int, int]:
    """The pod itself translates what reaches it: the entry is refused last, after its INPUT rules."""
    pod, peer = case.pod, case.peer
    rule = f"ip daddr {pod.ipv4} udp dport {SERVED} snat to {_endpoint(peer.ipv4, SNAT_PORT)}"
    with (
        pod.sink(SERVED, echo=True),
        _translated(pod, 4, "input", rule),
        _clients({peer: case.count + 1}, pod.ipv4, udp=True) as begin,
    ):
        before = pod.conntrack()["insert_failed"]
        tally = begin()()[peer.owner]
        lost = tally.sent - tally.connected
        return lost, settled(lambda: pod.conntrack()["insert_failed"] - before, lost)


def _snat_exhausted(case: Case) -> tuple[int, int]:
    pod, peer, node = case.pod, case.peer, case.lab.node
    source = _endpoint(peer.gateway_ipv4, f"{SNAT_PORT}-{SNAT_PORT + SNAT_RANGE - 1}")
    rule = f"ip daddr {peer.ipv4} tcp dport {SERVED} snat to {source}"
    with (
        peer.tcp_server(SERVED),
        _translated(node, 4, "postrouting", rule),
        pod.tcp_held(peer.ipv4, SERVED, SNAT_RANGE),
    ):
        before = node.conntrack()["insert_failed"]
        lost = pod.tcp_connect(peer.ipv4, SERVED, case.count, SYN_TIMEOUT_S).timed_out
        return lost, settled(lambda: node.conntrack()["insert_failed"] - before, lost)


def _table_full(case: Case) -> tuple[int, int]:
    done = fill_table(case.lab, {case.pod: case.count}, case.peer, case.culprit, family=case.fault.family)
    return done.lost[case.pod.owner], done.counter


def _chain_too_long(case: Case) -> tuple[int, int]:
    """One-way flows until the hash chains are too long for `count` of them."""
    lab, node, pod, peer = case.lab, case.lab.node, case.pod, case.peer
    sent, most = 0, FEW_BUCKETS * CHAIN_MAX
    with peer.sink(OTHER) as sink, pod.child("flows", dst=peer.ipv4, port=OTHER, first_sport=5_000) as flows:
        node.flush_conntrack()
        before = node.conntrack()["insert_failed"]

        def failed() -> int:
            return node.conntrack()["insert_failed"] - before

        try:
            with lab.host_sysctl(BUCKETS, FEW_BUCKETS):
                # What has not arrived is asked first: to read the statistics takes a change of namespace.
                while (lost := sent - sink.received()) < case.count or failed() < case.count:
                    if sent >= most:
                        raise LabError(f"{sent} flows in {FEW_BUCKETS} buckets, and all passed: a kernel before 5.15?")
                    # Never more at once than may still fail, once the chains (two for each flow) may be too long.
                    far_off = sent < FEW_BUCKETS * CHAIN_MIN // 8
                    sent += int(flows.ask("64" if far_off else str(max(1, case.count - lost))))
                settled(lambda: sink.received() + failed(), sent)
        finally:
            node.flush_conntrack()
        return sent - sink.received(), failed()


# ----------------------------------------------------------------------------------------------------
# Entries that mislead, or are missing


def _insert_race(case: Case) -> tuple[int, int]:
    """Two datagrams of a new connection at once, and a service that picks a backend at random for each."""
    node, pod, backends = case.lab.node, case.pod, (case.peer, case.culprit)
    service = f"ip daddr {_service(case.lab, 10)} udp dport 53"
    rules = (
        f"{service} numgen random mod 2 0 dnat to {_endpoint(backends[0].ipv4, 53)}",
        f"{service} dnat to {_endpoint(backends[1].ipv4, 53)}",
    )
    with (
        contextlib.ExitStack() as stack,
        _translated(node, 4, "prerouting", *rules),
        pod.child("twins", dst=_service(case.lab, 10), port=53, sockets=100) as twins,
    ):
        sinks = [stack.enter_context(backend.sink(53)) for backend in dict.fromkeys(backends)]
        before = node.conntrack()["clashres"]
        sent, deadline = 0, time.monotonic() + RACE_S
        while (resolved := node.conntrack()["clashres"] - before) < 1 and time.monotonic() < deadline:
            sent += int(twins.ask())
        return sent - settled(lambda: sum(sink.received() for sink in sinks), sent), resolved


def _service(lab: Lab, number: int) -> str:
    """The address of a service, which no pod has."""
    return f"10.96.{lab.subnet}.{number}"


@contextlib.contextmanager
def _forgotten(lab: Lab, client: Pod, server: Pod, count: int) -> Iterator[Server]:
    """Connections through a service that the node has forgotten, and will not learn again from their middle."""
    service = _service(lab, 1)
    rule = f"ip daddr {service} tcp dport 80 dnat to {_endpoint(server.ipv4, 8080)}"
    with (
        server.tcp_server(8080) as accepted,
        _translated(lab.node, 4, "prerouting", rule),
        client.tcp_held(service, 80, count),
    ):
        loose = lab.node.sysctl(LOOSE)
        try:
            lab.node.sysctl(LOOSE, 0)
            lab.node.flush_conntrack()
            yield accepted
        finally:
            lab.node.sysctl(LOOSE, loose)


def _invalid_rst(case: Case) -> tuple[int, int]:
    """What the server writes reaches the client from an address it never talked to."""
    with _forgotten(case.lab, case.pod, case.peer, case.count) as server:
        before = case.pod.snmp()["TcpOutRsts"]
        written = server.write()
        return written, settled(lambda: case.pod.snmp()["TcpOutRsts"] - before, written)


def _invalid_drop(case: Case) -> tuple[int, int]:
    """As before, but the node drops what it cannot match to a connection, as kube-proxy's rules do."""
    node, (server, client) = case.lab.node, case.ends
    with _forgotten(case.lab, client, server, case.count) as accepted:
        rule = "tcp sport 8080 ct state invalid counter drop"
        node.add_nft_rule("inet", "fault_invalid", "type filter hook forward priority 0;", rule)
        try:
            written = accepted.write_once()
            return written, settled(lambda: node.nft_counter("inet", "fault_invalid"), written)
        finally:
            node.tool(["nft", "delete", "table", "inet", "fault_invalid"])


def _stale_dnat(case: Case) -> tuple[int, int]:
    """A backend with an address of its own ends, and the client's socket goes on to use the old translation."""
    node, pod, peer, service = case.lab.node, case.pod, case.peer, _service(case.lab, 10)
    backend = f"10.97.{case.lab.subnet}.{peer.number}"
    rule = f"ip daddr {service} udp dport 53 dnat to {_endpoint(backend, 53)}"
    with contextlib.ExitStack() as stack:
        peer.ip(f"addr add {backend}/32 dev eth0")
        here = stack.enter_context(contextlib.ExitStack())
        here.callback(peer.ip, f"addr del {backend}/32 dev eth0")
        node.ip(f"route add {backend}/32 via {peer.ipv4}")
        here.callback(node.ip, f"route del {backend}/32 via {peer.ipv4}")
        here.enter_context(peer.sink(53, echo=True, address=f"::ffff:{backend}"))
        stack.enter_context(_translated(node, 4, "prerouting", rule))
        client = stack.enter_context(pod.child("talk", dst=service, port=53))
        if client.ask("1") != 1:
            raise LabError(f"the service {service} in front of {peer.owner} does not answer.")
        here.close()
        before = node.snmp()["IpExtInNoRoutes"]
        lost = case.count - int(client.ask(str(case.count)))
        return lost, settled(lambda: node.snmp()["IpExtInNoRoutes"] - before, lost)


# ----------------------------------------------------------------------------------------------------

_NF = "NETFILTER_DROP"
_fault = partial(Fault, at="node", tracked=True)

FAULTS = (
    _fault("snat-clash", "the node translates datagrams of many source ports to one source port",
           _snat_clash, "ct-snat-port-clash", _NF, "conntrack insert_failed", hook="POST_ROUTING"),
    _fault("snat-clash-v6", "the same over IPv6",
           _snat_clash, "ct-snat-port-clash", _NF, "conntrack insert_failed", hook="POST_ROUTING", family=6),
    _fault("snat-clash-input", "the pod's own INPUT hook translates many source ports to one",
           _snat_clash_input, "ct-snat-port-clash", _NF, "conntrack insert_failed", at="pod", hook="LOCAL_IN"),
    _fault("snat-exhausted", "TCP through a range of ten source ports, all in use",
           _snat_exhausted, "snat-port-exhaustion", _NF, "conntrack insert_failed", hook="POST_ROUTING"),
    _fault("table-full", "the node's connection table is full, held by another pod (host-wide, a second)",
           _table_full, "ct-table-full", _NF, "conntrack drop - insert_failed", hook="PRE_ROUTING", host_wide=True),
    _fault("table-full-v6", "the same over IPv6",
           _table_full, "ct-table-full", _NF, "conntrack drop - insert_failed", hook="PRE_ROUTING", family=6,
           host_wide=True),
    _fault("chain-too-long", "too few hash buckets for the connections there are (a guest of scripts/vm only)",
           _chain_too_long, "ct-chain-too-long", _NF, "conntrack insert_failed", hook="POST_ROUTING",
           host_wide=True, vm_only=True),
    _fault("insert-race", "two first datagrams at once through a DNS service: the kernel mends it, nothing is lost",
           _insert_race, "ct-insert-race-dns", None, "conntrack clashres", lossless=True),
    _fault("invalid-rst", "the node forgot translated connections: answers arrive untranslated and are reset",
           _invalid_rst, "ct-invalid-rst", "NO_SOCKET", "TcpOutRsts", at="pod"),
    _fault("invalid-drop", "the node forgot translated connections and drops what is INVALID",
           _invalid_drop, "ct-invalid-drop-asym", _NF, "nft inet forward rule counter", hook="FORWARD"),
    _fault("stale-dnat", "a UDP socket goes on to send to a backend that is gone",
           _stale_dnat, "stale-udp-dnat", "IP_INNOROUTES", "IpExtInNoRoutes"),
)  # fmt: skip
