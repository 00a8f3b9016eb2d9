"""One thing in full: what is said of the row under the cursor, and the page that opens on it."""

from __future__ import annotations

from k8sdiag import causes, tracking
from k8sdiag.layout import Line, clean, command_lines, cut, say, section, within, wrap
from k8sdiag.snapshot import ConntrackRow, Finding, Owner, OwnerConntrack, OwnerRow, Snapshot
from k8sdiag.views import DropGroup, OwnerGroup, Subject, finding_lines, owner_conntrack, whose
from k8sdiag.words import (
    ASCII_ARROWS,
    NATS,
    NOT_AVAILABLE,
    cause_words,
    ends,
    flow,
    named_flow,
    number,
    owner_words,
    place,
    plural,
    rate,
    size,
    verdict_words,
)  # fmt: skip

DETAIL_OWNERS, DETAIL_FLOWS = 50, 100
"""Lines of a kind that a detail page lists, count; the others are announced as a number."""


def about(subject: Subject, width: int) -> list[Line]:
    """One or two lines on what the cursor is on, with what its row had no room for."""
    if isinstance(subject, DropGroup):
        row = subject.rows[0]
        cause = causes.BY_SLUG.get(row.cause)
        words = cause.title if cause else "a drop that every healthy machine makes"
        more = f" (and {plural(len(subject.rows) - 1, 'other flow')})" if len(subject.rows) > 1 else ""
        return [
            say(cut(f"{row.reason or 'drop'} in {place(row)}: {words}", width)),
            say(cut(f"{flow(row)}{more}, {ends(row)}", width)),
        ]
    if isinstance(subject, OwnerGroup):
        single = owner_words(subject.owners[0].owner)
        names = ", ".join(row.owner.name for row in subject.owners)
        return [
            say(cut(f"{subject.name}: {names}" if len(subject.owners) > 1 else single, width)),
            say(cut(cause_words(subject.causes), width)),
        ]  # fmt: skip
    if isinstance(subject, ConntrackRow):
        return [say(line) for line in wrap(tracking.summary(subject), width)[:2]]
    return [say(line) for line in wrap(f"{whose(subject)}: {subject.title}", width)]


def detail(snapshot: Snapshot, subject: Subject, width: int) -> list[Line]:
    """Everything known about a finding, an owner group or a drop group."""
    if isinstance(subject, DropGroup):
        return _drop_detail(subject, width)
    if isinstance(subject, OwnerGroup):
        return _owner_detail(subject, width)
    if isinstance(subject, ConntrackRow):
        return tracking.detail(snapshot, subject, width)
    return _finding_detail(snapshot, subject, width)


def _finding_detail(snapshot: Snapshot, finding: Finding, width: int) -> list[Line]:
    lines = finding_lines(snapshot, finding, width, letter=False)[:2]
    lines += section(
        "Who is hurt", [owner_words(owner) + _known_by(owner) for owner in finding.victims[:DETAIL_OWNERS]], width
    )
    lines += _more(len(finding.victims) - DETAIL_OWNERS)
    culprits = [owner_words(owner) + _known_by(owner) for owner in finding.culprits[:DETAIL_OWNERS]]
    if culprits:
        blame = tracking.because(snapshot, finding)
        lines += section("Who causes it", [*culprits, blame[0].upper() + blame[1:] + "."], width)
        lines += _more(len(finding.culprits) - DETAIL_OWNERS)
    elif tracking.is_conntracks(finding.cause):
        lines += section("Who causes it", [f"{NOT_AVAILABLE}: nobody stands out, or it is not known"], width)
    cause = causes.BY_SLUG.get(finding.cause)
    if cause:
        lines += section("What it feels like", [cause.feels], width)
    for fix in finding.fix:
        lines += section("Fix: " + fix.action, [], width)
        lines += [say("    " + line, "good") for line in command_lines(fix.command, width - 4, "  ")]
        words = [f"where: {fix.scope}", f"why: {fix.why}", f"risk: {fix.risk}", f"undo: {fix.undo}"]
        lines += [say(part) for word in words for part in wrap("  " + word, width, "    ")]
    if not finding.fix:
        lines += section("Fix", ["none known"], width)
    evidence = [
        f"{item.name}: {number(item.value) if isinstance(item.value, int) else item.value} {item.unit}  [{item.source}]"
        for item in finding.evidence
    ]
    if cause:
        evidence.append(f"How it is known: {cause.proof}")
    lines += section(f"Evidence ({finding.confidence})", evidence, width)
    if finding.ruled_out:
        lines += section("Ruled out", [f"{item.cause}: {item.because}" for item in finding.ruled_out], width)
    return [part for line in lines for part in within(line, width)]


def _more(count: int) -> list[Line]:
    return [say(f"  +{number(count)} more")] if count > 0 else []


def _known_by(owner: Owner) -> str:
    workload = f", of {owner.workload}" if owner.workload else ""
    return f"{workload} ({owner.kind}, found by {owner.how}, {owner.confidence})"


def _owner_detail(group: OwnerGroup, width: int) -> list[Line]:
    lines: list[Line] = [
        say(cut(group.name, width, middle=True), "title"),
        say(f"{plural(group.drops.packets, 'packet')} dropped, now {rate(group.rate_pps)};"
              f" benign: {number(group.drops.benign_packets)}"),
    ]  # fmt: skip
    lines += section(
        "Causes",
        [
            f"{count.cause}: {plural(count.packets, 'packet')}, {plural(count.connections, 'connection')}"
            for count in group.causes
        ]
        or ["none"],
        width,
    )  # fmt: skip
    owners = [
        f"{owner_words(row.owner)}: {plural(row.drops.packets, 'packet')}, {rate(row.rate_pps)}{_known_by(row.owner)}"
        for row in sorted(group.owners, key=lambda row: -row.drops.packets)[:DETAIL_OWNERS]
    ]
    lines += section(plural(len(group.owners), "owner").capitalize(), owners, width)
    lines += section("Conntrack", _conntrack_words(group), width)
    lines += section("Not measured yet", [f"TCP {NOT_AVAILABLE}, tunnels {NOT_AVAILABLE}"], width)
    return [part for line in lines for part in within(line, width)]


def _conntrack_words(group: OwnerGroup) -> list[str]:
    """What conntrack did to the owners of a group together, and to each of them that it hurt."""
    sums = owner_conntrack(group)
    if sums is None:
        return [NOT_AVAILABLE]
    lines = [f"{number(sums.entries)} entries opened by it stand in a table", _conntrack_counts(sums)]
    if len(group.owners) > 1:

        def weight(row: OwnerRow) -> tuple[int, int]:
            counts = row.conntrack
            return (counts.insert_failed + counts.table_full, counts.entries or 0) if counts else (0, 0)

        lines += [
            f"{owner_words(row.owner)}: {number(row.conntrack.entries)} entries, {_conntrack_counts(row.conntrack)}"
            for row in sorted(group.owners, key=weight, reverse=True)[:DETAIL_OWNERS]
            if row.conntrack and any(weight(row))
        ]
    return lines


def _conntrack_counts(counts: OwnerConntrack) -> str:
    return (
        f"refused by a full table {number(counts.table_full)}, insert failed {number(counts.insert_failed)}, "
        f"evicted early {number(counts.early_drop)}, clash resolved {number(counts.clash_resolved)}, "
        f"invalid {number(counts.invalid)}"
    )


def _drop_detail(group: DropGroup, width: int) -> list[Line]:
    row = group.rows[0]
    cause = causes.BY_SLUG.get(row.cause)
    lines: list[Line] = [say(part, "title") for part in wrap(ends(row), width, "  ")]
    way, verdict, confidence = named_flow(row), verdict_words(row), "" if row.verdict else f" ({row.confidence})"
    lines += [
        say(part)
        for text in (
            *([f"connection: {way}", f"translated: {NATS.get((row.nat or '').lower(), NOT_AVAILABLE)}"] if way else []),
            f"{plural(group.packets, 'packet')} dropped, now {rate(group.rate_pps)}",
            f"cause: {row.cause}" + (f", {cause.title}" if cause else ", normal on every machine") + confidence,
            *([f"conntrack's part: {verdict}"] if verdict else []),
            f"reason: {row.reason or NOT_AVAILABLE + ' (this kernel gives none)'}",
            f"location: {place(row)}",
            f"owner: {owner_words(row.owner)}{_known_by(row.owner)}",
        )
        for part in wrap(text, width, "  ")
    ]
    flows = [
        f"{plural(each.packets, 'packet')}, {plural(each.skbs, 'buffer')}, {size(each.bytes)}: {flow(each, ('→', '⇄'))}"
        + (f", {plural(each.flows, 'source port')}" if each.flows != 1 else "")
        for each in group.rows[:DETAIL_FLOWS]
    ]
    lines += section(plural(len(group.rows), "flow").capitalize(), flows, width)
    return lines + _more(len(group.rows) - DETAIL_FLOWS)


def copyable(subject: Subject) -> str:
    """What `y` copies: the command of a finding's fix, else the row in words."""
    if isinstance(subject, Finding):
        return clean(subject.fix[0].command if subject.fix else f"k8sdiag explain {subject.cause}")
    if isinstance(subject, ConntrackRow):
        return clean(tracking.summary(subject))
    if isinstance(subject, OwnerGroup):
        return clean(
            f"{subject.name}: {plural(subject.drops.packets, 'packet')} dropped, {cause_words(subject.causes)}"
        )
    row = subject.rows[0]
    return clean(
        f"{ends(row, ASCII_ARROWS)}: {plural(subject.packets, 'packet')} dropped, "
        f"{row.cause}, {row.reason} in {place(row)}"
    )


def topic(subject: Subject) -> str:
    """What `e` explains: a cause's slug, else the drop reason; empty where there is none."""
    if isinstance(subject, Finding):
        return subject.cause
    if isinstance(subject, ConntrackRow):
        return tracking.topic(subject)
    if isinstance(subject, OwnerGroup):
        return subject.causes[0].cause if subject.causes else ""
    row = subject.rows[0]
    return row.reason if row.benign else row.cause
