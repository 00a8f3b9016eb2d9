"""Connection tables as text: how full they are, what that did in the window, who loses by it and who holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from k8sdiag import report
from k8sdiag.causes import conntrack
from k8sdiag.layout import GAP, Column, Line, Record, Tone, beside, command_lines, cut, say, section, table, wrap
from k8sdiag.snapshot import CauseCount, ConntrackRow, DropRow, Finding, HolderRow, Owner, ProtocolRow, Snapshot
from k8sdiag.words import (
    NOT_AVAILABLE,
    cause_words,
    duration,
    growth,
    number,
    owner_words,
    percent,
    plural,
    rate,
)

COLUMNS = (
    Column("owner", "TABLE OF", 12, 2, middle=True),
    Column("count", "ENTRIES", 7, right=True),
    Column("max", "MAX", 7, right=True, rank=3),
    Column("used", "USED", 5, right=True),
    Column("growth", "GROWTH", 8, right=True, rank=6),
    Column("full_in", "FULL IN", 11, right=True, rank=5),
    Column("refused", "REFUSED", 7, right=True, rank=1),
    Column("insert_failed", "INS.FAILED", 10, right=True, rank=2),
    Column("early_drop", "EARLY DROP", 10, right=True, rank=4),
    Column("invalid", "INVALID", 7, right=True, rank=7),
    Column("clash_resolved", "CLASH RESOLVED", 14, right=True, rank=8),
    Column("chain_too_long", "CHAIN TOO LONG", 14, right=True, rank=9),
)
DEFAULT_ZONE = "0"
NEARLY_FULL = 0.9
"""Share of its limit from which a table is marked."""
BESIDE_CELLS = 110
"""From this width on, victims and culprits stand beside each other."""
BAR_CELLS = 20
LEAST_LISTED, ALL_LISTED = 3, 50
"""Owners listed on each side, count: at least where lines are few, at most where they are not."""


class Victim(NamedTuple):
    """An owner that a connection table cost something in the window."""

    owner: Owner
    packets: int
    rate_pps: float
    causes: tuple[CauseCount, ...]
    evicted: int | None
    """Connections of it that gave way to new ones, count; None where that is not known per owner."""


def used(row: ConntrackRow) -> float | None:
    """Count by limit; None where there is no limit, or it could not be read."""
    return row.count / row.max if row.max else None


def is_nearly_full(row: ConntrackRow) -> bool:
    return (used(row) or 0) >= NEARLY_FULL


def tone(row: ConntrackRow) -> Tone:
    """How bad it is; the numbers say the same without a colour."""
    if row.refused:
        return "critical"
    return "warning" if is_nearly_full(row) or row.insert_failed or row.early_drop or row.chain_too_long else ""


def record(row: ConntrackRow) -> Record:
    """A table's cells and sorting values, by COLUMNS."""
    counts = (row.refused, row.insert_failed, row.early_drop, row.invalid, row.clash_resolved, row.chain_too_long)
    share, limit = used(row), "no limit" if row.max == 0 else number(row.max)
    return Record(
        (
            owner_words(row.owner), number(row.count), limit, percent(row.count, row.max), growth(row.growth_per_s),
            _full_in(row), *(number(count) for count in counts),
        ),
        (
            owner_words(row.owner), row.count, -1 if row.max is None else row.max, -1.0 if share is None else share,
            row.growth_per_s, -float("inf") if row.full_in_s is None else -row.full_in_s,
            *(-1 if count is None else count for count in counts),
        ),
        tone(row),
    )  # fmt: skip


def _full_in(row: ConntrackRow) -> str:
    if is_full(row):
        return "full"
    return "-" if row.full_in_s is None else duration(row.full_in_s)


# Who loses, who holds


_CAUSES = frozenset(cause.slug for cause in conntrack.CAUSES)


def is_conntracks(cause: str) -> bool:
    """Whether a cause of the catalogue is that connection tracking lost a packet."""
    return cause in _CAUSES


def victims(snapshot: Snapshot, row: ConntrackRow) -> list[Victim]:
    """Owners that lost packets by this table, most first, and those whose connections it evicted."""
    tracking = {each.netns for each in snapshot.conntrack}
    drops: dict[object, list[DropRow]] = {}
    for drop in snapshot.drops:
        if is_conntracks(drop.cause) and _lost_by(drop, row, tracking):
            drops.setdefault(drop.owner.identity, []).append(drop)
    evicted: dict[object, int | None] = {
        each.owner.identity: each.conntrack.early_drop for each in snapshot.owners if each.conntrack and row.early_drop
    }
    found = [_victim(rows, evicted.get(identity)) for identity, rows in drops.items()]
    found += [
        Victim(each.owner, 0, 0.0, (), evicted[each.owner.identity])
        for each in snapshot.owners
        if evicted.get(each.owner.identity) and each.owner.identity not in drops
    ]
    return sorted(found, key=lambda victim: (-victim.packets, -(victim.evicted or 0), victim.owner.label))


def _lost_by(drop: DropRow, row: ConntrackRow, tracking: set[int]) -> bool:
    """Whether a drop goes back to this table: it died in its namespace, or in one that tracks nothing itself."""
    if drop.cause == "ct-invalid-rst":
        return row.invalid > 0  # the node lets the segment pass untranslated, and the pod drops it
    return drop.netns == row.netns or drop.netns not in tracking


def _victim(rows: Sequence[DropRow], evicted: int | None) -> Victim:
    sums: dict[str, int] = {}
    for row in rows:
        sums[row.cause] = sums.get(row.cause, 0) + row.packets
    counts = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    return Victim(
        rows[0].owner,
        sum(sums.values()),
        sum(row.rate_pps for row in rows),
        tuple(CauseCount(cause, packets, None) for cause, packets in counts),
        evicted,
    )


def because(snapshot: Snapshot, finding: Finding) -> str:
    """Who is to blame for a finding, with their shares of its table; empty where nobody is named."""
    if not finding.culprits:
        return ""
    group, hurt = finding.victims[0].group, {owner.identity for owner in finding.victims}
    where = {row.netns for row in snapshot.drops if (row.cause, row.owner.group) == (finding.cause, group)}
    held = [row for row in snapshot.conntrack if row.netns in where or (not where and row.owner.identity in hurt)]
    parts: list[str] = []
    for owner in finding.culprits:
        holdings = [
            (holder.entries, row.entries)
            for row in held
            for holder in row.holders
            if holder.owner.identity == owner.identity
        ]
        name = owner_words(owner)
        if not holdings:
            parts.append(name if parts else f"of {name}")
        else:
            entries, of = max(holdings)
            share = percent(entries, of)
            parts.append(f"{name} holds {share} of the table" if not parts else f"{name} {share}")
    return "because " + ", ".join(parts)


# Lines


def gauge(row: ConntrackRow) -> str:
    """How full it is and where that leads: `[####......] 40 %, 400 of 1,000 entries, growing 20.0/s, full in 30 s`."""
    text = f"{number(row.count)} entries, " + ("no limit" if row.max == 0 else f"limit {NOT_AVAILABLE}")
    if row.max:
        cells = min(int(BAR_CELLS * row.count / row.max), BAR_CELLS)
        text = f"[{'#' * cells}{'.' * (BAR_CELLS - cells)}] {percent(row.count, row.max)}, "
        text += f"{number(row.count)} of {number(row.max)} entries"
    if row.growth_per_s:
        text += f", {'growing' if row.growth_per_s > 0 else 'shrinking'} {rate(abs(row.growth_per_s))}"
    if is_full(row):
        return f"{text}: FULL"
    return text if row.full_in_s is None else f"{text}, full in {duration(row.full_in_s)}"


def is_full(row: ConntrackRow) -> bool:
    """Whether it holds as many entries as it may, at the end of the window."""
    return bool(row.max) and row.count >= (row.max or 0)


def counters(row: ConntrackRow) -> str:
    """All it counted in the window; n/a is what this kernel does not count."""
    at = f" at {number(row.full_count)} of {number(row.full_max)} entries"
    return (
        f"refused {number(row.refused)}{'' if row.full_count is None or is_full(row) else at}, "
        f"insert failed {number(row.insert_failed)}, early drop {number(row.early_drop)}, "
        f"clash resolved {number(row.clash_resolved)}, invalid {number(row.invalid)}, "
        f"chain too long {number(row.chain_too_long)}"
    )


def reading(snapshot: Snapshot, row: ConntrackRow) -> str:
    """What the last reading of the table itself found, and how old that is."""
    if row.table_t_ns is None:
        return f"The table itself was not read yet: who holds it is {NOT_AVAILABLE}."
    age = duration(max(snapshot.t_ns - row.table_t_ns, 0) / 1e9)
    text = (
        f"Read {age} ago: {number(row.entries)} entries, {percent(row.unreplied, row.entries)} unreplied, "
        f"{number(row.stale)} stale"
    )
    if set(row.zones) - {DEFAULT_ZONE}:
        zones = sorted(row.zones.items(), key=lambda item: (-item[1], item[0]))
        text += "; zones " + ", ".join(f"{zone}: {number(entries)}" for zone, entries in zones)
    return text


def page_lines(snapshot: Snapshot, row: ConntrackRow, width: int, height: int) -> list[Line]:
    """A table on one screen: victims and culprits beside each other, or one above the other where that is narrow.

    As many owners as `height` lines have room for, but at least LEAST_LISTED on each side.
    """
    lines: list[Line] = [say(part, tone(row)) for part in wrap(gauge(row), width, "  ")]
    lines += [
        say(part)
        for text in (f"In {duration(snapshot.window_s)}: {counters(row)}", reading(snapshot, row))
        for part in wrap(text, width, "  ")
    ]
    protocols = _protocol_lines(row, width)
    room = height - len(lines)
    if width >= BESIDE_CELLS:
        half = (width - GAP) // 2
        listed = _listed(room - 3 - min(len(protocols), room // 2))
        hurt = _victim_lines(snapshot, row, half, listed)
        return [*lines, (), *beside(hurt, _holder_lines(row, width - GAP - half, listed), half), *protocols]
    listed = _listed((room - 6) // 2)
    hurt, held = _victim_lines(snapshot, row, width, listed), _holder_lines(row, width, listed)
    rule: list[Line] = [()] if len(hurt) + len(held) + 2 <= room else []
    return [*lines, *rule, *hurt, *rule, *held, *protocols]


def _listed(lines: int) -> int:
    return min(max(lines, LEAST_LISTED), ALL_LISTED)


def _victim_lines(snapshot: Snapshot, row: ConntrackRow, width: int, listed: int) -> list[Line]:
    found = victims(snapshot, row)
    if not found:
        return [say("VICTIMS", "title"), *(say(part) for part in wrap(_no_victims(snapshot, row), width, "  "))]
    columns = [
        Column("owner", "VICTIMS", 16, 3, middle=True), Column("packets", "LOST", 6, right=True),
        Column("rate", "RATE", 7, right=True, rank=1), Column("causes", "BY", 18, 2),
    ]  # fmt: skip
    records = [
        Record((owner_words(victim.owner), number(victim.packets), rate(victim.rate_pps), _by(victim)), ())
        for victim in found[:listed]
    ]
    return [*table(columns, records, width), *_more(len(found) - listed)]


def _by(victim: Victim) -> str:
    evicted = f"{number(victim.evicted)} evicted" if victim.evicted else ""
    return ", ".join(words for words in (cause_words(victim.causes) if victim.packets else "", evicted) if words)


def _no_victims(snapshot: Snapshot, row: ConntrackRow) -> str:
    if not report.measured(snapshot, "drops"):
        return f"{NOT_AVAILABLE}: drops are not watched here."
    if row.refused or row.insert_failed:
        return f"{NOT_AVAILABLE}: it lost packets, and no drop that was seen is known to be one of them."
    return "Nobody lost a packet by it."


def _holder_lines(row: ConntrackRow, width: int, listed: int) -> list[Line]:
    columns = (
        Column("owner", "CULPRITS", 16, 3, middle=True), Column("entries", "OPENED", 7, right=True),
        Column("share", "SHARE", 5, right=True), Column("target", "LEAD TO IT", 10, right=True, rank=1),
        Column("unreplied", "UNREPLIED", 9, right=True),
    )  # fmt: skip
    if row.table_t_ns is None:
        return [say("CULPRITS", "title"), say(f"{NOT_AVAILABLE}: the table was not read yet.")]
    if not row.holders:
        return [say("CULPRITS", "title"), say("The table was empty when it was read.")]
    records = [_holder_record(holder, row.entries) for holder in row.holders[:listed]]
    return [*table(columns, records, width), *_more(len(row.holders) - listed)]


def _holder_record(holder: HolderRow, of: int | None) -> Record:
    share = percent(holder.entries, of)
    unreplied = percent(holder.unreplied, holder.entries) if holder.entries else "-"
    return Record(
        (owner_words(holder.owner), number(holder.entries), share, number(holder.as_target), unreplied), ()
    )  # fmt: skip


def _protocol_lines(row: ConntrackRow, width: int) -> list[Line]:
    columns = (
        Column("protocol", "PROTOCOL", 8), Column("state", "STATE", 11), Column("entries", "ENTRIES", 7, right=True),
        Column("share", "SHARE", 5, right=True), Column("unreplied", "UNREPLIED", 9, right=True),
        Column("left", "TIME LEFT, MEAN", 10, right=True, rank=1),
    )  # fmt: skip
    if not row.protocols:
        return []
    return [(), *table(columns, [_protocol_record(each, row.entries) for each in row.protocols], width)]


def _protocol_record(row: ProtocolRow, of: int | None) -> Record:
    return Record(
        (
            row.protocol, row.state or "-", number(row.entries), percent(row.entries, of),
            percent(row.unreplied, row.entries), duration(row.timeout_s),
        ),
        (),
    )  # fmt: skip


def _more(count: int) -> list[Line]:
    return [say(f"+{number(count)} more")] if count > 0 else []


MEANINGS = (
    ("refused", "packets of new connections for which no entry was allocated: the table was full"),
    ("insert failed", "entries that could not be inserted: the port or the tuple was taken meanwhile"),
    ("early drop", "connections that gave way to new ones because the table was full; no packet is lost by it at once"),
    ("clash resolved", "two packets of one connection raced, and the kernel repaired it without a loss"),
    ("invalid", "packets that fit no connection: they pass untranslated unless a rule drops them"),
    ("chain too long", "entries refused because too many others share their hash bucket"),
)


def detail(snapshot: Snapshot, row: ConntrackRow, width: int) -> list[Line]:
    """The page of one table: all of the above, and where to look oneself."""
    lines: list[Line] = [say(cut(f"Connection table of {owner_words(row.owner)}", width, middle=True), "title")]
    lines += page_lines(snapshot, row, width, 4 * ALL_LISTED)
    lines += section("Counters", [f"{name}: {meaning}." for name, meaning in MEANINGS], width)
    buckets = (
        f"Hash buckets: {number(row.buckets)} for all namespaces together."
        if row.buckets else f"Hash buckets: {NOT_AVAILABLE}."
    )  # fmt: skip
    taken = f"{plural(row.found, 'source port')} found taken while translating."
    lines += section("Beside them", [buckets, taken, "Stale entries lead to addresses of pods that are gone."], width)
    lines += section("To look yourself", [f"Network namespace {row.netns}:"], width)
    for command in ("conntrack -S", "conntrack -C"):
        words = f"{row.inside} {command}" if row.inside else command
        lines += [say("    " + line, "good") for line in command_lines(words, width - 4, "  ")]
    return lines


def summary(row: ConntrackRow) -> str:
    """A table in one sentence."""
    text = f"{owner_words(row.owner)}: {gauge(row)}; {counters(row)}"
    if row.holders:
        largest = row.holders[0]
        text += f"; held by {owner_words(largest.owner)} ({percent(largest.entries, row.entries)})"
    return text


def topic(row: ConntrackRow) -> str:
    """The cause that the table's worst counter speaks of; the field where there is none."""
    if row.refused:
        return "ct-table-full"
    if row.chain_too_long:
        return "ct-chain-too-long"
    if row.insert_failed:
        return "ct-snat-port-clash"
    return "ct-pressure-early-drop" if row.early_drop else "conntrack"


def unwatched(snapshot: Snapshot) -> str:
    """Why there is no table to show."""
    why = next((c.why for c in snapshot.capabilities if c.signal == "conntrack"), "")
    if report.measured(snapshot, "conntrack"):
        return "No network namespace tracks connections."
    return f"{NOT_AVAILABLE}: conntrack is not watched here" + (f" ({why})." if why else ", see 6 Node.")
