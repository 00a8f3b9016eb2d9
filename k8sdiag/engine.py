"""Folds facts into a Snapshot: whose are the drops (identity), how many (accounting), and why (causes).

Pure: no clock but that of the facts, no I/O. The same batches give the same Snapshots, live or from a file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec
from msgspec.structs import replace

from k8sdiag import causes
from k8sdiag.conntrack import Tables
from k8sdiag.facts import (
    KEYS_IN_USE,
    Capability,
    ClashesResolved,
    Clock,
    ConntrackStats,
    ConntrackTable,
    Cost,
    DropKey,
    Drops,
    Lost,
    Node,
    Reason,
    Sample,
    Symbol,
)
from k8sdiag.identity import Attribution, Identity
from k8sdiag.snapshot import (
    CauseCount,
    ConntrackRow,
    DropCount,
    DropRow,
    Finding,
    NamespaceRow,
    Owner,
    OwnerConntrack,
    OwnerRow,
    Snapshot,
    Tuple,
)
from k8sdiag.source import Batch

ROW_LIMIT = 500
RATE_NS = 5 * 10**9
"""Rates are those of the last five seconds: long enough not to flicker, short enough to see a change."""
SAMPLES_KEPT = 1000
FLOWS_KEPT = 4000
"""Flows of a window that are kept apart; in a flood of more, each goes under its owner and what explains it."""

_FAMILIES: dict[int, Literal["ipv4", "ipv6"]] = {2: "ipv4", 10: "ipv6"}
_PROTOCOLS = {1: "icmp", 2: "igmp", 4: "ipip", 6: "tcp", 17: "udp", 41: "ipv6", 47: "gre", 50: "esp",
              58: "icmpv6", 132: "sctp"}  # fmt: skip


class _Entry(NamedTuple):
    """What a count in the window stands for."""

    key: DropKey
    attribution: Attribution
    cause: str
    """Slug, or what causes.decide() makes one of."""


class _Count:
    """Mutable sums of one entry."""

    __slots__ = ("bytes", "packets", "skbs")

    def __init__(self) -> None:
        self.skbs = self.packets = self.bytes = 0

    def add(self, skbs: int, packets: int, length: int) -> None:
        self.skbs += skbs
        self.packets += packets
        self.bytes += length


class Engine:
    """Takes batches, keeps a window, gives Snapshots.

    `window_s` None keeps everything since the first batch; else what is older than that leaves again. `ignored`
    marks findings as expected; `keep` narrows everything to what concerns the owners it wants, which `narrowed` says
    in words: drops of which either end is one, and what statistics alone tell of a table that is theirs or that they
    fill. The tables stay whole, as they are shared.
    """

    def __init__(
        self,
        window_s: float | None = None,
        row_limit: int = ROW_LIMIT,
        ignored: Callable[[str, Owner], bool] = lambda _slug, _owner: False,
        keep: Callable[[Owner], bool] | None = None,
        narrowed: str = "",
    ) -> None:
        self.identity = Identity()
        self.samples: deque[Sample] = deque(maxlen=SAMPLES_KEPT)
        self._window_ns = None if window_s is None else round(window_s * 1e9)
        self._row_limit = row_limit
        self._ignored = ignored
        self._keep = keep
        self._narrowed = narrowed
        self._first_t_ns: int | None = None
        self._t_ns = 0
        self._clock = Clock(0)
        self._node: Node | None = None
        self._lost = Lost()
        self._cost: Cost | None = None
        self._capabilities: dict[str, Capability] = {}
        self._reasons: dict[int, str] = {}
        self._symbols: dict[int, str] = {}
        self._keys: dict[int, DropKey] = {}
        self._entries: dict[DropKey, _Entry] = {}
        self._entries_version = 0
        self._counts: dict[_Entry, _Count] = {}
        self._ticks: deque[tuple[int, dict[_Entry, _Count]]] = deque()
        self._tables = Tables(self.identity)
        self._totals: deque[tuple[int, Lost, Cost | None]] = deque([(0, Lost(), None)])
        """Losses and costs since the start of the watch, at each tick of the window and at the one before it."""

    def fold(self, batch: Batch) -> None:
        """Take in one batch."""
        is_first = self._first_t_ns is None
        if self._first_t_ns is None:
            self._first_t_ns = batch.t_ns
        self._t_ns = batch.t_ns
        for fact in batch.facts:
            match fact:
                case Drops():
                    self._count(fact, batch.t_ns)
                case DropKey():
                    self._keys[fact.id] = fact
                case Reason():
                    self._reasons[fact.number] = fact.name
                case Symbol():
                    self._symbols[fact.address] = fact.name
                case ClashesResolved() | ConntrackStats() | ConntrackTable():
                    self._track(fact, batch.t_ns, is_first=is_first)
                case Sample():
                    self.samples.append(fact)
                case Lost():
                    self._lost = fact
                case Cost():
                    self._cost = fact
                case Capability():
                    self._capabilities[fact.signal] = fact
                case Clock():
                    self._clock = fact
                case _:
                    if isinstance(fact, Node):
                        self._node = fact
                    self.identity.fold(fact)
        self.identity.forget(batch.t_ns)
        self._expire()

    def _track(self, fact: ClashesResolved | ConntrackStats | ConntrackTable, t_ns: int, *, is_first: bool) -> None:
        if isinstance(fact, ConntrackStats):
            self._tables.count(fact, t_ns, is_first=is_first)
        elif isinstance(fact, ConntrackTable):
            self._tables.read(fact)
        else:
            for key_id, packets in zip(fact.key, fact.packets, strict=True):
                self._tables.repair(self._keys[key_id], packets, t_ns)

    def _count(self, drops: Drops, t_ns: int) -> None:
        tick: dict[_Entry, _Count] = {}
        for key_id, skbs, packets, length in zip(drops.key, drops.skbs, drops.packets, drops.bytes, strict=True):
            if not skbs:
                continue
            entry = self._entry(self._keys[key_id], t_ns)
            if entry not in self._counts and len(self._counts) >= FLOWS_KEPT:
                entry = _folded(entry)
            for counts in (self._counts, tick):
                counts.setdefault(entry, _Count()).add(skbs, packets, length)
        self._ticks.append((t_ns, tick))

    def _entry(self, key: DropKey, t_ns: int) -> _Entry:
        if self._entries_version != self.identity.version or len(self._entries) > KEYS_IN_USE:
            self._entries = {}
            self._entries_version = self.identity.version
        known = self._entries.get(key)
        if known is None:
            drop = causes.Drop(
                self._reason(key.reason), self._symbol(key), key.hook, key.conntrack, key.family, key.protocol,
                key.src, key.dst, key.sport, key.dport, key.verdict, key.probed, key.segment, key.nat, key.reply_dport,
                key.is_reply,
            )  # fmt: skip
            known = self._entries[key] = _Entry(key, self.identity.attribute(key, t_ns), causes.cause_of(drop))
        return known

    def _expire(self) -> None:
        """Let go of ticks that left the window, and of keys that no source uses any more."""
        if len(self._keys) > 2 * KEYS_IN_USE:
            oldest = max(self._keys) - KEYS_IN_USE
            self._keys = {key_id: key for key_id, key in self._keys.items() if key_id > oldest}
        self._tables.expire(None if self._window_ns is None else self._t_ns - self._window_ns)
        if self._window_ns is None:
            # Ticks are only needed for rates then.
            while self._ticks and self._ticks[0][0] <= self._t_ns - RATE_NS:
                self._ticks.popleft()
            return
        self._totals.append((self._t_ns, self._lost, self._cost))
        start_ns = self._t_ns - self._window_ns
        while len(self._totals) > 1 and self._totals[1][0] <= start_ns:
            self._totals.popleft()
        while self._ticks and self._ticks[0][0] <= start_ns:
            for entry, old in self._ticks.popleft()[1].items():
                count = self._counts[entry]
                count.add(-old.skbs, -old.packets, -old.bytes)
                if not count.skbs:
                    del self._counts[entry]

    def zero(self) -> None:
        """Let the window begin now. What is known of namespaces, names and keys stays."""
        self._counts.clear()
        self._ticks.clear()
        self._totals.clear()
        self._totals.append((self._t_ns, self._lost, self._cost))
        self._first_t_ns = self._t_ns
        self._tables.zero(self._t_ns)

    @property
    def seconds(self) -> float:
        """Length of the window so far."""
        since = self._first_t_ns if self._first_t_ns is not None else self._t_ns
        watched_ns = self._t_ns - since
        return (watched_ns if self._window_ns is None else min(watched_ns, self._window_ns)) / 1e9

    def snapshot(self) -> Snapshot:
        """The state after the last batch."""
        tables = self._tables.rows(self._t_ns, self.seconds)
        rows, connections = self._rows(tables)
        window = causes.Window(self.seconds, rows, connections, tables)
        findings = causes.findings(window, self._ignored)
        _, lost, cost = self._totals[0]
        return Snapshot(
            t_ns=self._t_ns,
            window_s=window.seconds,
            boot_to_wall_ns=self._clock.boot_to_wall_ns,
            node=self._node,
            findings=tuple(finding for finding in findings if self._concerns(finding)),
            namespaces=_namespaces(rows, connections),
            owners=_owners(rows, connections, tables, self._wants),
            drops=tuple(_fold_rest(rows, self._row_limit)),
            total=_drop_count(rows),
            skbs=sum(row.skbs for row in rows),
            rate_pps=sum(row.rate_pps for row in rows if not row.benign),
            lost=_lost_since(lost, self._lost),
            cost=_cost_since(cost, self._cost),
            capabilities=tuple(self._capabilities.values()),
            narrowed=self._narrowed,
            conntrack=tables,
        )

    def _wants(self, owner: Owner | None) -> bool:
        return owner is not None and (self._keep is None or self._keep(owner))

    def _concerns(self, finding: Finding) -> bool:
        """Whether it is about owners that are wanted; its drops, where it has any, were chosen before."""
        return bool(finding.packets) or any(map(self._wants, (*finding.victims, *finding.culprits)))

    def _rows(self, tables: Sequence[ConntrackRow]) -> tuple[list[DropRow], causes.Connections]:
        """All lines of the window, largest first, and a count of distinct connections in any of them.

        Flows that differ in their source port only are one line.
        """
        recent: dict[_Entry, int] = {}
        oldest_ns = self._t_ns - RATE_NS
        for t_ns, tick in self._ticks:
            if t_ns > oldest_ns:
                for entry, count in tick.items():
                    recent[entry] = recent.get(entry, 0) + count.packets
        rate_s = max(min(self.seconds, RATE_NS / 1e9), 1e-9)
        lines: dict[tuple[object, ...], _Line] = {}
        for entry, count in self._counts.items():
            key = entry.key
            ident = (
                key.reason, self._symbol(key), key.hook, key.conntrack, key.family, key.protocol, key.netns,
                key.netns_cookie, key.src, key.dst, key.dport, key.folded, entry.attribution, entry.cause,
                key.verdict, key.probed, key.segment, key.nat, key.reply_src, key.reply_dst, key.reply_sport,
            )  # fmt: skip
            line = lines.get(ident)
            if line is None:
                line = lines[ident] = _Line(entry)
            line.count.add(count.skbs, count.packets, count.bytes)
            line.recent += recent.get(entry, 0)
            line.flows.add((key.protocol, key.src, key.sport, key.dst, key.dport))
            line.reply_ports.add(key.reply_dport)
        # An inode is given out again: the fullest table is that of the living namespace.
        table_of = {table.netns: table for table in reversed(tables)}
        ports: dict[tuple[object, ...], set[int]] = {}
        most_ports: dict[int, int] = {}
        waiting: dict[tuple[str, int], int] = {}
        for line in lines.values():
            key, cause = line.entry.key, line.entry.cause
            if cause == causes.UNDECIDED_PORT and not key.folded:
                tried = ports.setdefault(_translation(key), set())
                tried.update(line.reply_ports)
                most_ports[key.netns] = max(most_ports.get(key.netns, 0), len(tried))
            question = cause, causes.asked_of(cause, key.netns)
            waiting[question] = waiting.get(question, 0) + line.count.packets
        rows: list[DropRow] = []
        flows: dict[int, set[_Flow]] = {}
        for line in lines.values():
            key, cause = line.entry.key, line.entry.cause
            # What was folded for want of room is like the rest of its namespace.
            ports_tried = most_ports.get(key.netns, 0) if key.folded else len(ports.get(_translation(key), ()))
            packets = waiting[cause, causes.asked_of(cause, key.netns)]
            decided = causes.decide(cause, table_of.get(key.netns), tables, ports_tried, packets)
            row = self._row(line, rate_s, decided)
            if self._wants(row.owner) or self._wants(row.peer):
                rows.append(row)
                flows[id(row)] = line.flows

        def connections(chosen: Sequence[DropRow]) -> int | None:
            if any(row.flows is None for row in chosen):
                return None
            return len(set[_Flow]().union(*(flows[id(row)] for row in chosen)))

        return sorted(rows, key=_rank), connections

    def _symbol(self, key: DropKey) -> str:
        return self._symbols.get(key.location, f"{key.location:#x}")

    def _reason(self, number: int) -> str:
        if number in self._reasons:
            return self._reasons[number]
        if number >> 16:
            return f"subsys:{number >> 16}/code:{number & 0xFFFF}"
        return str(number) if number else ""

    def _row(self, line: _Line, rate_s: float, cause: str) -> DropRow:
        (key, attribution, first_cause), count = line.entry, line.count
        reply = Tuple(
            key.reply_src, key.reply_dst, key.reply_sport, key.reply_dport if len(line.reply_ports) == 1 else 0
        )
        return DropRow(
            reason=self._reason(key.reason),
            location=self._symbol(key),
            hook=key.hook or None,
            cause=cause,
            benign=cause == causes.BENIGN,
            owner=attribution.owner,
            peer=attribution.peer,
            service=_service(key),
            direction=attribution.direction,
            family=_FAMILIES.get(key.family),
            protocol=_PROTOCOLS.get(key.protocol, str(key.protocol)) if key.family else None,
            src=key.src or None,
            dst=key.dst or None,
            sport=key.sport if len(line.flows) == 1 and key.sport else None,
            dport=key.dport or None,
            reply=reply if key.reply_src else None,
            conntrack=key.conntrack.lower() or None,
            device=attribution.device,
            netns=key.netns,
            inside=attribution.inside,
            skbs=count.skbs,
            packets=count.packets,
            bytes=count.bytes,
            flows=None if key.folded else len(line.flows),
            rate_pps=line.recent / rate_s,
            segment=key.segment.lower() or None,
            nat=key.nat.lower() or None,
            verdict=key.verdict.lower() or None,
            confidence=causes.confidence_of(cause, first_cause, key.verdict, probed=key.probed, reason=key.reason),
        )


_Flow: TypeAlias = tuple[int, str, int, str, int]


class _Line:
    __slots__ = ("count", "entry", "flows", "recent", "reply_ports")

    def __init__(self, entry: _Entry) -> None:
        self.entry = entry
        self.count = _Count()
        self.recent = 0
        self.flows: set[_Flow] = set()
        self.reply_ports: set[int] = set()


def _service(key: DropKey) -> str | None:
    """The address that stands for others, whichever way the packet went."""
    address, port = (key.reply_dst, key.reply_dport) if key.is_reply else (key.dst, key.dport)
    if key.nat not in ("DST", "BOTH") or not address:
        return None
    if not port:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _translation(key: DropKey) -> tuple[object, ...]:
    """From which address outside towards which socket: what ports are used up for."""
    return key.verdict, key.netns, key.netns_cookie, key.protocol, key.reply_src, key.reply_sport, key.reply_dst


def _folded(entry: _Entry) -> _Entry:
    """The entry without what tells flows apart: still of the same owner and cause."""
    key = replace(
        entry.key, id=0, src="", dst="", sport=0, dport=0, iif=0, folded=True,
        reply_src="", reply_dst="", reply_sport=0, reply_dport=0,
    )  # fmt: skip
    return _Entry(key, entry.attribution._replace(peer=None), entry.cause)


def _lost_since(before: Lost, now: Lost) -> Lost:
    return Lost(
        now.events - before.events, now.keys - before.keys, now.samples - before.samples, now.hooks - before.hooks
    )


def _cost_since(before: Cost | None, now: Cost | None) -> Cost | None:
    """Memory as of now, the rest as the difference."""
    if now is None or before is None:
        return now
    return replace(
        now,
        cpu_s=round(now.cpu_s - before.cpu_s, 3),
        bpf_runs=None if now.bpf_runs is None else now.bpf_runs - (before.bpf_runs or 0),
        bpf_ns=None if now.bpf_ns is None else now.bpf_ns - (before.bpf_ns or 0),
    )


def _rank(row: DropRow) -> tuple[bool, int, str, bytes]:
    """Largest first, and a total order: which line was counted first must not show."""
    return row.benign, -row.packets, row.owner.label, msgspec.json.encode(row)


def _drop_count(rows: list[DropRow]) -> DropCount:
    return DropCount(sum(row.packets for row in rows if not row.benign), sum(row.packets for row in rows if row.benign))


def _cause_counts(rows: list[DropRow], connections: causes.Connections) -> tuple[CauseCount, ...]:
    by_cause: dict[str, list[DropRow]] = {}
    for row in rows:
        if not row.benign:
            by_cause.setdefault(row.cause, []).append(row)
    counts = [
        CauseCount(cause, sum(row.packets for row in group), connections(group)) for cause, group in by_cause.items()
    ]
    return tuple(sorted(counts, key=lambda count: (-count.packets, count.cause)))


def _owners(
    rows: list[DropRow],
    connections: causes.Connections,
    tables: Sequence[ConntrackRow],
    wanted: Callable[[Owner], bool] = lambda _: True,
) -> tuple[OwnerRow, ...]:
    """Whoever lost packets, and with them those of the wanted that hold entries of a table."""
    groups: dict[_Identity, list[DropRow]] = {}
    for row in rows:
        groups.setdefault(row.owner.identity, []).append(row)
    is_read = all(table.entries is not None for table in tables if table.count)
    repairs: dict[_Identity, int] = {}
    entries: dict[_Identity, int] = {}
    holders: dict[_Identity, Owner] = {}
    for table in tables:
        for holder in table.holders:
            if holder.owner.kind not in ("external", "unknown"):
                identity = holder.owner.identity
                holders.setdefault(identity, holder.owner)
                entries[identity] = entries.get(identity, 0) + holder.entries
        for repair in table.repairs:
            identity = repair.owner.identity
            holders.setdefault(identity, repair.owner)
            repairs[identity] = repairs.get(identity, 0) + repair.packets
    found = []
    for identity in [*groups, *(one for one, owner in holders.items() if one not in groups and wanted(owner))]:
        group = groups.get(identity, [])
        found.append(
            OwnerRow(
                group[0].owner if group else holders[identity],
                _drop_count(group),
                sum(row.rate_pps for row in group if not row.benign),
                _cause_counts(group, connections),
                conntrack=_owner_conntrack(
                    group,
                    entries.get(identity, 0) if is_read else None,
                    repairs.get(identity, 0) if repairs else None,
                )
                if tables
                else None,
            )
        )
    return tuple(sorted(found, key=lambda row: (-row.drops.packets, row.owner.label)))


def _owner_conntrack(rows: list[DropRow], entries: int | None, repairs: int | None) -> OwnerConntrack:
    def packets(*slugs: str) -> int:
        return sum(row.packets for row in rows if row.cause in slugs)

    return OwnerConntrack(
        entries=entries,
        insert_failed=packets("ct-snat-port-clash", "snat-port-exhaustion", "ct-insert-race-dns", "ct-chain-too-long"),
        table_full=packets("ct-table-full"),
        early_drop=None,
        clash_resolved=repairs,
        invalid=None,
    )


_Identity: TypeAlias = tuple[str, "str | None", str, "str | None"]


def _namespaces(rows: list[DropRow], connections: causes.Connections) -> tuple[NamespaceRow, ...]:
    groups: dict[str | None, list[DropRow]] = {}
    for row in rows:
        groups.setdefault(row.owner.namespace, []).append(row)
    found = [
        NamespaceRow(name, _drop_count(group), _cause_counts(group, connections)) for name, group in groups.items()
    ]
    return tuple(sorted(found, key=lambda row: (-row.drops.packets, row.namespace or "")))


def _fold_rest(rows: list[DropRow], limit: int) -> list[DropRow]:
    """The first rows, and what is beyond the limit as one `__other__` row per owner and cause."""
    if len(rows) <= limit:
        return rows
    rest: dict[tuple[object, ...], DropRow] = {}
    for row in rows[limit:]:
        ident = row.owner.identity, row.cause
        sums = rest.get(ident)
        rest[ident] = DropRow(
            reason="__other__", location="__other__", hook=None, cause=row.cause, benign=row.benign,
            owner=row.owner, peer=None, service=None, direction="", family=None, protocol=None, src=None, dst=None,
            sport=None, dport=None, reply=None, conntrack=None, device=None, netns=0, inside="",
            skbs=row.skbs + (sums.skbs if sums else 0),
            packets=row.packets + (sums.packets if sums else 0),
            bytes=row.bytes + (sums.bytes if sums else 0),
            flows=None,
            rate_pps=row.rate_pps + (sums.rate_pps if sums else 0),
        )  # fmt: skip
    return rows[:limit] + list(rest.values())
