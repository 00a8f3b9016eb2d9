"""From a Snapshot to lines of text: what the screen draws and what `top --once`, `check` and `pods` print.

Pure functions. All numbers, units and names become text here (and in report.py), so that a rate reads the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import msgspec

from k8sdiag import causes, report
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
    wrap,
)
from k8sdiag.snapshot import (
    CauseCount,
    DropCount,
    DropRow,
    Finding,
    NamespaceRow,
    Owner,
    OwnerRow,
    Severity,
    Snapshot,
)

if TYPE_CHECKING:
    from k8sdiag.identity import Resident

Grouping: TypeAlias = Literal["namespace", "workload", "pod"]
GROUPINGS: tuple[Grouping, ...] = ("namespace", "workload", "pod")
NOT_AVAILABLE = "n/a"
RATE_WINDOW = "5 s"
"""What "now" means in a rate: engine.RATE_NS."""


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


Subject: TypeAlias = Finding | OwnerGroup | DropGroup


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


# Numbers and units

LEAST = 0.05
"""With one decimal, what is less would be rounded to 0.0, and 0 is "none"."""
MINUTE_S, HOUR_S = 60, 3600


def number(value: int | None) -> str:
    """A count with separators. None is what was not measured."""
    return NOT_AVAILABLE if value is None else f"{value:,}"


def rate(pps: float | None) -> str:
    """A rate per second: 0/s, <0.1/s, 12.3/s, 1.2k/s, 3.4M/s."""
    if pps is None:
        return NOT_AVAILABLE
    if 0 < pps < LEAST:
        return "<0.1/s"
    return f"{_scaled(pps)}/s" if pps else "0/s"


def _scaled(value: float) -> str:
    power = 0
    while round(value, 1) >= 1000 and power < 4:  # noqa: PLR2004
        value /= 1000
        power += 1
    return f"{value:.1f}{('', 'k', 'M', 'G', 'T')[power]}"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 5 h 04 min."""
    whole = round(seconds)
    if whole < MINUTE_S:
        return f"{seconds:.1f} s" if LEAST <= seconds < 1 else f"{whole} s"
    minutes, rest = divmod(whole, MINUTE_S)
    if whole < HOUR_S:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return NOT_AVAILABLE
    if count < 1 << 10:
        return f"{count} bytes"
    power = min((count.bit_length() - 1) // 10, 3)
    return f"{count / (1 << 10 * power):.1f} {('', 'KiB', 'MiB', 'GiB')[power]}"


def plural(count: int | None, one: str) -> str:
    """29 packets, 1 packet; "connections n/a" for what was not measured."""
    if count is None:
        return f"{one}s {NOT_AVAILABLE}"
    return f"{number(count)} {one}{'' if count == 1 else 's'}"


def _page(
    columns: Sequence[Column],
    entries: Sequence[tuple[Hashable, Record, Subject]],
    state: ViewState,
    width: int,
    note: Line,
) -> Page:
    """Sorted, cut to the limit, laid out. Entries come by packets; those equal in the sorted column stay so."""
    names = [column.name for column in columns]
    sort = state.sort if state.sort in names else "packets"
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
    return Page(titles, headings, tuple(rows), len(ordered) - len(shown), note)


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
    "conntrack", "device", "protocol", "family", "direction", "src", "dst", "sport", "dport",
)  # fmt: skip


def matcher(text: str) -> Callable[[DropRow], bool]:
    """A predicate from words that must all hold, in any case: `word`, `!word`, `field=glob`, `field!=glob`.

    A bare word is looked for in every field. Raises UsageError for a field that does not exist.
    """
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
        return lambda _row: True

    def matches(row: DropRow) -> bool:
        fields = {name: value.lower() for name, value in drop_fields(row).items()}
        return all(test(fields) for test in tests)

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
    """Every Kubernetes namespace with drops, "" last if there are owners that are in none."""
    found = {row.owner.namespace or "" for row in snapshot.owners}
    return sorted(found - {""}) + ([""] if "" in found else [])


# Findings


SEVERITY_LETTERS: dict[Severity, str] = {"critical": "C", "warning": "W", "info": "I"}


def whose(finding: Finding) -> str:
    """Namespace of a finding, else its owner with the word for what that is."""
    return owner_words(finding.victims[0], namespace_only=True)


def owner_words(owner: Owner, *, namespace_only: bool = False) -> str:
    if owner.namespace:
        return owner.namespace if namespace_only else owner.label
    word = {"host": "node", "external": "", "unknown": "unknown owner,", "pod": "pod"}.get(owner.kind, owner.kind)
    return f"{word} {owner.name}".strip()


def findings(snapshot: Snapshot, state: ViewState) -> list[Finding]:
    """Those the filter and the namespaces leave, worst first as the engine has them."""
    if not state.filter and not state.namespaces:
        return list(snapshot.findings)
    left = {(row.cause, row.owner.group) for row in _drops_of(snapshot, state)}
    return [finding for finding in snapshot.findings if (finding.cause, finding.victims[0].group) in left]


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
    if finding.connections is not None and finding.connections != finding.packets:
        much += f", {plural(finding.connections, 'connection')}"
    much = f"{indent}{much}; {finding.confidence}"
    if finding.victims[0].namespace or len(finding.victims) > 1:
        much += "; " + _victims(finding, width - cells(much) - 2)
    lines.append(say(cut(much, width)))
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
    if is_watching(snapshot):
        watched = (
            f"Watched: every packet the kernel dropped on {where} in the last {duration(snapshot.window_s)}; "
            f"{plural(snapshot.total.benign_packets, 'benign drop')}, as every healthy machine makes."
        )
    lines += [say(line) for line in wrap(watched, width, "  ")]
    for line in blind_spots(snapshot):
        lines += [say(part) for part in wrap(line, width, "  ")]
    return lines


def is_watching(snapshot: Snapshot) -> bool:
    """Whether drops are counted at all: else every number of them is not 0 but unknown."""
    return any(c.signal == "drops" and c.status != "missing" for c in snapshot.capabilities)


def blind_spots(snapshot: Snapshot) -> list[str]:
    """What this run cannot see, one sentence each."""
    limited = [
        f"{capability.signal} ({capability.status}: {capability.why})" if capability.why
        else f"{capability.signal} ({capability.status})"
        for capability in snapshot.capabilities
        if capability.status != "full"
    ]  # fmt: skip
    lines = [f"Limited here: {text}." for text in limited]
    return [
        *lines,
        "Cannot see: packets lost outside this node; conntrack, TCP and tunnel counters (not measured yet).",
    ]


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
        Span(f"drops {rate(snapshot.rate_pps) if is_watching(snapshot) else NOT_AVAILABLE}", "title"),
        _lost_span(snapshot, short=width < HEAD_CELLS),
    ]
    for severity, word in (("critical", "critical"), ("warning", "warning"), ("info", "info")):
        found = sum(f.severity == severity and not f.ignored for f in snapshot.findings)
        if found:
            second.append(Span(plural(found, word) if severity == "warning" else f"{found} {word}", severity))  # type: ignore[arg-type]
    second += [
        Span(f"{c.signal} {c.status}", "critical" if c.status == "missing" else "warning")
        for c in snapshot.capabilities
        if c.status != "full"
    ]
    if is_watching(snapshot):
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
        return Span(f"lost {0 if is_watching(snapshot) else NOT_AVAILABLE}")
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
        lines.append(say(f"Lost: {'0; no drop is known to have escaped' if is_watching(snapshot) else NOT_AVAILABLE}"))
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
    if not is_watching(snapshot):
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
        say("Not measured yet: CPU steal, softirq time, sysctls, conntrack, listen queues."),
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
    if not is_watching(snapshot):
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
        owners = _owner_rows(_drops_of(snapshot, state))
    else:
        owners = [row for row in snapshot.owners if _in_namespaces(row.owner, state)]
    groups: dict[tuple[str, Hashable], list[OwnerRow]] = {}
    for row in owners:
        if row.drops.packets or state.all_drops:
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
        CauseCount(cause, sum(count.packets for count in each), _sum(count.connections for count in each))
        for cause, each in sums.items()
    ]
    return OwnerGroup(
        name,
        tuple(rows),
        DropCount(sum(row.drops.packets for row in rows), sum(row.drops.benign_packets for row in rows)),
        sum(row.rate_pps for row in rows),
        tuple(sorted(counts, key=lambda count: (-count.packets, count.cause))),
    )


def _owner_rows(drops: Sequence[DropRow]) -> list[OwnerRow]:
    """What the engine makes of all drops, for some of them."""
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
                    CauseCount(cause, sum(row.packets for row in each), _sum(row.flows for row in each))
                    for cause, each in sums.items()
                ),
            )
        )
    return found


def _sum(values: Iterable[int | None]) -> int | None:
    """None as soon as one part is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


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
    return Record(
        (group.name, kind, workload, number(group.drops.packets), rate(group.rate_pps),
         number(group.drops.benign_packets), causes_text, how),
        (group.name, kind, workload, group.drops.packets, group.rate_pps,
         group.drops.benign_packets, causes_text, how),
        "" if group.drops.packets else "dim",
    )  # fmt: skip


def cause_words(counts: Sequence[CauseCount]) -> str:
    """Causes with their packets, most first; a single one needs no number."""
    if not counts:
        return "-"
    if len(counts) == 1:
        return counts[0].cause
    return ", ".join(f"{count.cause} {number(count.packets)}" for count in counts)


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


ARROWS, ASCII_ARROWS = ("←", "→", "↔"), ("<-", "->", "--")


def ends(row: DropRow, arrows: tuple[str, str, str] = ARROWS) -> str:
    """Owner and peer, with the way the packet went: arrows are (to the owner, from it, past it)."""
    return f"{row.owner.label} {_peer(row, arrows)}" if row.peer else row.owner.label


def _peer(row: DropRow, arrows: tuple[str, str, str] = ARROWS) -> str:
    if row.peer is None:
        return "-"
    arrow = arrows[0] if row.direction == "in" else arrows[1] if row.direction == "out" else arrows[2]
    return f"{arrow} {row.peer.label}"


def _drop_record(group: DropGroup) -> Record:
    row = group.rows[0]
    devices = {each.device for each in group.rows}
    device = (devices.pop() or "-") if len(devices) == 1 else "several"
    texts = (row.owner.label, _peer(row), row.cause, row.reason or "-", row.location, row.hook or "-", device)
    return Record(
        (*texts, number(group.packets), rate(group.rate_pps)),
        (*texts, group.packets, group.rate_pps),
        "dim" if row.benign else "",
    )


def place(row: DropRow) -> str:
    """Where in the kernel: function, hook, device."""
    text = row.location
    if row.hook:
        text += f", hook {row.hook}"
    if row.conntrack:
        text += f", conntrack {row.conntrack}"
    return text


def flow(row: DropRow) -> str:
    """Protocol, addresses and ports, as far as they were kept."""
    parts = [row.protocol or "not IP"]
    if row.src or row.dst:
        parts.append(f"{_endpoint(row.src, row.sport)} -> {_endpoint(row.dst, row.dport)}")
    elif row.family:
        parts.append("addresses folded")
    if row.device:
        parts.append(f"on {row.device}")
    return " ".join(parts)


def _endpoint(address: str | None, port: int | None) -> str:
    host = address or "?"
    if port is None:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# One thing in full

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
    return [say(line) for line in wrap(f"{whose(subject)}: {subject.title}", width)]


def detail(snapshot: Snapshot, subject: Subject, width: int) -> list[Line]:
    """Everything known about a finding, an owner group or a drop group."""
    if isinstance(subject, DropGroup):
        return _drop_detail(subject, width)
    if isinstance(subject, OwnerGroup):
        return _owner_detail(subject, width)
    return _finding_detail(snapshot, subject, width)


def _section(title: str, lines: Iterable[str], width: int, tone: Tone = "") -> list[Line]:
    wrapped = [say(part, tone) for line in lines for part in wrap("  " + line, width, "    ")]
    return [(), say(title, "title"), *wrapped]


def _finding_detail(snapshot: Snapshot, finding: Finding, width: int) -> list[Line]:
    lines = finding_lines(snapshot, finding, width, letter=False)[:2]
    lines += _section(
        "Who is hurt", [owner_words(owner) + _known_by(owner) for owner in finding.victims[:DETAIL_OWNERS]], width
    )
    lines += _more(len(finding.victims) - DETAIL_OWNERS)
    cause = causes.BY_SLUG.get(finding.cause)
    if cause:
        lines += _section("What it feels like", [cause.feels], width)
    for fix in finding.fix:
        lines += _section("Fix: " + fix.action, [], width)
        lines += [say("    " + line, "good") for line in command_lines(fix.command, width - 4, "  ")]
        words = [f"where: {fix.scope}", f"why: {fix.why}", f"risk: {fix.risk}", f"undo: {fix.undo}"]
        lines += [say(part) for word in words for part in wrap("  " + word, width, "    ")]
    if not finding.fix:
        lines += _section("Fix", ["none known"], width)
    evidence = [
        f"{item.name}: {number(item.value) if isinstance(item.value, int) else item.value} {item.unit}  [{item.source}]"
        for item in finding.evidence
    ]
    if cause:
        evidence.append(f"How it is known: {cause.proof}")
    lines += _section(f"Evidence ({finding.confidence})", evidence, width)
    if finding.ruled_out:
        lines += _section("Ruled out", [f"{item.cause}: {item.because}" for item in finding.ruled_out], width)
    return [part for line in lines for part in _within(line, width)]


def _within(line: Line, width: int) -> list[Line]:
    """A line, or its text in several where it is too wide."""
    text = plain(line)
    return [line] if cells(text) <= width else [say(part, line[0].tone) for part in wrap(text, width, "  ")]


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
    lines += _section(
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
    lines += _section(plural(len(group.owners), "owner").capitalize(), owners, width)
    lines += _section(
        "Not measured yet", [f"conntrack {NOT_AVAILABLE}, TCP {NOT_AVAILABLE}, tunnels {NOT_AVAILABLE}"], width
    )
    return [part for line in lines for part in _within(line, width)]


def _drop_detail(group: DropGroup, width: int) -> list[Line]:
    row = group.rows[0]
    cause = causes.BY_SLUG.get(row.cause)
    lines: list[Line] = [say(part, "title") for part in wrap(ends(row), width, "  ")]
    lines += [
        say(part)
        for text in (
            f"{plural(group.packets, 'packet')} dropped, now {rate(group.rate_pps)}",
            f"cause: {row.cause}" + (f", {cause.title}" if cause else ", normal on every machine"),
            f"reason: {row.reason or NOT_AVAILABLE + ' (this kernel gives none)'}",
            f"location: {place(row)}",
            f"owner: {owner_words(row.owner)}{_known_by(row.owner)}",
        )
        for part in wrap(text, width, "  ")
    ]
    flows = [
        f"{plural(each.packets, 'packet')}, {plural(each.skbs, 'buffer')}, {size(each.bytes)}: {flow(each)}"
        + (f", {plural(each.flows, 'source port')}" if each.flows != 1 else "")
        for each in group.rows[:DETAIL_FLOWS]
    ]
    lines += _section(plural(len(group.rows), "flow").capitalize(), flows, width)
    return lines + _more(len(group.rows) - DETAIL_FLOWS)


def copyable(subject: Subject) -> str:
    """What `y` copies: the command of a finding's fix, else the row in words."""
    if isinstance(subject, Finding):
        return clean(subject.fix[0].command if subject.fix else f"k8sdiag explain {subject.cause}")
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
    if isinstance(subject, OwnerGroup):
        return subject.causes[0].cause if subject.causes else ""
    row = subject.rows[0]
    return row.reason if row.benign else row.cause


# One frame as text


ONCE_FINDINGS = 10
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
        lines += [part for line in lost for part in _within(line, width)]
    lines += _namespace_table(snapshot.namespaces, width)
    lines += _owner_table(snapshot, state, width)
    lines += _drop_list(snapshot, state, width)
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
        lines.append(say("none" if is_watching(snapshot) else NOT_AVAILABLE))
    benign = snapshot.total.benign_packets
    if benign and not state.all_drops:
        lines.append(say(f"Benign drops not listed: {plural(benign, 'packet')} (--all-drops lists them)."))
    return [part for line in lines for part in _within(line, width)]


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
    return [part for line in lines for part in _within(line, width)]


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
