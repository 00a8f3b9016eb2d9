"""Drops that a healthy machine makes all day: counted and shown on request, never a finding.

Which they are was read from the kernel's own use of the reasons; a reason that also stands for real loss is
benign only together with what tells the two apart (a port, an address, a function).
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k8sdiag.causes.cause import Drop

BENIGN = "benign"
_REASONS = frozenset(
    [
        "SKB_CONSUMED",
        "CONSUMED",
        "QUEUE_PURGE",
        "SOCKET_CLOSE",
        "UNIX_DISCONNECT",
        "UNIX_SKIP_OOB",
        "OTHERHOST",
        "UNHANDLED_PROTO",
        "PACKET_SOCK_ERROR",
        "MAC_IEEE_MAC_CONTROL",
        "UNICAST_IN_L2_MULTICAST",
        "LOCAL_MAC",
        "SOCKET_FILTER",
        "TCP_FASTOPEN",
        "TCP_OLD_DATA",
        "TCP_OFOMERGE",
        "TCP_OLD_SEQUENCE",
        "TCP_OLD_ACK",
        "TCP_TOO_OLD_ACK",
        "TCP_OFO_DROP",
        "DUP_FRAG",
        "TCP_RESET",
        "TCP_CLOSE",
        "TCP_FLAGS",
        "TCP_ABORT_ON_DATA",
        "TCP_INVALID_SEQUENCE",
        "TCP_INVALID_END_SEQUENCE",
        "TCP_INVALID_ACK_SEQUENCE",
        "TCP_ACK_UNSENT_DATA",
        "TCP_INVALID_SYN",
        "CAN_RX_INVALID_FRAME",
        "CANFD_RX_INVALID_FRAME",
        "CANXL_RX_INVALID_FRAME",
        "QDISC_CONGESTED",
    ]
)
_REASON_BEGINNINGS = ("IPV6_NDISC_", "PSP_")
_LOCATIONS = frozenset(
    [
        "skb_queue_purge",
        "skb_queue_purge_reason",
        "skb_rbtree_purge",
        "__sk_destruct",
        "sk_stream_kill_queues",
        "tcp_write_queue_purge",
        "inet_sock_destruct",
        "inet_csk_destroy_sock",
        "tpacket_rcv",
    ]
)
_LOCATION_BEGINNINGS = ("unix_", "netlink_", "packet_")
# Where a kernel gives no reason (before 5.17, and NOT_SPECIFIED after), a closing TCP connection ends its last
# segments in these.
_TCP_ENDINGS = frozenset(("tcp_v4_rcv", "tcp_v6_rcv", "tcp_rcv_state_process", "tcp_v4_do_rcv", "tcp_v6_do_rcv"))
_NO_SOCKET_LOCATIONS = frozenset(("__udp4_lib_rcv", "__udp6_lib_rcv"))
# Reasons by which somebody meant to refuse a packet, whatever it was addressed to.
_DELIBERATE = frozenset(("NETFILTER_DROP", "TC_INGRESS", "TC_EGRESS", "QDISC_DROP", "QDISC_OVERLIMIT", "CPU_BACKLOG"))
TCP, UDP, DNS = 6, 17, 53


def is_benign(drop: Drop) -> bool:
    if drop.reason in _REASONS or drop.reason.startswith(_REASON_BEGINNINGS):
        return True
    if drop.location in _LOCATIONS or drop.location.startswith(_LOCATION_BEGINNINGS):
        return True
    if drop.reason in _DELIBERATE or drop.verdict:
        return False
    if drop.family == 0:
        return True
    if drop.reason in ("", "NOT_SPECIFIED") and drop.location == "icmpv6_rcv":
        return True  # kernels up to 6.1 end every ICMPv6 message that they have dealt with there
    if not drop.reason and drop.location == "ip_rcv_core":
        return True  # before 5.17: a frame for another host, which a bridge flooded or a sniffer let in
    finds_no_socket = drop.reason == "NO_SOCKET" or (not drop.reason and drop.location in _NO_SOCKET_LOCATIONS)
    if finds_no_socket and drop.protocol == UDP and drop.sport == DNS:
        return True  # the answer came after the resolver had given up and closed its socket
    if finds_no_socket and drop.protocol == TCP and drop.segment == "RST":
        return True  # it ends what has ended already
    if drop.reason in ("", "NOT_SPECIFIED") and drop.protocol == TCP and drop.location in _TCP_ENDINGS:
        return True
    return _is_for_many(drop.dst) or drop.src == "0.0.0.0"


def _is_for_many(address: str) -> bool:
    """Multicast and broadcast: announced to all, and most are not interested. A directed broadcast is not told."""
    if not address:
        return False
    parsed = ip_address(address)
    return parsed.is_multicast or address == "255.255.255.255"
