"""What a word of the tool's output means: a cause, a drop reason, or a field of the JSON.

Causes speak for themselves (causes/), fields through the docstrings beneath them, so that each text stands in one
place. Only what the kernel's drop reasons mean is written down here.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from k8sdiag import facts, report
from k8sdiag.causes import ALL, BENIGN, BY_SLUG, Case, cause_of, decide
from k8sdiag.causes.benign import DNS, TCP, UDP
from k8sdiag.causes.cause import Cause, Drop, Severities
from k8sdiag.errors import UsageError
from k8sdiag.snapshot import ConntrackRow, DropRow, Owner

REASONS = {
    # made by a decision of somebody
    "NETFILTER_DROP": "A filter rule, a chain's policy or connection tracking refused the packet.",
    "TC_INGRESS": "A classifier or BPF program on the device's receiving side threw the packet away.",
    "TC_EGRESS": "A classifier or BPF program on the device's sending side threw the packet away.",
    "XDP": "An XDP program, run in generic mode, threw the packet away before the network stack saw it.",
    "BPF_CGROUP_EGRESS": "A BPF program attached to the sender's control group refused the packet.",
    "SECURITY_HOOK": "A security module (SELinux, AppArmor, BPF LSM) refused the packet.",
    "XFRM_POLICY": "No IPsec policy allows the packet in the form in which it came.",
    "SOCKET_FILTER": "The filter that a program put on its own socket does not want the packet.",
    # queues
    "QDISC_DROP": "The queueing discipline of the sending device had no room or chose to drop.",
    "QDISC_OVERLIMIT": "The sending device's queue had reached its limit.",
    "QDISC_BURST_DROP": "The queueing discipline dropped several queued packets at once to make room.",
    "QDISC_CONGESTED": "Active queue management dropped the packet early, so that the sender slows down.",
    "FQ_FLOW_LIMIT": "One flow had more packets waiting in the fq queue than a single flow may have.",
    "FQ_BAND_LIMIT": "A priority band of the fq queue was full.",
    "FQ_HORIZON_LIMIT": "The packet was to be sent further in the future than the fq queue accepts.",
    "CPU_BACKLOG": "The input queue of the CPU that had to process the packet was full.",
    "SOCKET_BACKLOG": "The socket was busy in its program, and the queue for that time was full.",
    "SOCKET_RCVBUFF": "The receiving socket's buffer was full: its program reads too slowly for what comes in.",
    "PROTO_MEM": "The memory that all sockets of this protocol may use together was used up.",
    "NOMEM": "The kernel found no memory for the packet.",
    "PFMEMALLOC": "The packet took the memory kept for emergencies, and is not needed to get out of one.",
    "FULL_RING": "The ring of a tun, tap or veth device was full: its reader is too slow.",
    # endpoints
    "NO_SOCKET": "No socket was bound to the address and port that the packet was sent to.",
    "TCP_LISTEN_OVERFLOW": "The listening socket's queue of connections that wait for accept() was full.",
    "TCP_ZEROWINDOW": "Data came although the receiver had announced that it can take none.",
    "TCP_OVERWINDOW": "The segment lies beyond the window that the receiver had announced.",
    "TCP_RFC7323_PAWS": "Its timestamp is older than one seen before: a late duplicate, or two hosts share an address.",
    "TCP_OFO_QUEUE_PRUNE": "Segments waiting for a missing one were thrown away for want of memory.",
    "TCP_FLAGS": "The combination of flags means nothing in the state that the connection is in.",
    "TCP_RESET": "The segment carried a reset and ended its connection: its buffer has done its work.",
    "TCP_CLOSE": "The segment belongs to a connection that is closing or closed.",
    "TCP_ABORT_ON_DATA": "Data came for a connection that its program had already closed.",
    "TCP_OLD_DATA": "A retransmission of data that had arrived before.",
    "TCP_OFOMERGE": "Data that is already held in the queue of segments out of order.",
    "TCP_OFO_DROP": "A segment out of order that duplicates what is already queued.",
    "TCP_OLD_SEQUENCE": "The segment lies wholly before what is expected: a duplicate.",
    "TCP_OLD_ACK": "It acknowledges less than was acknowledged before: overtaken on its way.",
    "TCP_TOO_OLD_ACK": "It acknowledges something so old that it cannot belong to the present exchange.",
    "TCP_ACK_UNSENT_DATA": "It acknowledges data that was never sent.",
    "TCP_INVALID_SEQUENCE": "The sequence number lies outside the window, as with keep-alive duplicates.",
    "TCP_INVALID_END_SEQUENCE": "The segment ends outside the window.",
    "TCP_INVALID_ACK_SEQUENCE": "The acknowledgement lies outside of what can be acknowledged.",
    "TCP_INVALID_SYN": "A SYN came in the middle of an established connection.",
    "TCP_FASTOPEN": "A segment of a fast-open handshake that was no longer needed.",
    "TCP_CSUM": "The checksum of the TCP segment is wrong: it was damaged on its way, or never filled in.",
    "UDP_CSUM": "The checksum of the UDP datagram is wrong: it was damaged on its way, or never filled in.",
    "ICMP_CSUM": "The checksum of the ICMP message is wrong.",
    # routing and neighbours
    "IP_RPFILTER": "Reverse-path filtering: a reply would not leave by the device that the packet came in by.",
    "IP_INNOROUTES": "A packet that came in has no route to its destination.",
    "IP_OUTNOROUTES": "A packet made on this machine has no route to its destination.",
    "IP_INADDRERRORS": "The destination is no address of this machine and forwarding is off, or it is not valid here.",
    "IP_INVALID_SOURCE": "The source address is one that no packet may have, such as a multicast address.",
    "IP_INVALID_DEST": "The destination address is one that no packet may have.",
    "IP_LOCALNET": "A loopback address on a packet that came over a network.",
    "IP_LOCAL_SOURCE": "The packet came from outside with an address of this machine as its source.",
    "IP_CSUM": "The checksum of the IPv4 header is wrong.",
    "IP_INHDR": "The IP header is malformed, or shorter or longer than the packet.",
    "IP_NOPROTO": "Nothing on this machine takes the protocol inside the IP packet.",
    "IPV6DISABLED": "IPv6 is switched off on the device (net.ipv6.conf.DEVICE.disable_ipv6).",
    "PKT_TOO_BIG": "The packet is larger than the way ahead allows, and may not be cut.",
    "PKT_TOO_SMALL": "The packet is shorter than its headers claim.",
    "NEIGH_CREATEFAIL": "No entry could be made for the next hop: the neighbour table is full.",
    "NEIGH_FAILED": "The next hop did not answer ARP or neighbour discovery.",
    "NEIGH_QUEUEFULL": "Too many packets already wait for the next hop's answer.",
    "NEIGH_DEAD": "The next hop's entry was being removed.",
    "FRAG_REASM_TIMEOUT": "Fragments waited in vain for the rest of their packet.",
    "DUP_FRAG": "A fragment that had come before.",
    # tunnels and devices
    "VXLAN_VNI_NOT_FOUND": "No VXLAN device here has the network identifier that the packet carries.",
    "VXLAN_INVALID_HDR": "The VXLAN header is malformed.",
    "TUNNEL_TXINFO": "The tunnel was given no instructions where to send the packet.",
    "NO_TX_TARGET": "The device knows nobody to send the packet to.",
    "RECURSION_LIMIT": "The packet went through too many devices stacked on each other, as in a tunnel inside itself.",
    "DEV_READY": "The device was not up.",
    "OTHERHOST": "The frame is addressed to another machine, and came by flooding or to a sniffing device.",
    "UNHANDLED_PROTO": "No part of the kernel takes this kind of frame (LLDP, spanning tree and such).",
    "MAC_IEEE_MAC_CONTROL": "A control frame between neighbouring devices, such as flow control.",
    "LOCAL_MAC": "A frame with the device's own address as its source came back to it.",
    "UNICAST_IN_L2_MULTICAST": "A packet for one address came in a frame for many.",
    # ends of life that are no loss
    "CONSUMED": "The packet was used up: it reached its end in the ordinary way.",
    "SKB_CONSUMED": "The packet was used up: it reached its end in the ordinary way.",
    "QUEUE_PURGE": "A queue was emptied because its owner went away.",
    "SOCKET_CLOSE": "A program closed a socket with data in it.",
    "UNIX_DISCONNECT": "A Unix socket was taken from its partner with data on the way.",
    "UNIX_SKIP_OOB": "Out-of-band data of a Unix socket that nobody read.",
    "PACKET_SOCK_ERROR": "A sniffing program's socket could not take its copy; the packet itself went on.",
    "CAN_RX_INVALID_FRAME": "A malformed frame of a CAN bus.",
    "CANFD_RX_INVALID_FRAME": "A malformed frame of a CAN FD bus.",
    "CANXL_RX_INVALID_FRAME": "A malformed frame of a CAN XL bus.",
    "NOT_SPECIFIED": "The code that dropped the packet does not say why; the function that did it has to tell.",
}  # fmt: skip
"""What the kernel means by a reason, one sentence each. Names as in enum skb_drop_reason, without prefix."""

REASON_BEGINNINGS = {
    "IPV6_NDISC_": "A message of IPv6 neighbour discovery that is malformed or meant for others.",
    "PSP_": "The PSP encryption of the connection does not allow the packet.",
}
_GENERIC = "Not known to this version; if it is a drop reason of this kernel, the function named with it tells more."

_SECTIONS = {
    "schema": "Version of this object's layout; it changes only with what stands here.",
    "status": "The verdict, which is also the exit code: critical before unknown before warning before ok.",
    "window": "The span of time that is judged; everything else counts within it.",
    "window.start": "When it began. RFC 3339, UTC.",
    "window.duration_s": "How long it lasted, seconds.",
    "node": "The machine that was watched; null where the trace does not say.",
    "node.cni": "The container network in use; null: not found out yet.",
    "filtered": "Whether -n or --pod narrowed what follows.",
    "findings": "What is wrong, worst first: one entry per cause and Kubernetes namespace.",
    "namespaces": "Drops per Kubernetes namespace; namespace null stands for owners that are in none.",
    "owners": "Drops per owner: a pod, a container, a named network namespace, the host.",
    "drops": "Drops by what they have in common, most packets first; the sums of all rows always hold.",
    "lost": "What was not counted: every figure is the lower bound of a loss.",
    "capabilities": "How well each signal can be seen on this node.",
    "capabilities.status": "full: seen itself; inferred: from other signals; counters: as sums; missing: not at all.",
    "self": "What watching cost; null where the trace does not say.",
    "owner.kind": "pod, container, netns, process, host, service, node, external or unknown.",
    "owner.how": "What led to the owner: socket, cgroup, netns, veth, conntrack, ip, static or none.",
}
"""What no field of a class says, because it is about the object as a whole."""

_TOLD_BY: dict[str, type] = {
    "LostRow": facts.Lost,
    "CapabilityRow": facts.Capability,
    "SelfRow": facts.Cost,
    "NodeRow": facts.Node,
}
"""Rows of the JSON whose fields are described where they are measured."""


def text(topic: str, width: int) -> str:
    """What `topic` means, in lines of at most `width` columns (commands are not broken). Raises UsageError."""
    if topic in BY_SLUG:
        return "\n".join(_cause(BY_SLUG[topic], width))
    if topic == BENIGN:
        return "\n".join(_benign(width))
    reason = topic.upper().replace("-", "_").removeprefix("SKB_DROP_REASON_")
    if reason in REASONS or reason.startswith(tuple(REASON_BEGINNINGS)):
        return "\n".join(_reason(reason, width))
    described = _described()
    if topic in described:
        return "\n".join(_field(topic, described, width))
    close = difflib.get_close_matches(topic.lower().replace("_", "-"), [*BY_SLUG, BENIGN], 3)
    close += difflib.get_close_matches(reason, REASONS, 3, 0.75)
    close += difflib.get_close_matches(topic, described, 3)
    if not close and re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", topic):
        return "\n".join(_reason(reason, width))
    hint = (
        f"Did you mean {', '.join(close[:5])}?"
        if close
        else "`k8sdiag explain --list` and --fields list what there is."
    )
    raise UsageError(f"{topic!r} is no cause, drop reason or field. {hint}")


def listing() -> str:
    """Slug and title of every cause."""
    width = max(len(cause.slug) for cause in ALL)
    lines = [f"{cause.slug:{width}}  {cause.title}" for cause in ALL]
    return "\n".join([*lines, f"{BENIGN:{width}}  what a healthy machine drops all day; never a finding"])


def severities() -> str:
    """The table of rates from which each cause is a warning or critical."""
    width = max(len(cause.slug) for cause in ALL)
    lines = [f"{'cause':{width}}  {'warning':>9}  {'critical':>9}  {'at least':>8}"]
    for cause in ALL:
        rates = cause.severities
        lines.append(
            f"{cause.slug:{width}}  {_rate(rates.warning_pps):>9}  {_rate(rates.critical_pps):>9}  {rates.at_least:>8}"
        )
    return "\n".join([*lines, "", "Packets per second over the window; at least so many packets; below that, info."])


def fields() -> str:
    """Every field of `check -o json` with its type, one a line."""
    rows = list(_fields(report.Check))
    width = max(len(path) for path, _, _ in rows)
    return "\n".join(f"{path:{width}}  {kind}" for path, kind, _ in rows)


def _rate(pps: float | None) -> str:
    return "never" if pps is None else f"{pps:g}/s"


# ----------------------------------------------------------------------------------------------------
# Causes and reasons


def _cause(cause: Cause, width: int) -> list[str]:
    lines = [cause.slug, *_wrapped(cause.title[0].upper() + cause.title[1:] + ".", width), ""]
    lines += _titled("What the user notices", [cause.feels], width)
    lines += _titled("How it is known", [cause.proof, f"Confidence: {cause.confidence} at best."], width)
    ruled_out = [f"{other.cause}: {other.because}." for other in cause.ruled_out]
    ruled_out += [
        f"{other.cause}, where each packet has a verdict: {other.because}." for other in cause.ruled_out_by_verdict
    ]
    lines += _titled("What it is not", ruled_out, width)
    lines += _titled("How bad it is", [_severities(cause.severities)], width)
    reasons = [name for name in REASONS if cause.slug in _causes_of(name)]
    lines += _titled("Drop reasons that lead here", [", ".join(reasons)] if reasons else [], width)
    fixes = _fixes(cause, width)
    return lines + (["What to do (NAMES stand for the node's)", *fixes] if fixes else [])


def _severities(rates: Severities) -> str:
    named = [
        f"{name} from {pps:g} packets/s on"
        for name, pps in (("warning", rates.warning_pps), ("critical", rates.critical_pps))
        if pps is not None
    ]
    if not named:
        return "Never more than an information."
    sentence = f"{', '.join(named)}, and from {rates.at_least} packets on; below that an information."
    return sentence[0].upper() + sentence[1:]


_NETNS = 4026531840
"""Stands for the network namespace of a finding, in fixes made for nobody in particular."""
_ALL_RISEN = ConntrackRow(
    netns=_NETNS, owner=Owner("unknown", ""), count=1, max=1, buckets=1, new=None, insert_failed=1, drop=2,
    early_drop=1, clash_resolved=1, invalid=1, chain_too_long=1, found=1, growth_per_s=0.0, full_in_s=None,
)  # fmt: skip


def _fixes(cause: Cause, width: int) -> list[str]:
    """The cause's fixes as they would be for a drop of which nothing is known, with all commands they may name."""
    commands: dict[tuple[str, ...], list[str]] = {}
    for location in ("nft_do_chain", ""):
        for fix in cause.fix(Case([_nobodys_drop(cause.slug, location)])):
            scope = fix.scope.replace(str(_NETNS), "INODE")
            known = commands.setdefault((fix.action, scope, fix.why, fix.risk, fix.undo), [])
            if fix.command not in known:
                known.append(fix.command)
    lines: list[str] = []
    for (action, scope, why, risk, undo), several in commands.items():
        lines += _wrapped(f"{action}:", width, "  ")
        lines += [f"      {command}" for command in several]
        for words in (f"where: {scope}", f"why: {why}", f"risk: {risk}"):
            lines += _wrapped(words, width, "    ")
        lines.append(f"    undo: {undo}")
    return lines


def _nobodys_drop(cause: str, location: str) -> DropRow:
    return DropRow(
        reason="", location=location, hook=None, cause=cause, benign=False, owner=Owner("unknown", ""), peer=None,
        service=None, direction="", family=None, protocol=None, src=None, dst=None, sport=None, dport=None, reply=None,
        conntrack=None, device=None, netns=_NETNS, skbs=1, packets=1, bytes=0, flows=1, rate_pps=0.0,
    )  # fmt: skip


def _typical(reason: str) -> Drop:
    """A drop for that reason of an ordinary packet from one host to another (RFC 5737)."""
    return Drop(reason, "", "", "", 2, TCP, "192.0.2.1", "192.0.2.2", 40000, 8080)


def _drops_for(reason: str) -> list[Drop]:
    """Drops for that reason that differ in what else is known of them; the ordinary one first."""
    ordinary = _typical(reason)
    drops = [
        ordinary,
        ordinary._replace(segment="OTHER"),
        ordinary._replace(protocol=UDP, nat="DST", conntrack="CONFIRMED"),
    ]
    if reason == "NETFILTER_DROP":
        verdicts = ("REFUSED", "CLASH", "CHAIN_TOO_LONG")
        drops += [ordinary._replace(verdict=verdict) for verdict in verdicts]
        drops += [
            ordinary._replace(verdict="CLASH", protocol=UDP, dport=DNS),
            ordinary._replace(verdict="CLASH", nat="SRC", reply_dport=1024),
            ordinary._replace(verdict="RULE", hook="FORWARD"),
            ordinary._replace(verdict="REFUSED", conntrack="CONFIRMED"),
        ]
    return drops


def _causes_of(reason: str) -> list[str]:
    """Slugs of all causes that a drop for that reason may have, the ordinary one first."""
    # With all counters risen, what can only be decided by them leads to the cause that they stand for.
    # A packet whose new port was taken is not the only one: ports=2.
    slugs = (decide(cause_of(drop), _ALL_RISEN, (_ALL_RISEN,), ports=2) for drop in _drops_for(reason))
    return list(dict.fromkeys(slugs))


def _benign(width: int) -> list[str]:
    lines = [
        BENIGN,
        *_wrapped(
            "Drops that a healthy machine makes all day: counted, shown with --all-drops, never a finding.", width
        ),
        "",
    ]
    reasons = [name for name in REASONS if cause_of(_typical(name)) == BENIGN]
    reasons += [f"{beginning}…" for beginning in REASON_BEGINNINGS]
    lines += _titled("Always", [", ".join(reasons)], width)
    also = [
        "What is sent to a multicast or broadcast address, unless somebody refused it on purpose.",
        "Datagrams from port 53 that came after the resolver had closed its socket (NO_SOCKET).",
        "TCP resets that met no socket, and late segments of connections that are gone.",
        "What is not IP, and what Unix, netlink and packet sockets throw away.",
    ]
    return lines + _titled("Under circumstances", also, width)


def _reason(reason: str, width: int) -> list[str]:
    means = REASONS.get(reason) or next(
        (words for beginning, words in REASON_BEGINNINGS.items() if reason.startswith(beginning)), _GENERIC
    )
    cause = cause_of(_typical(reason))
    lines = [reason, *_wrapped(means, width), ""]
    if cause == BENIGN:
        lines += _wrapped("It is benign: a healthy machine does this all day; counted, and never a finding.", width)
    else:
        lines += _wrapped(f"It leads to the cause {cause}: {BY_SLUG[cause].title}.", width)
    others = [slug for slug in _causes_of(reason) if slug not in (cause, BENIGN)]
    if others:
        lines += _wrapped(f"Told apart from it by more than the reason: {', '.join(others)}.", width)
    if reason == "NO_SOCKET":
        lines += _wrapped("A datagram from port 53 is benign: an answer for a resolver that had given up.", width)
    return [*lines, "", f"More: k8sdiag explain {cause}"]


# ----------------------------------------------------------------------------------------------------
# Fields


def _field(path: str, described: dict[str, tuple[str, str]], width: int) -> list[str]:
    kind, words = described[path]
    lines = [f"{path}: {kind}", *_wrapped(words or "No more than its name says.", width)]
    below = [name for name in described if name.startswith(f"{path}.") and "." not in name[len(path) + 1 :]]
    return lines + (
        ["", *_wrapped("Holds: " + ", ".join(name[len(path) + 1 :] for name in below), width)] if below else []
    )


def _described() -> dict[str, tuple[str, str]]:
    """Type and meaning of every field by dotted path."""
    return {path: (kind, words) for path, kind, words in _fields(report.Check)}


def _fields(record: type, above: str = "") -> Iterator[tuple[str, str, str]]:
    hints, docs = get_type_hints(record), _docs(record)
    if record.__name__ in _TOLD_BY:
        docs = _docs(_TOLD_BY[record.__name__]) | docs
    for field in msgspec.structs.fields(record):
        path = f"{above}{field.encode_name}"
        kind = hints[field.name]
        inner = _record_in(kind)
        words = docs.get(field.name, "") or _SECTIONS.get(".".join(path.split(".")[-2:]), "")
        if kind is type(None):
            words = words or "Not measured yet: always null."
        if inner is not None and not words:
            words = " ".join((inner.__doc__ or "").split())
        yield path, _type_name(kind), words
        if inner is not None:
            yield from _fields(inner, f"{path}.")


def _docs(record: type) -> dict[str, str]:
    """The docstring beneath each field of a class, from its source: Python itself does not keep them."""
    found: dict[str, str] = {}
    source = inspect.getsource(sys.modules[record.__module__])
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == record.__name__:
            for field, after in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                    and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                ):  # fmt: skip
                    found[field.target.id] = re.sub(r"\bNone\b", "null", " ".join(str(after.value.value).split()))
    return found


def _parts(kind: object) -> tuple[object, ...]:
    """The members of a union; a type that is none alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _record_in(kind: object) -> type | None:
    """The struct that a field holds: itself, in a tuple, or where it is not null."""
    for part in _parts(kind):
        if get_origin(part) is tuple:
            return _record_in(get_args(part)[0])
        if isinstance(part, type) and issubclass(part, msgspec.Struct):
            return part
    return None


_JSON_NAMES: dict[object, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "true|false",
    type(None): "null",
}


def _type_name(kind: object) -> str:
    names = []
    for part in _parts(kind):
        if get_origin(part) is tuple:
            names.append(f"[{_type_name(get_args(part)[0])}]")
        elif get_origin(part) is Literal:
            names += [f'"{value}"' for value in get_args(part)]
        else:
            names.append(_JSON_NAMES.get(part, "object"))
    return "|".join(names)


# ----------------------------------------------------------------------------------------------------


def _titled(title: str, sentences: list[str], width: int) -> list[str]:
    if not sentences:
        return []
    return [title, *(line for words in sentences for line in _wrapped(words, width, "  ")), ""]


def _wrapped(words: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(words, max(width, 30), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
