"""From a Snapshot to lines of text: what the screen draws and what `top --once`, `check` and `pods` print.

Pure functions. Numbers, units and names become text in words.py, connection tables in tracking.py, one thing in full
in details.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import msgspec

from k8sdiag import causes, report, tracking
from k8sdiag.errors import UsageError
from k8sdiag.layout import (
    Column,
    Heading,
    Line,
    Record,
    Span,
    Tone,
    cells,
    clean,
    command_lines,
    cut,
    fit,
    heading_line,
    plain,
    row_line,
    say,
    table,
    within,
    wrap,
)
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
    Severity,
    Snapshot,
)
from k8sdiag.words import (
    ASCII_ARROWS,
    NOT_AVAILABLE,
    RATE_WINDOW,
    cause_words,
    duration,
    endpoint,
    ends,
    flow,
    number,
    owner_words,
    peer_words,
    percent,
    place,
    plural,
    rate,
    size,
    total,
)  # fmt: skip

if TYPE_CHECKING:
    from k8sdiag.identity import Resident

Grouping: TypeAlias = Literal["namespace", "workload", "pod"]
GROUPINGS: tuple[Grouping, ...] = ("namespace", "workload", "pod")


class ViewState(msgspec.Struct, frozen=True):
    """What the user asked to see. It changes the view only, never what is counted."""

    sort: str = ""
    """Name of a column; empty is by packets, most first."""
    reverse: bool = False
    filter: str = ""
    """See matcher()."""
    limit: int = 200
    """Rows shown, count; the others are announced as a number."""
    all_drops: bool = False
    """Benign drops too."""
    namespaces: tuple[str, ...] = ()
    """Only these Kubernetes namespaces; "" stands for owners that are in none. Empty: all."""
    grouping: Grouping = "namespace"


class OwnerGroup(NamedTuple):
    """Owners that make one line: those of a namespace or workload, or a single one."""

    name: str
    owners: tuple[OwnerRow, ...]
    drops: DropCount
    rate_pps: float
    causes: tuple[CauseCount, ...]


class DropGroup(NamedTuple):
    """Drops that look the same in a table: they differ in addresses, ports and device only. Largest row first."""

    rows: tuple[DropRow, ...]
    packets: int
    rate_pps: float


Subject: TypeAlias = Finding | OwnerGroup | DropGroup | ConntrackRow


class Row(NamedTuple):
    """A selectable thing: one line in a table, several for a finding."""

    key: Hashable
    lines: tuple[Line, ...]
    subject: Subject


class Page(NamedTuple):
    """What one tab shows."""

    heading: Line
    headings: tuple[Heading, ...]
    rows: tuple[Row, ...]
    hidden: int
    """Rows beyond the limit, count."""
    note: Line
    """What is not shown, or why there is nothing."""
    sort: str = ""
    """Name of the column that it is sorted by."""


def _page(
    columns: Sequence[Column],
    entries: Sequence[tuple[Hashable, Record, Subject]],
    state: ViewState,
    width: int,
    note: Line,
    usual: str = "packets",
) -> Page:
    """Sorted, cut to the limit, laid out. Entries come by `usual`; those equal in the sorted column stay so."""
    names = [column.name for column in columns]
    sort = state.sort if state.sort in names else usual
    at = names.index(sort)
    numeric = columns[at].right
    if state.sort in names:
        ordered = sorted(entries, key=lambda entry: entry[1].values[at], reverse=numeric != state.reverse)
    else:
        ordered = list(reversed(entries)) if state.reverse else list(entries)
    shown = ordered[: state.limit]
    fitted = fit(columns, [record for _, record, _ in shown], width, fill=True)
    titles, headings = heading_line(columns, fitted, sort, rising=numeric == state.reverse)
    seen: dict[Hashable, int] = {}
    rows = []
    for key, record, subject in shown:
        seen[key] = seen.get(key, 0) + 1
        rows.append(Row((key, seen[key]), (row_line(columns, fitted, record),), subject))
    return Page(titles, headings, tuple(rows), len(ordered) - len(shown), note, sort)


# Filter


def drop_fields(row: DropRow) -> dict[str, str]:
    """What a filter can ask of a drop, by name."""
    cause = causes.BY_SLUG.get(row.cause)
    return {
        "namespace": row.owner.namespace or "",
        "owner": row.owner.label,
        "pod": row.owner.name if row.owner.kind == "pod" else "",
        "kind": row.owner.kind,
        "workload": row.owner.workload or "",
        "peer": row.peer.label if row.peer else "",
        "cause": row.cause,
        "words": cause.title if cause else "",
        "reason": row.reason,
        "location": row.location,
        "hook": row.hook or "",
        "conntrack": row.conntrack or "",
        "verdict": row.verdict or "",
        "nat": row.nat or "",
        "service": row.service or "",
        "reply": f"{endpoint(row.reply.src, row.reply.sport)} {endpoint(row.reply.dst, row.reply.dport)}"
        if row.reply
        else "",
        "segment": row.segment or "",
        "device": row.device or "",
        "protocol": row.protocol or "",
        "family": row.family or "",
        "direction": row.direction,
        "src": row.src or "",
        "dst": row.dst or "",
        "sport": "" if row.sport is None else str(row.sport),
        "dport": "" if row.dport is None else str(row.dport),
    }


FILTER_FIELDS = (
    "namespace", "owner", "pod", "kind", "workload", "peer", "cause", "words", "reason", "location", "hook",
    "conntrack", "verdict", "nat", "service", "reply", "segment", "device", "protocol", "family", "direction", "src",
    "dst", "sport", "dport",
)  # fmt: skip


def matcher(text: str) -> Callable[[DropRow], bool]:
    """A predicate from words that must all hold, in any case: `word`, `!word`, `field=glob`, `field!=glob`.

    A bare word is looked for in every field. Raises UsageError for a field that does not exist.
    """
    matches = _fields_matcher(text)
    return lambda row: matches(drop_fields(row))


def _fields_matcher(text: str) -> Callable[[dict[str, str]], bool]:
    tests: list[Callable[[dict[str, str]], bool]] = []
    for term in text.lower().split():
        field, equals, glob = term.partition("=")
        negative = field.endswith("!") or (not equals and term.startswith("!"))
        if equals:
            name = {"ns": "namespace"}.get(field.rstrip("!"), field.rstrip("!"))
            if name not in FILTER_FIELDS:
                raise UsageError(f"there is no field {clean(name)!r}; fields: {', '.join(FILTER_FIELDS)}")
            tests.append(_field_test(name, glob, negative=negative))
        else:
            tests.append(_word_test(term.lstrip("!"), negative=negative))
    if not tests:
        return lambda _fields: True

    def matches(fields: dict[str, str]) -> bool:
        lower = {name: value.lower() for name, value in fields.items()}
        return all(test(lower) for test in tests)

    return matches


def _field_test(name: str, glob: str, *, negative: bool) -> Callable[[dict[str, str]], bool]:
    return lambda fields: fnmatchcase(fields[name], glob) != negative


def _word_test(word: str, *, negative: bool) -> Callable[[dict[str, str]], bool]:
    return lambda fields: any(word in value for value in fields.values()) != negative


def _in_namespaces(owner: Owner, state: ViewState) -> bool:
    return not state.namespaces or (owner.namespace or "") in state.namespaces


def _drops_of(snapshot: Snapshot, state: ViewState) -> list[DropRow]:
    matches = matcher(state.filter)
    return [row for row in snapshot.drops if _in_namespaces(row.owner, state) and matches(row)]


def namespaces(snapshot: Snapshot) -> list[str]:
    """Every Kubernetes namespace that drops or connections belong to, "" last if there are owners in none."""
    found = {row.owner.namespace or "" for row in snapshot.owners}
    return sorted(found - {""}) + ([""] if "" in found else [])


# Findings


SEVERITY_LETTERS: dict[Severity, str] = {"critical": "C", "warning": "W", "info": "I"}


def whose(finding: Finding) -> str:
    """Namespace of a finding, else its owner with the word for what that is."""
    return owner_words(finding.victims[0], namespace_only=True)


def findings(snapshot: Snapshot, state: ViewState) -> list[Finding]:
    """Those the filter and the namespaces leave, worst first as the engine has them."""
    if not state.filter and not state.namespaces:
        return list(snapshot.findings)
    left = {(row.cause, row.owner.group) for row in _drops_of(snapshot, state)}
    matches = _fields_matcher(state.filter)

    def stays(finding: Finding) -> bool:
        if finding.packets:
            return (finding.cause, finding.victims[0].group) in left
        return any(_in_namespaces(owner, state) and matches(_fields_of(finding, owner)) for owner in finding.victims)

    return [finding for finding in snapshot.findings if stays(finding)]


def _fields_of(finding: Finding, owner: Owner) -> dict[str, str]:
    """What a filter can ask of a finding that no drop stands behind."""
    return dict.fromkeys(FILTER_FIELDS, "") | {
        "namespace": owner.namespace or "", "owner": owner.label, "pod": owner.name if owner.kind == "pod" else "",
        "kind": owner.kind, "workload": owner.workload or "", "cause": finding.cause, "words": finding.title,
    }  # fmt: skip


def finding_rate_pps(snapshot: Snapshot, finding: Finding) -> float:
    """Packets per second over the last seconds."""
    key = finding.cause, finding.victims[0].group
    return sum(row.rate_pps for row in snapshot.drops if (row.cause, row.owner.group) == key)


def finding_lines(snapshot: Snapshot, finding: Finding, width: int, *, letter: bool) -> list[Line]:
    """Severity, whose, what in words; how much, to whom, how sure; the fix: each on a line of its own."""
    word = SEVERITY_LETTERS[finding.severity] if letter else finding.severity.upper()
    if finding.ignored:
        word += " ignored" if letter else " (ignored)"
    indent = "  "
    room = width - len(word) - 1
    title = f"{cut(whose(finding), max(room // 3, room - cells(finding.title) - 2), middle=True)}: {finding.title}"
    lines: list[Line] = [
        (Span(word, "dim" if finding.ignored else finding.severity), Span(" " + cut(title, room), "title"))
    ]
    pps = finding_rate_pps(snapshot, finding)
    much = f"{plural(finding.packets, 'packet')} dropped, " + (
        f"now {rate(pps)}" if pps else f"none in the last {RATE_WINDOW}"
    )
    if not finding.packets:
        much = "no packet lost"
    if finding.connections is not None and finding.connections != finding.packets:
        much += f", {plural(finding.connections, 'connection')}"
    much = f"{indent}{much}; {finding.confidence}"
    if finding.victims[0].namespace or len(finding.victims) > 1:
        much += "; " + _victims(finding, width - cells(much) - 2)
    lines.append(say(cut(much, width)))
    lines += [say(line) for line in wrap(indent + tracking.because(snapshot, finding), width, indent) if line.strip()]
    lines += [say(line) for line in _fix_lines(finding, width, indent)]
    return lines


def _victims(finding: Finding, width: int) -> str:
    """As many names as there is room for."""
    names = [clean(owner.name) if owner.namespace else clean(owner_words(owner)) for owner in finding.victims]
    for shown in range(len(names), 0, -1):
        rest = len(names) - shown
        text = ", ".join(names[:shown]) + (f" +{rest} more" if rest else "")
        if cells(text) <= width:
            return text
    more = f" +{len(names) - 1} more" if len(names) > 1 else ""
    return cut(names[0], max(width - len(more), 1), middle=True) + more


def _fix_lines(finding: Finding, width: int, indent: str) -> list[str]:
    if not finding.fix:
        return wrap(f"{indent}Fix: none known; see k8sdiag explain {finding.cause}", width, indent)
    fix = finding.fix[0]
    lines = [indent + line for line in command_lines(f"Fix: {fix.command}", width - len(indent), "     ")]
    return [*lines, cut(f"{indent}In:  {fix.scope}", width)]


def finding_page(snapshot: Snapshot, state: ViewState, width: int) -> Page:
    """The Verdict tab."""
    left = findings(snapshot, state)
    rows = []
    for finding in left[: state.limit]:
        key = finding.cause, finding.victims[0].group
        rows.append(Row(key, tuple(finding_lines(snapshot, finding, width, letter=True)), finding))
    note: Line = ()
    if not left and snapshot.findings:
        note = say(f"No finding matches; {len(snapshot.findings)} without the filter.", "warning")
    return Page((), (), tuple(rows), len(left) - len(rows), note)


def healthy_lines(snapshot: Snapshot, width: int) -> list[Line]:
    """What to say when there is no finding: what was watched, and what cannot be seen."""
    status = report.status(snapshot)
    where = f"node {snapshot.node.name}" if snapshot.node else "this node"
    if status == "unknown":
        lines = [
            say(line, "warning")
            for line in wrap(f"UNKNOWN: no trouble was found, but {report.why_unknown(snapshot)}.", width)
        ]
    else:
        loser = f"nothing of {snapshot.narrowed}" if snapshot.narrowed else "no pod, container or namespace"
        lines = [say(line, "good") for line in wrap(f"OK: {loser} loses packets.", width)]
    if snapshot.narrowed:
        lines += [
            say(part) for part in wrap(f"Narrowed to {snapshot.narrowed}; what others lose is not shown.", width, "  ")
        ]
    watched = f"No drop could be watched on {where}."
    if report.measured(snapshot, "drops"):
        watched = (
            f"Watched: every packet the kernel dropped on {where} in the last {duration(snapshot.window_s)}; "
            f"{plural(snapshot.total.benign_packets, 'benign drop')}, as every healthy machine makes."
        )
    lines += [say(line) for line in wrap(watched, width, "  ")]
    for row in filter(tracking.is_nearly_full, snapshot.conntrack):
        text = f"Nearly full: the connection table of {owner_words(row.owner)}, {tracking.gauge(row)}."
        lines += [say(part, "warning") for part in wrap(text, width, "  ")]
    for line in blind_spots(snapshot):
        lines += [say(part) for part in wrap(line, width, "  ")]
    return lines


def blind_spots(snapshot: Snapshot) -> list[str]:
    """What this run cannot see, one sentence each."""
    limited = [
        f"{capability.signal} ({capability.status}: {capability.why})" if capability.why
        else f"{capability.signal} ({capability.status})"
        for capability in snapshot.capabilities
        if capability.status != "full"
    ]  # fmt: skip
    lines = [f"Limited here: {text}." for text in limited]
    unmeasured = "TCP and tunnel counters" if _states_conntrack(snapshot) else "conntrack, TCP and tunnel counters"
    return [*lines, f"Cannot see: packets lost outside this node; {unmeasured} (not measured yet)."]


def _states_conntrack(snapshot: Snapshot) -> bool:
    """Whether the source says anything about conntrack, if only that it cannot be seen."""
    return any(capability.signal == "conntrack" for capability in snapshot.capabilities)


# The head of the screen

HEAD_CELLS = 76
"""In less the head says only how many were lost; the Node tab says what that means."""


def head_lines(snapshot: Snapshot | None, mode: str, badges: Sequence[Span], width: int) -> list[Line]:
    """Two lines: who watches what since when; how bad it is. Where room is short the last parts go first."""
    first = [Span(cut("k8sdiag " + mode, max(width // 2, 24), middle=True), "title"), *badges]
    if snapshot is None:
        return [_parts(first, width), say("waiting for the first reading …")]
    node = snapshot.node
    if node:
        first += [Span(clean(node.name)), Span(f"Linux {clean(node.kernel)}")]
    first += [Span(f"last {duration(snapshot.window_s)}"), Span(moment(snapshot)[11:], "dim")]
    second = [
        Span(f"drops {rate(snapshot.rate_pps) if report.measured(snapshot, 'drops') else NOT_AVAILABLE}", "title"),
        _lost_span(snapshot, short=width < HEAD_CELLS),
    ]
    for severity, word in (("critical", "critical"), ("warning", "warning"), ("info", "info")):
        found = sum(f.severity == severity and not f.ignored for f in snapshot.findings)
        if found:
            second.append(Span(plural(found, word) if severity == "warning" else f"{found} {word}", severity))  # type: ignore[arg-type]
    fullest = snapshot.conntrack[0] if snapshot.conntrack else None
    if fullest and tracking.is_nearly_full(fullest):
        second.append(Span(f"table {percent(fullest.count, fullest.max)} full", tracking.tone(fullest)))
    second += [
        Span(f"{c.signal} {c.status}", "critical" if c.status == "missing" else "warning")
        for c in snapshot.capabilities
        if c.status != "full"
    ]
    if report.measured(snapshot, "drops"):
        second.append(Span(f"benign {number(snapshot.total.benign_packets)}", "dim"))
    return [_parts(first, width), _parts(second, width)]


def _parts(spans: Sequence[Span], width: int) -> Line:
    """As many spans as fit beside each other."""
    line: list[Span] = []
    room = width
    for span in spans:
        gap = "  " if line else ""
        if cells(gap + span.text) > room:
            if not line:
                line.append(Span(cut(span.text, room), span.tone))
            break
        line += [Span(gap), span]
        room -= cells(gap + span.text)
    return tuple(line)


# Losses, capabilities, cost


def _lost_span(snapshot: Snapshot, *, short: bool) -> Span:
    lost = snapshot.lost
    missed = lost.events + lost.keys
    if not missed:
        return Span(f"lost {0 if report.measured(snapshot, 'drops') else NOT_AVAILABLE}")
    return Span(f"LOST {number(missed)}" + ("" if short else ": counts are lower bounds"), "critical")


def lost_lines(snapshot: Snapshot) -> list[Line]:
    """Losses in words, all of them."""
    lost = snapshot.lost
    lines = []
    if lost.events:
        lines.append(
            say(f"LOST {plural(lost.events, 'drop')} that no probe saw: counts are lower bounds.", "critical")
        )  # fmt: skip
    if lost.keys:
        lines.append(
            say(f"LOST {plural(lost.keys, 'drop')} without room in the map: counts are lower bounds.", "critical")
        )  # fmt: skip
    if not lines:
        known = "0; no drop is known to have escaped" if report.measured(snapshot, "drops") else NOT_AVAILABLE
        lines.append(say(f"Lost: {known}"))
    if lost.hooks:
        lines.append(
            say(f"Hook unknown for {plural(lost.hooks, 'netfilter drop')} (limit on stacks); they are counted.")
        )
    if lost.samples:
        lines.append(
            say(f"Samples held back by their rate limit: {number(lost.samples)}, on purpose; counts are complete.")
        )
    return lines


def capability_lines(snapshot: Snapshot, width: int) -> list[Line]:
    """Every signal, how well it is seen, and by what."""
    if not snapshot.capabilities:
        return [say("Capabilities: " + NOT_AVAILABLE)]
    columns = (
        Column("signal", "SIGNAL", 16), Column("status", "SEEN", 9),
        Column("hook", "BY", 14, 1, middle=True), Column("why", "WHY, AND WHAT IT BLINDS", 24, 3),
    )  # fmt: skip
    tones: dict[str, Tone] = {"full": "", "inferred": "warning", "counters": "warning", "missing": "critical"}
    records = [
        Record((c.signal, c.status, c.hook or "-", c.why or "-"), (), tones[c.status]) for c in snapshot.capabilities
    ]
    lines = table(columns, records, width)
    for capability in snapshot.capabilities:
        if capability.why and capability.status != "full":
            lines += [say(line, "dim") for line in wrap(f"{capability.signal}: {capability.why}", width, "  ")]
    return lines


def _total_words(snapshot: Snapshot) -> str:
    if not report.measured(snapshot, "drops"):
        return f"Dropped: {NOT_AVAILABLE}"
    return (
        f"Dropped: {plural(snapshot.total.packets, 'packet')} ({rate(snapshot.rate_pps)}), and "
        f"{number(snapshot.total.benign_packets)} benign; {plural(snapshot.skbs, 'buffer')} in all"
    )


def cost_lines(snapshot: Snapshot) -> list[Line]:
    """What watching costs."""
    cost = snapshot.cost
    if cost is None:
        return [say(f"Cost of watching: {NOT_AVAILABLE}")]
    text = (
        f"Cost of watching: CPU {cost.cpu_s:.2f} s since the start, "
        f"memory {size(cost.rss_bytes)}, BPF maps {size(cost.map_bytes)}"
    )
    if cost.bpf_runs and cost.bpf_ns is not None:
        programs = f"{number(cost.bpf_runs)} runs, {cost.bpf_ns / cost.bpf_runs:.0f} ns each"
    else:
        programs = f"{NOT_AVAILABLE} (sysctl kernel.bpf_stats_enabled=1 measures them)"
    return [say(text), say(f"BPF programs: {programs}")]


def moment(snapshot: Snapshot) -> str:
    """Wall time of a snapshot, UTC to the second."""
    if not snapshot.boot_to_wall_ns:
        return NOT_AVAILABLE
    return report.wall_time(snapshot, snapshot.t_ns)[:19].replace("T", " ") + " UTC"


def node_lines(snapshot: Snapshot, width: int) -> list[Line]:
    """The Node tab: who watches what, what is lost, what it costs."""
    node = snapshot.node
    about = f"Node {node.name}, Linux {node.kernel} {node.architecture}".rstrip() if node else f"Node {NOT_AVAILABLE}"
    lines = [
        say(about, "title"),
        say(f"{moment(snapshot)}, counts of the last {duration(snapshot.window_s)}"),
        say(_total_words(snapshot)),
        *lost_lines(snapshot),
        *cost_lines(snapshot),
        (),
        *capability_lines(snapshot, width),
        (),
        say("Not measured yet: CPU steal, softirq time, sysctls, listen queues."),
    ]
    return [
        wrapped
        for line in lines
        for wrapped in (
            [say(part, line[0].tone) for part in wrap(plain(line), width, "  ")] if len(line) == 1 else [line]
        )
    ]


# Owners


OWNER_COLUMNS = (
    Column("owner", "OWNER", 18, 3, middle=True),
    Column("kind", "KIND", 9, rank=3),
    Column("workload", "WORKLOAD", 16, 2, rank=4, middle=True),
    Column("packets", "PACKETS", 8, right=True),
    Column("rate", "RATE", 7, right=True),
    Column("benign", "BENIGN", 8, right=True, rank=2),
    Column("causes", "CAUSES", 16, 5),
    Column("how", "FOUND BY", 18, rank=5),
    Column("entries", "CONNTRACK ENTRIES", 17, right=True, rank=6),
)


def owner_page(snapshot: Snapshot, state: ViewState, width: int) -> Page:
    """The Pods tab: who loses packets, grouped as asked."""
    groups = owner_groups(snapshot, state)
    title = {"namespace": "NAMESPACE OR OWNER", "workload": "WORKLOAD OR OWNER", "pod": "OWNER"}[state.grouping]
    shown = owner_columns(state)
    columns = [OWNER_COLUMNS[i] for i in shown]
    columns[0] = columns[0]._replace(title=title)
    entries = [
        ((group.name, group.owners[0].owner.kind), _chosen(_owner_record(group), shown), group) for group in groups
    ]
    return _page(columns, entries, state, width, _note(snapshot, state, bool(groups)))


def owner_columns(state: ViewState) -> list[int]:
    """Indices into OWNER_COLUMNS; benign drops have a column where they are asked for."""
    return [i for i, column in enumerate(OWNER_COLUMNS) if column.name != "benign" or state.all_drops]


def _chosen(record: Record, shown: Sequence[int]) -> Record:
    return Record(tuple(record.cells[i] for i in shown), tuple(record.values[i] for i in shown), record.tone)


def _note(snapshot: Snapshot, state: ViewState, any_rows: bool) -> Line:
    """What a table of drops leaves out, or why it is empty."""
    if not report.measured(snapshot, "drops"):
        return say(f"{NOT_AVAILABLE}: drops are not watched here, see 6 Node.", "warning")
    nothing = "" if any_rows else "Nothing matches the filter. " if state.filter or state.namespaces else "No drops. "
    benign = snapshot.total.benign_packets
    left_out = "" if state.all_drops or not benign else f"{plural(benign, 'benign drop')} not shown (a shows them)."
    return say(nothing + left_out, "dim") if nothing or left_out else ()


def owner_groups(snapshot: Snapshot, state: ViewState) -> list[OwnerGroup]:
    """Owners with drops by namespace, workload or singly, most packets first.

    With a filter only the drops that match are summed.
    """
    if state.filter:
        conntrack: dict[Hashable, OwnerConntrack | None] = {
            row.owner.identity: row.conntrack for row in snapshot.owners
        }
        owners = _owner_rows(_drops_of(snapshot, state), conntrack)
    else:
        owners = [row for row in snapshot.owners if _in_namespaces(row.owner, state)]
    groups: dict[tuple[str, Hashable], list[OwnerRow]] = {}
    for row in owners:
        if row.drops.packets or (state.all_drops and row.drops.benign_packets):
            groups.setdefault(_group_of(row.owner, state.grouping), []).append(row)
    found = [_owner_group(name, rows) for (name, _), rows in groups.items()]
    return sorted(found, key=lambda group: (-group.drops.packets, group.name))


def _group_of(owner: Owner, grouping: Grouping) -> tuple[str, Hashable]:
    """Name of the line an owner is in, and what tells it from a line of the same name."""
    if grouping == "namespace" and owner.namespace:
        return owner.namespace, None
    if grouping == "workload" and owner.namespace and owner.workload:
        return f"{owner.namespace}/{owner.workload}", None
    return owner.label, owner.identity


def _owner_group(name: str, rows: Sequence[OwnerRow]) -> OwnerGroup:
    sums: dict[str, list[CauseCount]] = {}
    for row in rows:
        for count in row.causes:
            sums.setdefault(count.cause, []).append(count)
    counts = [
        CauseCount(cause, sum(count.packets for count in each), total(count.connections for count in each))
        for cause, each in sums.items()
    ]
    return OwnerGroup(
        name,
        tuple(rows),
        DropCount(sum(row.drops.packets for row in rows), sum(row.drops.benign_packets for row in rows)),
        sum(row.rate_pps for row in rows),
        tuple(sorted(counts, key=lambda count: (-count.packets, count.cause))),
    )


def _owner_rows(drops: Sequence[DropRow], conntrack: Mapping[Hashable, OwnerConntrack | None]) -> list[OwnerRow]:
    """What the engine makes of all drops, for some of them; `conntrack`, by owner, stays as it is."""
    by_owner: dict[object, list[DropRow]] = {}
    for row in drops:
        by_owner.setdefault(row.owner.identity, []).append(row)
    found = []
    for rows in by_owner.values():
        sums: dict[str, list[DropRow]] = {}
        for row in rows:
            if not row.benign:
                sums.setdefault(row.cause, []).append(row)
        found.append(
            OwnerRow(
                rows[0].owner,
                DropCount(
                    sum(row.packets for row in rows if not row.benign), sum(row.packets for row in rows if row.benign)
                ),
                sum(row.rate_pps for row in rows if not row.benign),
                tuple(
                    CauseCount(cause, sum(row.packets for row in each), total(row.flows for row in each))
                    for cause, each in sums.items()
                ),
                conntrack.get(rows[0].owner.identity),
            )
        )
    return found


def owner_conntrack(group: OwnerGroup) -> OwnerConntrack | None:
    """Sums over the owners of a group; a number is None as soon as that of one owner is. None: not measured."""
    known = [row.conntrack for row in group.owners if row.conntrack is not None]
    if len(known) < len(group.owners):
        return None
    return OwnerConntrack(
        entries=total(each.entries for each in known),
        insert_failed=sum(each.insert_failed for each in known),
        table_full=sum(each.table_full for each in known),
        early_drop=total(each.early_drop for each in known),
        clash_resolved=total(each.clash_resolved for each in known),
        invalid=total(each.invalid for each in known),
    )


def _owner_record(group: OwnerGroup) -> Record:
    kinds = {row.owner.kind for row in group.owners}
    hows = {(row.owner.how, row.owner.confidence) for row in group.owners}
    workloads = {row.owner.workload for row in group.owners}
    kind = (
        plural(len(group.owners), "pod") if kinds == {"pod"} and len(group.owners) > 1
        else kinds.pop() if len(kinds) == 1 else "mixed"
    )  # fmt: skip
    how = ", ".join(hows.pop()) if len(hows) == 1 else "several ways"
    workload = (workloads.pop() or "-") if len(workloads) == 1 else "several"
    causes_text = cause_words(group.causes)
    conntrack = owner_conntrack(group)
    entries = conntrack.entries if conntrack else None
    return Record(
        (group.name, kind, workload, number(group.drops.packets), rate(group.rate_pps),
         number(group.drops.benign_packets), causes_text, how, number(entries)),
        (group.name, kind, workload, group.drops.packets, group.rate_pps,
         group.drops.benign_packets, causes_text, how, -1 if entries is None else entries),
        "" if group.drops.packets else "dim",
    )  # fmt: skip


# Drops


DROP_COLUMNS = (
    Column("owner", "OWNER", 20, 3, middle=True),
    Column("peer", "PEER", 18, 3, rank=2, middle=True),
    Column("cause", "CAUSE", 18, 1),
    Column("reason", "REASON", 14, 1, rank=1),
    Column("location", "LOCATION", 18, 1, rank=3),
    Column("hook", "HOOK", 11, rank=4),
    Column("device", "DEVICE", 10, rank=5),
    Column("packets", "PACKETS", 8, right=True),
    Column("rate", "RATE", 7, right=True),
)


def drop_page(snapshot: Snapshot, state: ViewState, width: int) -> Page:
    """The Drops tab: where in the kernel, and why."""
    groups = drop_groups(snapshot, state)
    entries = [(_drop_key(group.rows[0]), _drop_record(group), group) for group in groups]
    return _page(DROP_COLUMNS, entries, state, width, _note(snapshot, state, bool(groups)))


def drop_groups(snapshot: Snapshot, state: ViewState) -> list[DropGroup]:
    """Drops that a table cannot tell apart as one, most packets first, benign ones last."""
    groups: dict[Hashable, list[DropRow]] = {}
    for row in _drops_of(snapshot, state):
        if state.all_drops or not row.benign:
            groups.setdefault(_drop_key(row), []).append(row)
    found = [
        DropGroup(
            tuple(sorted(rows, key=lambda row: -row.packets)),
            sum(row.packets for row in rows),
            sum(row.rate_pps for row in rows),
        )
        for rows in groups.values()
    ]
    return sorted(found, key=lambda group: (group.rows[0].benign, -group.packets, _drop_key(group.rows[0])[1:3]))


def _drop_key(row: DropRow) -> tuple[Hashable, ...]:
    return (
        row.cause, row.reason, row.location, row.hook, row.owner.identity,
        row.peer.identity if row.peer else None, row.direction,
    )  # fmt: skip


def _drop_record(group: DropGroup) -> Record:
    row = group.rows[0]
    devices = {each.device for each in group.rows}
    device = (devices.pop() or "-") if len(devices) == 1 else "several"
    texts = (row.owner.label, peer_words(row), row.cause, row.reason or "-", row.location, row.hook or "-", device)
    return Record(
        (*texts, number(group.packets), rate(group.rate_pps)),
        (*texts, group.packets, group.rate_pps),
        "dim" if row.benign else "",
    )


# Connection tables


def conntrack_page(snapshot: Snapshot, state: ViewState, width: int) -> Page:
    """The Conntrack tab: every table in use, fullest first. A filter does not narrow it: it would hide culprits."""
    entries = [(row.netns, tracking.record(row), row) for row in snapshot.conntrack]
    note: Line = ()
    if not entries:
        missing = not report.measured(snapshot, "conntrack")
        note = say(tracking.unwatched(snapshot), "warning" if missing else "dim")
    elif state.filter or state.namespaces:
        note = say("All tables, all owners: what narrows the other tabs does not narrow this one.", "dim")
    return _page(tracking.COLUMNS, entries, state, width, note, usual="used")


# One frame as text


ONCE_FINDINGS, ONCE_TABLES, ONCE_OTHER_TABLES = 10, 3, 10
"""Findings, connection tables in trouble with who loses and who holds them, and others in a sentence, count."""
ONCE_TABLE_LINES = 24
_ANSI: dict[Tone, str] = {
    "": "", "critical": "31;1", "warning": "33;1", "info": "36", "good": "32", "dim": "2", "title": "1",
}  # fmt: skip


def once(snapshot: Snapshot, width: int, color: bool = False, *, all_drops: bool = False) -> list[str]:
    """The screen as text, verdict first: for pipes, screen readers and tests. No line is wider than `width`."""
    width = max(width, 40)
    state = ViewState(all_drops=all_drops, limit=1000, grouping="pod")
    lines: list[Line] = []
    for finding in snapshot.findings[:ONCE_FINDINGS]:
        lines += finding_lines(snapshot, finding, width, letter=False)
    if len(snapshot.findings) > ONCE_FINDINGS:
        lines.append(say(f"+{len(snapshot.findings) - ONCE_FINDINGS} more findings, all in check -o json"))
    if not snapshot.findings:
        lines += healthy_lines(snapshot, width)
    elif snapshot.lost.events or snapshot.lost.keys:
        lost = [line for line in lost_lines(snapshot) if line[0].tone == "critical"]
        lines += [part for line in lost for part in within(line, width)]
    lines += _namespace_table(snapshot.namespaces, width)
    lines += _owner_table(snapshot, state, width)
    lines += _drop_list(snapshot, state, width)
    lines += _table_list(snapshot, width)
    lines += [(), *_status_lines(snapshot, width)]
    return [_ansi(line) if color else plain(line) for line in lines]


def _ansi(line: Line) -> str:
    return "".join(
        f"\x1b[{_ANSI[span.tone]}m{span.text}\x1b[0m" if _ANSI[span.tone] and span.text.strip() else span.text
        for span in line
    )


def _namespace_table(rows: Sequence[NamespaceRow], width: int) -> list[Line]:
    columns = (
        Column("namespace", "NAMESPACE", 20, 2, middle=True), Column("cause", "CAUSE", 20, 1),
        Column("packets", "PACKETS", 10, right=True), Column("connections", "CONNECTIONS", 11, right=True),
    )  # fmt: skip
    records = [
        Record((row.namespace or "(none)", count.cause, number(count.packets), number(count.connections)), ())
        for row in rows
        for count in row.causes
    ]
    if not records:
        return []
    return [(), say("Namespaces, by cause", "title"), *table(columns, records, width)]


def _owner_table(snapshot: Snapshot, state: ViewState, width: int) -> list[Line]:
    groups = owner_groups(snapshot, state)
    if not groups:
        return []
    shown = owner_columns(state)
    records = [_chosen(_owner_record(group), shown) for group in groups[: state.limit]]
    lines = table([OWNER_COLUMNS[i] for i in shown], records, width)
    more = [say(f"+{len(groups) - state.limit} more")] if len(groups) > state.limit else []
    return [(), say("Owners", "title"), *lines, *more]


def _drop_list(snapshot: Snapshot, state: ViewState, width: int) -> list[Line]:
    """Each drop in words rather than in columns: at 80 cells a table would cut what matters."""
    groups = drop_groups(snapshot, state)
    lines: list[Line] = [(), say("Drops: who, how many; why and where", "title")]
    for group in groups[: state.limit]:
        row = group.rows[0]
        much = f"{plural(group.packets, 'packet')}, {rate(group.rate_pps)}"
        who = cut(ends(row, ASCII_ARROWS), max(width - cells(much) - 2, 12), middle=True)
        lines.append((Span(who + ": "), Span(much, "" if row.benign else "title")))
        words = f"  {row.cause}: {row.reason or 'no reason given'} in {place(row)}; {flow(row)}"
        if len(group.rows) > 1:
            words += f" and {plural(len(group.rows) - 1, 'other flow')}"
        lines += [say(part) for part in wrap(words, width, "    ")]
    if len(groups) > state.limit:
        lines.append(say(f"+{len(groups) - state.limit} more"))
    if not groups:
        lines.append(say("none" if report.measured(snapshot, "drops") else NOT_AVAILABLE))
    benign = snapshot.total.benign_packets
    if benign and not state.all_drops:
        lines.append(say(f"Benign drops not listed: {plural(benign, 'packet')} (--all-drops lists them)."))
    return [part for line in lines for part in within(line, width)]


def _table_list(snapshot: Snapshot, width: int) -> list[Line]:
    """Every connection table, and of those in trouble who loses and who holds them."""
    rows = snapshot.conntrack
    if not _states_conntrack(snapshot):
        return []
    lines: list[Line] = [(), say("Connection tables", "title")]
    if not rows:
        return [*lines, *(say(part) for part in wrap(tracking.unwatched(snapshot), width, "  "))]
    marked = [row for row in rows if tracking.tone(row)][:ONCE_TABLES]
    for row in marked:
        lines.append(say(cut(f"{owner_words(row.owner)}, network namespace {row.netns}", width, middle=True)))
        lines += [*tracking.page_lines(snapshot, row, width, ONCE_TABLE_LINES), ()]
    others = [row for row in rows if row not in marked]
    for row in others[:ONCE_OTHER_TABLES]:
        lines += [say(part) for part in wrap(tracking.summary(row), width, "  ")]
    if len(others) > ONCE_OTHER_TABLES:
        lines.append(say(f"+{len(others) - ONCE_OTHER_TABLES} more, all in check -o json"))
    return [part for line in (lines if lines[-1] else lines[:-1]) for part in within(line, width)]


def _status_lines(snapshot: Snapshot, width: int) -> list[Line]:
    node = f"node {snapshot.node.name}, Linux {snapshot.node.kernel}" if snapshot.node else f"node {NOT_AVAILABLE}"
    lines = [
        say("Status", "title"),
        say(f"{node}, {moment(snapshot)}, watched {duration(snapshot.window_s)}"),
        say(_total_words(snapshot)),
        *lost_lines(snapshot),
        say("Capabilities: " + (", ".join(f"{c.signal} {c.status}" for c in snapshot.capabilities) or NOT_AVAILABLE)),
        *(say(line) for line in blind_spots(snapshot)),
        *cost_lines(snapshot),
    ]
    return [part for line in lines for part in within(line, width)]


def pods(rows: Sequence[Resident], width: int) -> list[str]:
    """The table of `k8sdiag pods`: every network namespace, whose it is, and how that is known."""
    columns = (
        Column("namespace", "NAMESPACE", 12, 1, middle=True), Column("owner", "OWNER", 18, 2, middle=True),
        Column("kind", "KIND", 9), Column("netns", "NETNS", 10, right=True),
        Column("addresses", "ADDRESSES", 15, 2), Column("how", "FOUND BY", 15, rank=1),
        Column("workload", "WORKLOAD", 12, 1, rank=2, middle=True), Column("source", "SOURCE", 20, 3, rank=3),
    )  # fmt: skip
    records = [
        Record(
            (
                row.owner.namespace or "-", row.owner.name, row.owner.kind, str(row.netns),
                ", ".join(row.addresses) or "-", f"{row.owner.how}, {row.owner.confidence}",
                row.owner.workload or "-", row.source or "-",
            ),
            (),
        )
        for row in rows
    ]  # fmt: skip
    return [plain(line) for line in table(columns, records, width)]
