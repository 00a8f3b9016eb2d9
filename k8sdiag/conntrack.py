"""Connection tables in a window: what statistics and readings of each namespace's table come to, and whose it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from k8sdiag.facts import REMEMBERED_NS, ConntrackStats, ConntrackTable, DropKey, refused
from k8sdiag.identity import Identity
from k8sdiag.snapshot import ConntrackRow, HolderRow, Owner, ProtocolRow, RepairRow

HOLDERS = 50
"""Addresses outside of this node that are named as holders, largest first; the rest is in the sums."""
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 58: "icmpv6", 132: "sctp", 136: "udplite"}
_Space: TypeAlias = tuple[int, int]
_Tick: TypeAlias = tuple[int, ConntrackStats]
_Line: TypeAlias = tuple[int, str, str, int, str, int, int, int]


class Tables:
    """The tables of all namespaces, as a window slides over them."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._ticks: dict[_Space, deque[_Tick]] = {}
        """Statistics and when they were taken. The first are from before the window: what counts is since then."""
        self._readings: dict[_Space, ConntrackTable] = {}
        self._named: dict[_Space, tuple[ConntrackTable, int, tuple[HolderRow, ...]]] = {}
        """Holders of a reading as the inventory of that version names them: screens ask several times a second."""
        self._repairs: dict[_Space, deque[tuple[int, Owner, int]]] = {}
        """When, whose and how many clashes were resolved."""

    def repair(self, key: DropKey, packets: int, t_ns: int) -> None:
        """Take in clashes that were resolved."""
        owner = self._identity.attribute(key, t_ns).owner
        self._repairs.setdefault((key.netns, key.netns_cookie), deque()).append((t_ns, owner, packets))

    def count(self, stats: ConntrackStats, t_ns: int, *, is_first: bool) -> None:
        """Take in statistics. Those of the first batch are what was counted before it; else all since the start."""
        space = stats.netns, stats.netns_cookie
        if space not in self._ticks:
            start = stats if is_first else ConntrackStats(*space, stats.count)
            self._ticks[space] = deque([(t_ns, start)])
        self._ticks[space].append((t_ns, stats))

    def read(self, reading: ConntrackTable) -> None:
        """Take in who held a table's entries."""
        self._readings[reading.netns, reading.netns_cookie] = reading

    def expire(self, start_ns: int | None) -> None:
        """Let go of what was before the window; where that is everything (None), of what lies between its ends."""
        for space, ticks in list(self._ticks.items()):
            if start_ns is None:
                self._ticks[space] = deque(dict.fromkeys((ticks[0], *_last_refusal(ticks), ticks[-1])))
                continue
            while len(ticks) > 1 and ticks[1][0] <= start_ns:
                ticks.popleft()
            repairs = self._repairs.get(space, deque())
            while repairs and repairs[0][0] <= start_ns:
                repairs.popleft()
            ended_ns = ticks[-1][1].until_t_ns
            if ended_ns is not None and ended_ns < start_ns - REMEMBERED_NS:
                del self._ticks[space]
                self._readings.pop(space, None)
                self._named.pop(space, None)
                self._repairs.pop(space, None)

    def zero(self, t_ns: int) -> None:
        """Let the window begin now."""
        for space, ticks in self._ticks.items():
            self._ticks[space] = deque([(t_ns, ticks[-1][1])])
        self._repairs.clear()

    def rows(self, t_ns: int, seconds: float) -> tuple[ConntrackRow, ...]:
        """A row for each table that is in use or had anything to count in the window, fullest first."""
        rows = (self._row(space, ticks, t_ns, seconds) for space, ticks in self._ticks.items())
        used = [
            row for row in rows
            if row.count or row.drop or row.insert_failed or row.early_drop or row.invalid or row.clash_resolved
        ]  # fmt: skip
        return tuple(sorted(used, key=lambda row: (-row.count, -row.drop, row.netns)))

    def _row(self, space: _Space, ticks: deque[_Tick], t_ns: int, seconds: float) -> ConntrackRow:
        start, last = ticks[0][1], ticks[-1][1]
        growth_per_s = (last.count - start.count) / seconds if seconds else 0.0
        room = None if last.max is None else last.max - last.count
        full = next((stats for _, stats in _last_refusal(ticks)), None)
        reading = self._readings.get(space)
        lines = list(_lines(reading)) if reading else []
        return ConntrackRow(
            netns=space[0],
            owner=self._identity.netns_owner(*space, t_ns) or Owner("unknown", f"netns:{space[0]}"),
            count=last.count,
            max=last.max,
            buckets=last.buckets,
            new=None,
            insert_failed=last.insert_failed - start.insert_failed,
            drop=last.drop - start.drop,
            early_drop=last.early_drop - start.early_drop,
            clash_resolved=_since(start.clash_resolved, last.clash_resolved),
            invalid=last.invalid - start.invalid,
            chain_too_long=_since(start.chain_too_long, last.chain_too_long),
            found=last.found - start.found,
            growth_per_s=growth_per_s,
            full_in_s=max(0.0, room / growth_per_s) if room is not None and growth_per_s > 0 else None,
            full_count=full.count if full else None,
            full_max=full.max if full else None,
            inside=self._identity.entrance(*space, t_ns),
            table_t_ns=reading.t_ns if reading else None,
            entries=reading.entries_total if reading else None,
            unreplied=sum(line[6] for line in lines) if reading else None,
            stale=self._stale(lines, t_ns) if reading else None,
            zones=_sums((str(line[0]), line[5]) for line in lines),
            holders=self._holders(space, lines, t_ns),
            protocols=_protocols(lines),
            repairs=_repairs(self._repairs.get(space, ())),
        )

    def _stale(self, lines: list[_Line], t_ns: int) -> int:
        return sum(line[5] for line in lines if line[2] and self._identity.is_gone(line[2], t_ns))

    def _holders(self, space: _Space, lines: list[_Line], t_ns: int) -> tuple[HolderRow, ...]:
        reading = self._readings.get(space)
        if reading is None:
            return ()
        known = self._named.get(space)
        if known and known[0] is reading and known[1] == self._identity.version:
            return known[2]
        owners: dict[str, Owner] = {}
        held: dict[object, tuple[Owner, list[int]]] = {}
        for _, source, target, _, _, entries, unreplied, _ in lines:
            for address, numbers in ((source, (entries, 0, unreplied)), (target, (0, entries, 0))):
                owner = owners.get(address)
                if owner is None:
                    owner = owners[address] = self._identity.owner_at(address, *space, t_ns)
                sums = held.setdefault(owner.identity, (owner, [0, 0, 0]))[1]
                for i, number in enumerate(numbers):
                    sums[i] += number
        rows = [HolderRow(owner, *sums) for owner, sums in held.values()]
        rows.sort(key=lambda row: (-row.entries, -row.as_target, row.owner.label))
        strangers = [row for row in rows if row.owner.kind in ("external", "unknown")][HOLDERS:]
        left_out = {id(row) for row in strangers}
        holders = tuple(row for row in rows if id(row) not in left_out)
        self._named[space] = reading, self._identity.version, holders
        return holders


def _last_refusal(ticks: deque[_Tick]) -> list[_Tick]:
    """The latest statistics that showed a new refusal, if any do."""
    for at in range(len(ticks) - 1, 0, -1):
        if _refused(ticks[at][1]) > _refused(ticks[at - 1][1]):
            return [ticks[at]]
    return []


def _lines(reading: ConntrackTable) -> Iterator[_Line]:
    return zip(
        reading.zone, reading.source, reading.target, reading.protocol, reading.state, reading.entries,
        reading.unreplied, reading.timeout_s, strict=True,
    )  # fmt: skip


def _repairs(repairs: Iterable[tuple[int, Owner, int]]) -> tuple[RepairRow, ...]:
    sums: dict[object, RepairRow] = {}
    for _, owner, packets in repairs:
        known = sums.get(owner.identity)
        sums[owner.identity] = RepairRow(owner, packets + (known.packets if known else 0))
    return tuple(sorted(sums.values(), key=lambda row: (-row.packets, row.owner.label)))


def _protocols(lines: list[_Line]) -> tuple[ProtocolRow, ...]:
    held: dict[tuple[int, str], list[int]] = {}
    for _, _, _, protocol, state, *numbers in lines:
        sums = held.setdefault((protocol, state), [0, 0, 0])
        for i, number in enumerate(numbers):
            sums[i] += number
    rows = [
        ProtocolRow(_PROTOCOLS.get(protocol, str(protocol)), state or None, entries, unreplied, timeout_s / entries)
        for (protocol, state), (entries, unreplied, timeout_s) in held.items()
        if entries
    ]
    return tuple(sorted(rows, key=lambda row: (-row.entries, row.protocol, row.state or "")))


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, number in pairs:
        sums[name] = sums.get(name, 0) + number
    return sums


def _refused(stats: ConntrackStats) -> int:
    return refused(stats.drop, stats.insert_failed, stats.chain_too_long)


def _since(start: int | None, now: int | None) -> int | None:
    return None if now is None else now - (start or 0)
