"""Faults by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Literal

from k8sdiag.host.lab import conntrack
from k8sdiag.host.lab.fault import Case, Fault, settled
from k8sdiag.host.lab.traffic import UNROUTED

SPOOFED_SOURCE = "192.0.2.66"  # TEST-NET-1


def _counted_by_snmp(case: Case, send: Callable[[Case], int]) -> tuple[int, int]:
    """What `send` says it lost, and by how much the counter of the fault's name grew."""
    netns, name = case.pod if case.fault.at == "pod" else case.lab.node, case.fault.counter_name
    before = netns.snmp()[name]
    dropped = send(case)
    return dropped, settled(lambda: netns.snmp()[name] - before, case.count)


def _closed_udp(case: Case) -> int:
    case.peer.udp(case.address(case.pod), 8125, case.count)
    return case.count


def _closed_tcp(case: Case) -> int:
    return case.peer.tcp_connect(case.pod.ipv4, 8080, case.count).refused


def _rp_filter(case: Case) -> int:
    """The pod's way back to the source leads elsewhere than eth0, and strict reverse-path filtering is on."""
    case.pod.ip(f"route add {SPOOFED_SOURCE}/32 dev lo")
    try:
        case.pod.sysctl("net.ipv4.conf.eth0.rp_filter", 1)
        case.peer.udp(case.pod.ipv4, 5555, case.count, source=SPOOFED_SOURCE)
    finally:
        case.pod.sysctl("net.ipv4.conf.eth0.rp_filter", 0)
        case.pod.ip(f"route del {SPOOFED_SOURCE}/32 dev lo")
    return case.count


def _udp_rcvbuf(case: Case) -> int:
    with case.pod.udp_full(8126):  # the first drop: it told that the buffer is full
        case.peer.udp(case.pod.ipv4, 8126, case.count - 1, size=512)
    return case.count


def _no_route(case: Case) -> int:
    case.pod.udp(UNROUTED, 6666, case.count)
    return case.count


_CHAINS = {"PRE_ROUTING": "prerouting", "LOCAL_IN": "input", "FORWARD": "forward", "LOCAL_OUT": "output"}


def _nft_drop(case: Case) -> tuple[int, int]:
    """An nft rule `udp dport 1111 counter drop` in a chain of its own at the fault's hook."""
    fault = case.fault
    netns = case.pod if fault.at == "pod" else case.lab.node
    if fault.hook == "INGRESS":
        family, hook = "netdev", f"ingress device {case.pod.veth} priority 0"
    else:
        family, hook = "inet", f"{_CHAINS[fault.hook or '']} priority {-300 if fault.hook == 'PRE_ROUTING' else 0}"
    table = f"fault_{fault.name.replace('-', '_')}"
    sender, receiver = case.ends
    netns.add_nft_rule(family, table, f"type filter hook {hook};", "udp dport 1111 counter drop")
    try:
        sender.udp(case.address(receiver), 1111, case.count)
        return case.count, settled(lambda: netns.nft_counter(family, table), case.count)
    finally:
        netns.tool(["nft", "delete", "table", family, table])


def _iptables_drop(case: Case, binary: str, table: str, match: tuple[str, ...] = ()) -> tuple[int, int]:
    """A DROP rule in the namespace the fault is at."""
    netns = case.pod if case.fault.at == "pod" else case.lab.node
    chain, port = _CHAINS[case.fault.hook or ""].upper(), 2222
    sender, receiver = case.ends
    rule = [chain, "-p", "udp", "--dport", str(port), "-d", receiver.ipv4, *match, "-j", "DROP"]
    netns.tool([binary, "-w", "-t", table, "-I", *rule])
    try:
        sender.udp(receiver.ipv4, port, case.count)
        return case.count, settled(lambda: netns.iptables_counter(binary, table, chain, port), case.count)
    finally:
        netns.tool([binary, "-w", "-t", table, "-D", *rule])


def _tc_ingress(case: Case) -> tuple[int, int]:
    # Classic BPF, because it needs no clang: if IPv4 and UDP to port 3333, return TC_ACT_SHOT (2), else 0.
    # Dropping everything would also drop, and count, what happens to pass by.
    bytecode = "8,40 0 0 12,21 0 5 2048,48 0 0 23,21 0 3 17,40 0 0 36,21 0 1 3333,6 0 0 2,6 0 0 0,"
    node, veth = case.lab.node, case.pod.veth
    node.tool(["tc", "qdisc", "add", "dev", veth, "clsact"])
    try:
        node.tool(["tc", "filter", "add", "dev", veth, "ingress", "bpf", "da", "bytecode", bytecode])
        case.pod.udp(case.peer.ipv4, 3333, case.count)
        return case.count, settled(lambda: node.qdisc_dropped(veth, "clsact"), case.count)
    finally:
        node.tool(["tc", "qdisc", "del", "dev", veth, "clsact"])


def _tbf_overflow(case: Case) -> tuple[int, int]:
    """A token bucket on the way to the pod: 16 bytes a second, one packet long.

    So it is full after two packets, drops all that follow, and nothing trickles out while they are counted.
    """
    node, pod, port, sent = case.lab.node, case.pod, 4444, 0
    tbf = ["dev", pod.veth, "root", "tbf", "rate"]

    def send(count: int) -> int:
        return case.peer.udp(pod.ipv4, port, count, size=1200).sent

    def dropped() -> int:
        return node.qdisc_dropped(pod.veth, "tbf")

    with pod.sink(port) as sink:
        node.tool(["tc", "qdisc", "add", *tbf, "128bit", "burst", "1600", "limit", "1600"])
        try:
            while dropped() == 0 and sent < 10:
                sent += send(1)
            sent += send(case.count - 1)
            counter = settled(dropped, case.count)
            # Let the queue run empty before it is deleted: a purged queue would be one more dropped packet.
            # The new rate is looked at when the next packet comes.
            node.tool(["tc", "qdisc", "change", *tbf, "1gbit", "burst", "1mb", "limit", "1mb"])
            sent += send(1)
            return sent - settled(sink.received, sent - case.count), counter
        finally:
            node.tool(["tc", "qdisc", "del", "dev", pod.veth, "root"])


def _softnet_backlog(case: Case) -> tuple[int, int]:
    """Bursts longer than the CPU's backlog may be, reaching the pod all at once.

    The node must cut them into datagrams because its veth takes no offload. The kernel accepts one more than
    netdev_max_backlog says.
    """
    lab, pod, port, backlog, longest, sent = case.lab, case.pod, 7777, 16, 60, 0
    before = pod.device_rx_dropped("eth0")

    def dropped() -> int:
        return pod.device_rx_dropped("eth0") - before

    lab.node.ip(f"link set {pod.veth} gso_max_segs 1")
    try:
        with pod.sink(port) as sink, case.peer.child("bursts", dst=pod.ipv4, port=port, size=64) as burst:
            burst.ask("[]")  # from now on it is ready
            # Another packet in the same backlog at the same moment changes the outcome: make up for it.
            for _ in range(5):
                missing = case.count - (sent - sink.received())
                if missing <= 0:
                    break
                full, rest = divmod(missing, longest - backlog - 1)
                bursts = [longest] * full + ([rest + backlog + 1] if rest else [])
                with lab.host_sysctl("net.core.netdev_max_backlog", backlog):
                    sent += burst.ask(json.dumps(bursts))
                settled(lambda: sink.received() + dropped(), sent)
            return sent - sink.received(), dropped()
    finally:
        lab.node.ip(f"link set {pod.veth} gso_max_segs 65535")


def _benign_noise(case: Case) -> tuple[int, int]:
    """Events of kfree_skb that mean nothing: k8sdiag must call none of them a problem."""
    pod, count = case.pod, case.count
    pod.send_by("unread", count=count)
    pod.send_by("tcp-endings", count=count)
    case.peer.udp(pod.ipv4, 40053, count, sport=53)  # a DNS answer for a resolver that has closed its socket
    case.lab.node.send_by("frames", device=pod.veth, own_mac=pod.mac, address=pod.ipv4, count=count)
    return 0, 0


def _by_snmp(
    name: str,
    says: str,
    send: Callable[[Case], int],
    cause: str,
    reason: str,
    counter_name: str,
    *,
    at: Literal["pod", "node"] = "pod",
    family: Literal[4, 6] = 4,
) -> Fault:
    act = partial(_counted_by_snmp, send=send)
    return Fault(name, says, act, cause, reason, counter_name, at=at, family=family)


def _by_nft(
    name: str, says: str, hook: str, *, at: Literal["pod", "node"] = "node", family: Literal[4, 6] = 4
) -> Fault:
    counter_name = f"nft {'netdev ingress' if hook == 'INGRESS' else f'inet {_CHAINS[hook]}'} rule counter"
    return Fault(name, says, _nft_drop, "networkpolicy-drop", "NETFILTER_DROP", counter_name, at, hook, family)


def _by_iptables(
    name: str,
    says: str,
    binary: str,
    table: str,
    hook: str,
    *,
    at: Literal["pod", "node"] = "node",
    match: tuple[str, ...] = (),
) -> Fault:
    act = partial(_iptables_drop, binary=binary, table=table, match=match)
    counter_name = f"{binary} {table} {_CHAINS[hook].upper()} rule counter"
    return Fault(name, says, act, "networkpolicy-drop", "NETFILTER_DROP", counter_name, at, hook)


_ALL_FAULTS = (
    _by_snmp("closed-port", "UDP to a port of the pod that nobody listens on",
             _closed_udp, "closed-port", "NO_SOCKET", "UdpNoPorts"),
    _by_snmp("closed-port-v6", "the same over IPv6",
             _closed_udp, "closed-port", "NO_SOCKET", "Udp6NoPorts", family=6),
    _by_snmp("closed-port-tcp", "TCP to a port of the pod that nobody listens on (refused)",
             _closed_tcp, "closed-port", "NO_SOCKET", "TcpOutRsts"),
    _by_nft("nft-forward", "nft drop in the node's FORWARD hook, of what the pod sends", "FORWARD"),
    _by_nft("nft-forward-v6", "the same over IPv6", "FORWARD", family=6),
    _by_nft("nft-prerouting", "nft drop in the node's PREROUTING hook, before conntrack, of what the pod sends",
            "PRE_ROUTING"),
    _by_nft("nft-ingress", "nft drop at ingress (netdev) of the node's veth, of what the pod sends", "INGRESS"),
    _by_nft("nft-input", "nft drop in the pod's own INPUT hook", "LOCAL_IN", at="pod"),
    _by_nft("nft-output", "nft drop in the pod's own OUTPUT hook (its sends fail with EPERM)", "LOCAL_OUT", at="pod"),
    _by_iptables("iptables-nft", "iptables-nft DROP in the node's FORWARD chain",
                 "iptables-nft", "filter", "FORWARD"),
    _by_iptables("iptables-legacy", "iptables-legacy DROP in the node's FORWARD chain",
                 "iptables-legacy", "filter", "FORWARD"),
    _by_iptables("iptables-raw", "iptables-legacy DROP in raw PREROUTING, which looks like a full conntrack table",
                 "iptables-legacy", "raw", "PRE_ROUTING"),
    _by_iptables("iptables-input", "iptables-legacy DROP of new connections in the pod's INPUT chain, the pod tracking",
                 "iptables-legacy", "filter", "LOCAL_IN", at="pod", match=("-m", "conntrack", "--ctstate", "NEW")),
    Fault("tc-ingress", "a tc BPF program on the node's veth drops what the pod sends",
          _tc_ingress, "tc-bpf-drop", "TC_INGRESS", "tc -s qdisc clsact dropped", at="node"),
    Fault("tbf-overflow", "the bandwidth limit (tbf) on the way to the pod overflows",
          _tbf_overflow, "qdisc-overlimit", "QDISC_DROP", "tc -s qdisc tbf dropped", at="node"),
    _by_snmp("rp-filter", "reverse-path filter in the pod: the way back is another device",
             _rp_filter, "rp-filter", "IP_RPFILTER", "TcpExtIPReversePathFilter"),
    _by_snmp("udp-rcvbuf", "the pod's UDP socket has a tiny buffer and nobody reads it",
             _udp_rcvbuf, "udp-rcvbuf", "SOCKET_RCVBUFF", "UdpRcvbufErrors"),
    _by_snmp("no-route", "the pod sends to an address the node has no route for",
             _no_route, "no-route", "IP_INNOROUTES", "IpExtInNoRoutes", at="node"),
    Fault("softnet-backlog", "the CPU's backlog overflows on the way into the pod (host-wide, a moment)",
          _softnet_backlog, "softnet-backlog", "CPU_BACKLOG", "rx_dropped of eth0", host_wide=True),
    *conntrack.FAULTS,
    Fault("benign-noise", "closed sockets, late DNS answers, other hosts' frames: events without a fault",
          _benign_noise, None, None, "none"),
)  # fmt: skip

FAULTS: dict[str, Fault] = {fault.name: fault for fault in _ALL_FAULTS}
