"""Causes 35 to 44: the packet arrived, and the endpoint could not take it."""

from __future__ import annotations

from k8sdiag.causes.benign import TCP, UDP
from k8sdiag.causes.cause import Case, Cause, Drop, Severities, within
from k8sdiag.snapshot import Fix, RuledOut


def _is_receive_buffer(drop: Drop) -> bool:
    if drop.reason == "SOCKET_RCVBUFF":
        return True
    return not drop.reason and drop.location == "udp_queue_rcv_one_skb"


def _is_closed_port(drop: Drop) -> bool:
    if drop.reason == "NO_SOCKET":
        return drop.protocol in (TCP, UDP)
    return not drop.reason and drop.location in ("__udp4_lib_rcv", "__udp6_lib_rcv")


def _ports(case: Case) -> list[tuple[str, int]]:
    return sorted({(row.protocol or "udp", row.dport) for row in case.rows if row.dport})


def _closed_port_fix(case: Case) -> tuple[Fix, ...]:
    ports = _ports(case)
    named = ", ".join(f"{protocol}/{port}" for protocol, port in ports[:4]) or "the port"
    return (
        Fix(
            f"start what should listen on {named}, bind it to the pod's address, or stop sending to it",
            within(case, "ss -lntup"),
            f"network namespace {case.netns}",
            "packets reach the address, and no socket is bound there",
            "none: this only lists listeners",
            "nothing to undo",
        ),
    )


def _receive_buffer_fix(_case: Case) -> tuple[Fix, ...]:
    return (
        Fix(
            "let the program ask for a bigger receive buffer (SO_RCVBUF) or read faster; the ceiling is host-wide",
            "sysctl -w net.core.rmem_max=$((4 * $(sysctl -n net.core.rmem_max)))",
            "the whole node; the program must call setsockopt(SO_RCVBUF) again",
            "the socket's receive queue was full when the datagram arrived",
            "memory: up to the new ceiling for each socket that asks for it",
            "sysctl -w net.core.rmem_max=$(($(sysctl -n net.core.rmem_max) / 4))",
        ),
    )


CAUSES = (
    Cause(
        slug="udp-rcvbuf",
        title="a socket's receive buffer is full",
        severities=Severities(0.1, 20.0, 3),
        claims=_is_receive_buffer,
        feels="Datagrams (DNS, metrics, logs) are lost while the pod is busy.",
        proof="Drop reason SOCKET_RCVBUFF; RcvbufErrors in the namespace's UDP counters.",
        ruled_out=(RuledOut("closed-port", "a socket was found; its queue had no room"),),
        fix=_receive_buffer_fix,
    ),
    Cause(
        slug="closed-port",
        title="nothing listens on the port these packets go to",
        severities=Severities(0.5, 50.0, 5),
        claims=_is_closed_port,
        feels="Connection refused, or datagrams that nobody answers.",
        proof="Drop reason NO_SOCKET in the receiving namespace; UdpNoPorts counts the same datagrams.",
        ruled_out=(RuledOut("networkpolicy-drop", "the packet passed every filter and reached the transport layer"),),
        fix=_closed_port_fix,
    ),
)
