"""Every fact once: what a source can say, before anybody draws conclusions from it.

Facts are what a trace file holds, one JSON line each, told apart by "type". Names, not positions, reach the file:
a new field takes a default, and readers skip what they do not know. Times are CLOCK_BOOTTIME in nanoseconds.

Facts that describe a lasting state (who owns a namespace, what a number is called) may be stated again at any
time; saying the same twice changes nothing. That is what lets a trace be cut and entered at its checkpoints.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

OwnerKind: TypeAlias = Literal["pod", "container", "netns", "process", "host", "service", "node", "external", "unknown"]
Confidence: TypeAlias = Literal["proven", "likely", "possible"]
How: TypeAlias = Literal["socket", "cgroup", "netns", "veth", "conntrack", "ip", "static", "none"]
REMEMBERED_NS = 600 * 10**9
"""How long owners that are gone stay known, ns of event time: their last packets are counted after them."""
KEYS_IN_USE = 20_000
"""A source uses none of its drop keys whose id lies further back than this behind the newest."""

Status: TypeAlias = Literal["full", "inferred", "counters", "missing"]


class Fact(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True):
    """Root of all facts."""


class Node(Fact, frozen=True, tag="node"):
    """The machine that was watched."""

    name: str
    """Host name. uname(2), or the name the node has in the cluster."""
    kernel: str
    """Kernel release. uname(2)."""
    netns: int
    """Inode of the node's own network namespace. /proc/1/ns/net, or ours where that may not be read."""
    architecture: str = ""
    tool: str = ""
    """Version of k8sdiag."""


class Clock(Fact, frozen=True, tag="clock"):
    """How to turn event time into wall time; stated again when the wall clock was stepped."""

    boot_to_wall_ns: int
    """CLOCK_REALTIME minus CLOCK_BOOTTIME, ns."""


class Capability(Fact, frozen=True, tag="capability"):
    """How well a signal can be seen here."""

    signal: str
    """What it answers, such as "drops" or "symbols"."""
    status: Status
    hook: str = ""
    """The rung of its ladder that is in use."""
    why: str = ""
    """Why it is not "full", and what that blinds; or a remark."""


class Reason(Fact, frozen=True, tag="reason"):
    """What this kernel calls a drop reason. enum skb_drop_reason in BTF; numbers differ between kernels."""

    number: int
    name: str


class Symbol(Fact, frozen=True, tag="symbol"):
    """The kernel function an address lies in. /proc/kallsyms."""

    address: int
    name: str


class NetnsOwner(Fact, frozen=True, tag="netns_owner"):
    """A network namespace and whose it is, for a span of time: inodes are given out again by the kernel."""

    netns: int
    """Inode. stat of /proc/PID/ns/net."""
    kind: OwnerKind
    name: str
    """Pod name, container id, or name under /run/netns."""
    netns_cookie: int = 0
    namespace: str = ""
    """Kubernetes namespace."""
    workload: str = ""
    """Kind/name, such as Deployment/cart; empty where not known."""
    uid: str = ""
    how: How = "none"
    """What told it: "cgroup" from a process in it, "netns" from its name under /run/netns."""
    confidence: Confidence = "proven"
    from_t_ns: int = 0
    until_t_ns: int | None = None
    """When it was seen to be gone; None while it lives."""
    source: str = ""
    """The file or interface behind it, in words for `k8sdiag pods`."""


class HostPod(Fact, frozen=True, tag="host_pod"):
    """A pod in the node's own network namespace: it owns no namespace, only its sockets are its own."""

    uid: str
    name: str
    namespace: str = ""
    workload: str = ""
    from_t_ns: int = 0
    until_t_ns: int | None = None
    source: str = ""


class Link(Fact, frozen=True, tag="link"):
    """A network device. RTM_GETLINK, asked inside its namespace."""

    netns: int
    ifindex: int
    name: str
    netns_cookie: int = 0
    kind: str = ""
    """IFLA_INFO_KIND: veth, bridge, vxlan …; empty for physical devices and loopback."""
    peer_ifindex: int = 0
    """IFLA_LINK: for veth the other end."""
    peer_netns: int = 0
    """Inode of the namespace the peer lives in (IFLA_LINK_NETNSID resolved), 0 where unknown."""
    peer_netns_cookie: int = 0
    mtu: int = 0
    from_t_ns: int = 0
    until_t_ns: int | None = None


class Address(Fact, frozen=True, tag="address"):
    """An address that is local to a namespace. RTM_GETADDR, asked inside it."""

    netns: int
    address: str
    """Text form, IPv4 dotted, IPv6 compressed."""
    netns_cookie: int = 0
    from_t_ns: int = 0
    until_t_ns: int | None = None


class DropKey(Fact, frozen=True, tag="drop_key"):
    """What a counted drop has in common with others of its line; `id` is used by Drops."""

    id: int
    reason: int
    """enum skb_drop_reason, named by a Reason; 0 before 5.17."""
    location: int
    """Return address in the dropping function, named by a Symbol."""
    netns: int = 0
    """Inode of the network namespace the packet was in, 0 unknown."""
    netns_cookie: int = 0
    netns_from: str = ""
    """DEVICE, SOCKET, ROUTE or CONNTRACK: the pointer that led to it."""
    ifindex: int = 0
    """skb->dev."""
    iif: int = 0
    """skb->skb_iif, the device it came in by."""
    hook: str = ""
    """Netfilter hook for netfilter drops, UNKNOWN where the stack does not tell or its limit was reached."""
    conntrack: str = ""
    """UNTRACKED, NEW (not yet confirmed), CONFIRMED, UNKNOWN; empty for none."""
    family: int = 0
    """2, 10, or 0 for what is not IP."""
    protocol: int = 0
    src: str = ""
    dst: str = ""
    sport: int = 0
    dport: int = 0
    folded: bool = False
    """Addresses and ports were given up for want of room: this line stands for many flows."""
    verdict: str = ""
    """What conntrack had to do with a netfilter drop: RULE (nothing), REFUSED (no entry was allocated), CLASH,
    CHAIN_TOO_LONG, INSERT_FAILED (the entry was dying), UNKNOWN; empty for other drops. No drop: CLASH_RESOLVED."""
    probed: bool = False
    """A probe on the refusing function saw it; else the CPU's own conntrack statistics told, read at the drop."""
    segment: str = ""
    """Of TCP: SYN, SYN_ACK, FIN, RST, OTHER."""
    nat: str = ""
    """SRC, DST or BOTH where conntrack translates the connection: then addresses and ports are those the packet was
    sent with, and the reply's stand below."""
    reply_src: str = ""
    reply_dst: str = ""
    reply_sport: int = 0
    reply_dport: int = 0
    is_reply: bool = False
    """Of a translated connection: the packet answers, and `reply_*` is the way of what it answers."""


class Drops(Fact, frozen=True, tag="drops"):
    """Drops counted since the last tick, one column entry per DropKey. skb:kfree_skb."""

    key: tuple[int, ...]
    skbs: tuple[int, ...]
    """Buffers freed, count: what nft, qdisc, softnet and SNMP counters count."""
    packets: tuple[int, ...]
    """Wire packets, count: a GSO buffer counts its segments."""
    bytes: tuple[int, ...]
    """skb->len."""


class ClashesResolved(Fact, frozen=True, tag="clashes_resolved"):
    """Races that conntrack repaired since the last tick, one column entry per DropKey: no packet was dropped.

    Told by a probe on nf_ct_resolve_clash; without kprobes only ConntrackStats counts them.
    """

    key: tuple[int, ...]
    packets: tuple[int, ...]


def refused(drop: int, insert_failed: int, chain_too_long: int | None) -> int:
    """Packets for which no entry was allocated, at least.

    An unresolved clash raises drop and insert_failed; a chain that is too long insert_failed alone, as an entry does
    that was dying.
    """
    return max(0, drop - max(0, insert_failed - (chain_too_long or 0)))


class ConntrackStats(Fact, frozen=True, tag="conntrack_stats"):
    """The connection table of one network namespace: gauges of now, and counts since the watch began.

    None: this kernel does not count it, or it could not be read. /proc/net/stat/nf_conntrack in the namespace.
    """

    netns: int
    netns_cookie: int = 0
    count: int = 0
    """Entries in use, in this namespace alone."""
    max: int | None = None
    """net.netfilter.nf_conntrack_max: one value for the machine, compared with each namespace's own count."""
    buckets: int | None = None
    """net.netfilter.nf_conntrack_buckets: one hash table for the machine."""
    found: int = 0
    """Source ports that address translation looked at and found taken."""
    invalid: int = 0
    insert_failed: int = 0
    drop: int = 0
    early_drop: int = 0
    clash_resolved: int | None = None
    chain_too_long: int | None = None
    until_t_ns: int | None = None
    """When the namespace was seen to be gone."""


class ConntrackTable(Fact, frozen=True, tag="conntrack_table"):
    """Who holds the entries of one namespace's connection table, as of one reading of it. IPCTNL_MSG_CT_GET.

    Columns, one line for each combination; lines beyond the largest are folded into ones with empty addresses.
    """

    netns: int
    t_ns: int
    """When the reading ended."""
    netns_cookie: int = 0
    entries_total: int = 0
    zone: tuple[int, ...] = ()
    source: tuple[str, ...] = ()
    """Who opened: source of the original direction."""
    target: tuple[str, ...] = ()
    """Who answers: source of the reply direction, the backend behind a service."""
    protocol: tuple[int, ...] = ()
    state: tuple[str, ...] = ()
    """Of TCP, as in `conntrack -L`: ESTABLISHED, TIME_WAIT …; else empty."""
    entries: tuple[int, ...] = ()
    unreplied: tuple[int, ...] = ()
    """Entries that saw no reply."""
    timeout_s: tuple[int, ...] = ()
    """Sum of the seconds that the entries have left."""


class Sample(Fact, frozen=True, tag="sample"):
    """One dropped packet: rate-limited, headers only."""

    key: int
    t_ns: int
    length: int
    """skb->len, bytes."""
    headers: str = ""
    """Hexadecimal, from the network header, cut after the innermost transport header."""
    stack: tuple[int, ...] = ()
    """Return addresses, innermost first, named by Symbols."""


class Lost(Fact, frozen=True, tag="lost"):
    """What was not counted, since the start of the watch. None is hidden: each figure is a lower bound of a loss."""

    events: int = 0
    """Drops the kernel counted and no program saw: recursion_misses, SNMP and softnet against our counts."""
    keys: int = 0
    """Drops for which the exact map had no room."""
    samples: int = 0
    """Samples held back by the rate limit: on purpose."""
    hooks: int = 0
    """Netfilter drops whose hook stayed UNKNOWN because of the stack limit; they are counted."""


class Cost(Fact, frozen=True, tag="cost"):
    """What watching costs, since its start."""

    cpu_s: float = 0.0
    """User and system time of this process. getrusage(2)."""
    rss_bytes: int = 0
    """Resident memory. /proc/self/statm."""
    map_bytes: int = 0
    """Kernel memory of the maps, bytes: entries × possible CPUs."""
    bpf_runs: int | None = None
    """Runs of the programs; None unless kernel.bpf_stats_enabled is 1."""
    bpf_ns: int | None = None


AnyFact: TypeAlias = (
    Node | Clock | Capability | Reason | Symbol | NetnsOwner | HostPod | Link | Address
    | DropKey | Drops | ClashesResolved | ConntrackStats | ConntrackTable | Sample | Lost | Cost
)  # fmt: skip
STATE_FACTS = (
    Node, Clock, Capability, Reason, Symbol, NetnsOwner, HostPod, Link, Address, ConntrackStats, ConntrackTable
)  # fmt: skip
"""Kinds that describe a lasting state: a checkpoint of a trace states them again."""
