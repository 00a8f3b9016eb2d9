"""What the engine knows at one moment, frozen: the one thing that every face (screen, report, JSON) reads.

Field names are those of the public JSON. None means "not measured", 0 means "measured, and there were none".
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from k8sdiag.facts import Capability, Confidence, Cost, How, Lost, Node, OwnerKind, refused

Severity: TypeAlias = Literal["critical", "warning", "info"]
Direction: TypeAlias = Literal["in", "out", "local", "forward", ""]


class Owner(msgspec.Struct, frozen=True):
    """Who a packet, a device or a socket belongs to, and how that is known."""

    kind: OwnerKind
    name: str
    namespace: str | None = None
    workload: str | None = None
    uid: str | None = None
    how: How = "none"
    confidence: Confidence = "possible"

    @property
    def label(self) -> str:
        """namespace/name for pods, else the name with its kind where that says more."""
        if self.namespace:
            return f"{self.namespace}/{self.name}"
        return self.name if self.kind in ("netns", "host", "external") else f"{self.kind}:{self.name}"

    @property
    def identity(self) -> tuple[str, str | None, str, str | None]:
        """What makes it the same owner, however it was found."""
        return self.kind, self.namespace, self.name, self.uid

    @property
    def group(self) -> object:
        """What its findings are gathered under: the Kubernetes namespace, or the owner itself outside of any."""
        return self.namespace or self.identity


class Tuple(msgspec.Struct, frozen=True):
    """One direction of a connection."""

    src: str
    dst: str
    sport: int
    dport: int


class DropRow(msgspec.Struct, frozen=True):
    """Drops in the window that have everything but the source port in common."""

    reason: str
    """Name of enum skb_drop_reason, or "" before 5.17."""
    location: str
    """Kernel function."""
    hook: str | None
    cause: str
    """Slug of the catalogue."""
    benign: bool
    owner: Owner
    peer: Owner | None
    service: str | None
    direction: Direction
    family: Literal["ipv4", "ipv6"] | None
    protocol: str | None
    src: str | None
    dst: str | None
    sport: int | None
    dport: int | None
    reply: Tuple | None
    """Of a translated connection: how its reply would travel. `src` … `dport` are then as the packet was sent."""
    conntrack: str | None
    """untracked, new, confirmed, unknown; None for none."""
    device: str | None
    netns: int
    """Inode of the network namespace the packet died in, 0 unknown."""
    skbs: int
    packets: int
    bytes: int
    flows: int | None
    """Distinct 5-tuples; None where they were folded for want of room."""
    rate_pps: float
    """Packets per second over the last seconds."""
    inside: str = ""
    """What to put before a command to run it in that namespace; empty for the node's own."""
    segment: str | None = None
    """Of TCP: syn, syn_ack, fin, rst, other."""
    nat: str | None = None
    """src, dst, both: what conntrack translates."""
    verdict: str | None = None
    """What conntrack had to do with a netfilter drop, see DropKey.verdict."""
    confidence: Confidence = "proven"
    """Of the cause."""


class DropCount(msgspec.Struct, frozen=True):
    packets: int
    benign_packets: int


class OwnerConntrack(msgspec.Struct, frozen=True):
    """What conntrack did to one owner in the window; None where that is known per network namespace only."""

    entries: int | None
    """Entries that it opened and that stand in a table, at the last reading."""
    insert_failed: int
    table_full: int
    early_drop: int | None
    clash_resolved: int | None
    invalid: int | None


class OwnerRow(msgspec.Struct, frozen=True):
    owner: Owner
    drops: DropCount
    rate_pps: float
    causes: tuple[CauseCount, ...]
    conntrack: OwnerConntrack | None = None
    tcp: None = None
    encap: None = None


class CauseCount(msgspec.Struct, frozen=True):
    cause: str
    packets: int
    connections: int | None


class NamespaceRow(msgspec.Struct, frozen=True):
    """Drops of a Kubernetes namespace; `namespace` is None for all owners that are in none."""

    namespace: str | None
    drops: DropCount
    causes: tuple[CauseCount, ...]
    tcp: None = None
    encap: None = None


class HolderRow(msgspec.Struct, frozen=True):
    """An owner's part in a connection table."""

    owner: Owner
    entries: int
    """That it opened."""
    as_target: int
    """That lead to it."""
    unreplied: int
    """Of those it opened, how many saw no reply."""


class ProtocolRow(msgspec.Struct, frozen=True):
    protocol: str
    state: str | None
    entries: int
    unreplied: int
    timeout_s: float
    """Mean of the seconds that the entries have left."""


class RepairRow(msgspec.Struct, frozen=True):
    """An owner's packets that raced for a connection and lived on."""

    owner: Owner
    packets: int


class ConntrackRow(msgspec.Struct, frozen=True):
    """The connection table of one network namespace: gauges at the end of the window, counts within it."""

    netns: int
    owner: Owner
    count: int
    max: int | None
    buckets: int | None
    new: None
    """No kernel counts new connections any more."""
    insert_failed: int
    drop: int
    early_drop: int
    clash_resolved: int | None
    invalid: int
    chain_too_long: int | None
    found: int
    growth_per_s: float
    """Entries more per second, over the window."""
    full_in_s: float | None
    """Until the table is full at this rate; None where it does not grow or has no limit."""
    full_count: int | None = None
    """Entries when allocation was last seen to be refused in the window, and the limit then."""
    full_max: int | None = None
    inside: str = ""
    """What to put before a command to run it in that namespace; empty for the node's own."""
    table_t_ns: int | None = None
    """When the table itself was last read; None: not yet, and what follows is empty."""
    entries: int | None = None
    """In the table at that time."""
    unreplied: int | None = None
    stale: int | None = None
    """Entries towards an address that a pod had which is gone."""
    zones: dict[str, int] = {}
    """Entries by conntrack zone."""
    holders: tuple[HolderRow, ...] = ()
    """Largest first; what nobody known opened is the row of an owner of kind "external" or "unknown"."""
    protocols: tuple[ProtocolRow, ...] = ()
    repairs: tuple[RepairRow, ...] = ()
    """Whose clashes were resolved in the window, where a probe sees them."""

    @property
    def refused(self) -> int:
        """Packets for which no entry was allocated, at least. See facts.refused()."""
        return refused(self.drop, self.insert_failed, self.chain_too_long)


class Evidence(msgspec.Struct, frozen=True):
    name: str
    value: float | str
    unit: str
    source: str


class Fix(msgspec.Struct, frozen=True):
    action: str
    command: str
    scope: str
    why: str
    risk: str
    undo: str


class RuledOut(msgspec.Struct, frozen=True):
    cause: str
    because: str


class Finding(msgspec.Struct, frozen=True):
    """One explained trouble of one namespace (or of one owner outside Kubernetes)."""

    cause: str
    severity: Severity
    confidence: Confidence
    ignored: bool
    title: str
    victims: tuple[Owner, ...]
    culprits: tuple[Owner, ...]
    packets: int
    connections: int | None
    evidence: tuple[Evidence, ...]
    fix: tuple[Fix, ...]
    ruled_out: tuple[RuledOut, ...]


class Snapshot(msgspec.Struct, frozen=True):
    """State at `t_ns` of what happened in the last `window_s` seconds."""

    t_ns: int
    window_s: float
    boot_to_wall_ns: int
    node: Node | None
    findings: tuple[Finding, ...]
    namespaces: tuple[NamespaceRow, ...]
    owners: tuple[OwnerRow, ...]
    drops: tuple[DropRow, ...]
    """The top rows; those beyond the limit are folded into one `__other__` row per owner and cause."""
    total: DropCount
    skbs: int
    """All drops of the window, benign ones included: equals the kernel's own count."""
    rate_pps: float
    lost: Lost
    cost: Cost | None
    capabilities: tuple[Capability, ...]
    conntrack: tuple[ConntrackRow, ...] = ()
    """Tables in use, fullest first."""
    narrowed: str = ""
    """In words, to what the rows were narrowed; empty for everything."""
