"""Causes 1 to 10: connection tracking or address translation could not do its part.

To the kernel's drop tracepoint all of these are NETFILTER_DROP, like a firewall rule. What tells them apart is the
verdict of each packet (facts.DropKey.verdict). Where a packet has none, its drop stays undecided until the table's
statistics of the whole window are known: undecided() names the question, decide() answers it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from k8sdiag.causes.benign import BENIGN, DNS, TCP, UDP
from k8sdiag.causes.cause import Case, Cause, Drop, Noticed, Severities, within
from k8sdiag.causes.policy import is_netfilter
from k8sdiag.causes.routing import is_no_route
from k8sdiag.snapshot import ConntrackRow, DropRow, Evidence, Fix, Owner, RuledOut

UNDECIDED_REFUSED = "undecided:refused"
UNDECIDED_INSERT = "undecided:insert"
UNDECIDED_INSERT_DNS = "undecided:insert-dns"
UNDECIDED_INVALID = "undecided:invalid"
UNDECIDED_INVALID_END = "undecided:invalid-end"
UNDECIDED_NO_SOCKET = "undecided:no-socket"
UNDECIDED_PORT = "undecided:port"

_BY_RULE = "networkpolicy-drop"
_STATISTICS = "/proc/net/stat/nf_conntrack"
_MAX = "net.netfilter.nf_conntrack_max"
_BUCKETS = "net.netfilter.nf_conntrack_buckets"
_ENTRY_BYTES = 400
"""Upper end of what an entry takes with its extensions."""
_ROUNDED_FROM = 10_240
_TABLES_SHOWN = 3
_CULPRITS = 3
_CULPRIT_SHARE = 0.1


# ----------------------------------------------------------------------------------------------------
# Which drop is which


def undecided(drop: Drop) -> str:
    """The question that only the statistics of the window can answer for this drop; empty where it is clear."""
    if drop.reason == "NO_SOCKET" and drop.protocol == TCP and drop.segment not in ("", "SYN"):
        return UNDECIDED_NO_SOCKET
    if _by_conntrack(drop, "CLASH") and _has_new_port(drop) and not _is_race(drop):
        return UNDECIDED_PORT
    if not is_netfilter(drop) or drop.verdict not in ("", "UNKNOWN", "RULE"):
        return ""
    if not drop.conntrack and drop.hook in ("FORWARD", "LOCAL_IN"):
        # Beyond the hooks where an entry is made, none means INVALID or that nothing is tracked. A SYN opens a
        # connection: conntrack has no cause to call it invalid.
        if drop.segment == "SYN":
            return ""
        return UNDECIDED_INVALID_END if drop.segment in ("FIN", "RST") else UNDECIDED_INVALID
    if drop.verdict == "RULE" or not drop.location.startswith("nf_hook_slow"):
        return ""
    if not drop.conntrack and drop.hook in ("PRE_ROUTING", "LOCAL_OUT", "UNKNOWN", ""):
        return UNDECIDED_REFUSED
    if drop.conntrack == "NEW" and drop.hook in ("POST_ROUTING", "LOCAL_IN"):
        return UNDECIDED_INSERT_DNS if _is_race(drop) else UNDECIDED_INSERT
    return ""


def asked_of(cause: str, netns: int) -> int:
    """Whose statistics answer what is undecided: those of the drop's namespace, or (0) those of all."""
    return 0 if cause == UNDECIDED_NO_SOCKET else netns


_Counter: TypeAlias = Callable[[ConntrackRow], int]
_DECIDED_BY: dict[str, tuple[_Counter, str]] = {
    UNDECIDED_REFUSED: (lambda table: table.refused, "ct-table-full"),
    UNDECIDED_INSERT: (lambda table: table.insert_failed, "ct-snat-port-clash"),
    UNDECIDED_INSERT_DNS: (lambda table: table.insert_failed, "ct-insert-race-dns"),
    UNDECIDED_INVALID: (lambda table: table.invalid, "ct-invalid-drop-asym"),
    UNDECIDED_INVALID_END: (lambda table: table.invalid, BENIGN),  # the tail of a connection that is closed
}
"""The counter that must have risen in the drop's own namespace, and what it was then; else a rule dropped."""


def decide(
    cause: str, table: ConntrackRow | None, tables: Sequence[ConntrackRow], ports: int = 1, packets: int = 1
) -> str:
    """Slug or BENIGN for what cause_of() gave, by the table of the drop's namespace and those of all namespaces.

    `ports`: different source ports at which packets towards the same socket clashed behind the same address.
    `packets`: how many wait for the same answer. A counter answers for all of them where it rose by at least half as
    much (it is read a moment before them): one refusal does not explain a hundred drops.
    """
    if cause == UNDECIDED_PORT:
        # A search begins at a random port. Where it ends in one clash after the other, there was no free one.
        return "snat-port-exhaustion" if ports > 1 else "ct-snat-port-clash"
    if cause == UNDECIDED_NO_SOCKET:
        # Translation was missed on the way, in another namespace than that of the socket.
        return "ct-invalid-rst" if 2 * sum(one.invalid for one in tables) >= packets else BENIGN
    if cause not in _DECIDED_BY:
        return cause
    counter, slug = _DECIDED_BY[cause]
    if table is None or 2 * counter(table) < packets:
        return _BY_RULE
    inserts = cause in (UNDECIDED_INSERT, UNDECIDED_INSERT_DNS)
    if inserts and not table.drop and (table.chain_too_long or 0) >= table.insert_failed:
        return "ct-chain-too-long"  # a clash would have raised `drop` too
    return slug


def _by_conntrack(drop: Drop, *verdicts: str) -> bool:
    """Whether conntrack refused it so; what died inside nft_do_chain was dropped by a rule in any case."""
    return drop.verdict in verdicts and not drop.location.startswith("nft_do_chain")


def _is_race(drop: Drop) -> bool:
    """Two datagrams of one socket, as a rule DNS queries. With another source port it clashed with another socket's."""
    if drop.protocol != UDP or _has_new_port(drop):
        return False
    return drop.dport == DNS or drop.nat in ("", "DST")


def _has_new_port(drop: Drop) -> bool:
    """Whether translation gave it another source port than it was sent with: that one was taken."""
    return drop.nat in ("SRC", "BOTH") and (drop.reply_dport != drop.sport or not drop.src)


def _is_table_full(drop: Drop) -> bool:
    return _by_conntrack(drop, "REFUSED") and drop.conntrack not in ("NEW", "CONFIRMED")


def _is_refused_with_entry(drop: Drop) -> bool:
    return _by_conntrack(drop, "REFUSED") and drop.conntrack in ("NEW", "CONFIRMED")


def _is_insert_race(drop: Drop) -> bool:
    return _by_conntrack(drop, "CLASH") and _is_race(drop)


def _is_stale_dnat(drop: Drop) -> bool:
    if drop.protocol != UDP or drop.nat not in ("DST", "BOTH") or drop.conntrack != "CONFIRMED" or drop.is_reply:
        return False
    if drop.reason in ("", "NOT_SPECIFIED") and drop.location in ("arp_error_report", "ndisc_error_report"):
        return True  # kernels that have no NEIGH_FAILED
    return drop.reason == "NEIGH_FAILED" or is_no_route(drop)


# ----------------------------------------------------------------------------------------------------
# What speaks for it


def _concerned(case: Case) -> list[ConntrackRow]:
    """The tables of the namespaces in which the packets died, most packets first; without packets all."""
    if not case.rows:
        return list(case.tables)
    packets: dict[int, int] = {}
    for row in case.rows:
        packets[row.netns] = packets.get(row.netns, 0) + row.packets
    return sorted((one for one in case.tables if one.netns in packets), key=lambda one: -packets[one.netns])


def _with_invalid(case: Case) -> list[ConntrackRow]:
    """The tables that met INVALID packets, most first."""
    return sorted((one for one in case.tables if one.invalid), key=lambda one: -one.invalid)


class _Reading(NamedTuple):
    name: str
    value: float | None
    unit: str
    source: str


def _told(tables: Sequence[ConntrackRow], readings: Callable[[ConntrackRow], Iterable[_Reading]]) -> Iterable[Evidence]:
    """What was read of each table; None was not measured and is left out."""
    for table in tables[:_TABLES_SHOWN]:
        where = "" if len(tables) == 1 else f" in network namespace {table.netns}"
        for name, value, unit, source in readings(table):
            if value is not None:
                yield Evidence(name + where, value, unit, source)


def _fill(table: ConntrackRow) -> tuple[int, int | None]:
    """Entries and limit: when allocation was last refused, else at the end of the window."""
    if table.full_count is not None:
        return table.full_count, table.full_max
    return table.count, table.max


def _fill_readings(table: ConntrackRow) -> Iterable[_Reading]:
    count, limit = _fill(table)
    when = "at the end of the window" if table.full_count is None else "when allocation was last refused"
    yield _Reading("count", count, "entries", f"net.netfilter.nf_conntrack_count, {when}")
    yield _Reading("max", limit, "entries", f"{_MAX}, {when}")
    yield _Reading("count/max", round(100 * count / limit, 1) if limit else None, "%", when)
    yield _Reading("buckets", table.buckets, "buckets", _BUCKETS)
    yield _Reading("growth", round(table.growth_per_s, 2), "entries/s", "net.netfilter.nf_conntrack_count")
    until = None if table.full_in_s is None else round(table.full_in_s, 1)
    yield _Reading("time until full", until, "s", "at the growth of the window")


def _full_readings(table: ConntrackRow) -> Iterable[_Reading]:
    yield from _fill_readings(table)
    yield _Reading("refused", table.refused, "packets", f"{_STATISTICS}: drop - insert_failed")
    yield _Reading("early_drop", table.early_drop, "entries", _STATISTICS)
    if _is_far_from_full(table):
        yield _Reading(
            "count is far below max: no memory for an entry, or a tracker refused",
            table.refused,
            "packets",
            _STATISTICS,
        )


def _insert_readings(table: ConntrackRow) -> Iterable[_Reading]:
    yield _Reading("insert_failed", table.insert_failed, "packets", _STATISTICS)
    yield _Reading("drop", table.drop, "packets", _STATISTICS)
    # From 6.12 on the last 32 ports that are tried are not counted: none counted does not mean none taken.
    yield _Reading("ports found taken", table.found or None, "ports", f"{_STATISTICS}: found")


def _dns_readings(table: ConntrackRow) -> Iterable[_Reading]:
    yield _Reading("insert_failed", table.insert_failed, "packets", _STATISTICS)
    yield _Reading("clash_resolved", table.clash_resolved, "packets", f"{_STATISTICS}: clashres, repaired without loss")


def _chain_readings(table: ConntrackRow) -> Iterable[_Reading]:
    yield _Reading("chain_too_long", table.chain_too_long, "packets", f"{_STATISTICS}: chainlength")
    yield _Reading("insert_failed", table.insert_failed, "packets", _STATISTICS)
    per_bucket = round(table.count / table.buckets, 2) if table.buckets else None
    yield _Reading("entries per bucket", per_bucket, "", "count divided by buckets; each entry stands in two chains")
    yield _Reading("buckets", table.buckets, "buckets", _BUCKETS)


def _invalid_readings(table: ConntrackRow) -> Iterable[_Reading]:
    yield _Reading("invalid", table.invalid, "packets", _STATISTICS)


def _refused_readings(table: ConntrackRow) -> Iterable[_Reading]:
    yield _Reading("refused", table.refused, "packets", f"{_STATISTICS}: drop - insert_failed")


def _undecided_evidence(case: Case, slug: str, other: str) -> Iterable[Evidence]:
    """What stays ambiguous: no verdict was told for these packets, and either may have happened to each."""
    packets = sum(row.packets for row in case.rows if row.confidence == "possible" and row.verdict != "insert_failed")
    if packets:
        yield Evidence(
            f"undecided between {slug} and {other}", packets, "packets", "told by the statistics of the window alone"
        )


def _full_evidence(case: Case) -> Iterable[Evidence]:
    yield from _told(_concerned(case), _full_readings)
    yield from _undecided_evidence(case, "ct-table-full", _BY_RULE)


def _pressure_evidence(case: Case) -> Iterable[Evidence]:
    def readings(table: ConntrackRow) -> Iterable[_Reading]:
        yield _Reading("early_drop", table.early_drop, "entries", _STATISTICS)
        yield _Reading("early_drop rate", round(_per_s(table.early_drop, case.seconds), 2), "entries/s", _STATISTICS)
        yield from _fill_readings(table)

    return _told(_concerned(case), readings)


def _dns_evidence(case: Case) -> Iterable[Evidence]:
    yield from _told(_concerned(case), _dns_readings)
    yield from _undecided_evidence(case, "ct-insert-race-dns", _BY_RULE)


def _clash_evidence(case: Case) -> Iterable[Evidence]:
    yield from _translations(case.rows)
    yield from _told(_concerned(case), _insert_readings)
    dying = sum(row.packets for row in case.rows if row.verdict == "insert_failed")
    if dying:
        yield Evidence(
            "not inserted although nothing clashed: the entry was being deleted",
            dying,
            "packets",
            f"{_STATISTICS}: insert_failed without drop",
        )
    yield from _undecided_evidence(case, "ct-snat-port-clash", _BY_RULE)


def _exhaustion_evidence(case: Case) -> Iterable[Evidence]:
    yield from _translations(case.rows)
    yield from _told(_concerned(case), _insert_readings)


def _chain_evidence(case: Case) -> Iterable[Evidence]:
    yield from _told(_concerned(case), _chain_readings)
    yield from _undecided_evidence(case, "ct-chain-too-long", _BY_RULE)


def _rst_evidence(case: Case) -> Iterable[Evidence]:
    yield from _told(_with_invalid(case), _invalid_readings)
    yield from _undecided_evidence(case, "ct-invalid-rst", BENIGN)


def _invalid_drop_evidence(case: Case) -> Iterable[Evidence]:
    yield from _told(_concerned(case), _invalid_readings)
    yield from _undecided_evidence(case, "ct-invalid-drop-asym", _BY_RULE)


def _stale_evidence(case: Case) -> Iterable[Evidence]:
    packets: dict[tuple[str, str], int] = {}
    for row in case.rows:
        if row.reply is not None and row.dst:
            ways = _socket(row.dst, row.dport or 0), _socket(row.reply.src, row.reply.sport)
            packets[ways] = packets.get(ways, 0) + row.packets
    for (service, backend), count in sorted(packets.items(), key=lambda item: -item[1])[:3]:
        yield Evidence(f"{service} translated to {backend}", count, "packets", "the packet's conntrack entry")
    for table in _concerned(case)[:1]:
        if table.stale is not None:
            yield Evidence("entries to pods that are gone", table.stale, "entries", "the conntrack table")


def _seqadj_evidence(case: Case) -> Iterable[Evidence]:
    return _told(_concerned(case), _refused_readings)


def _translations(rows: Sequence[DropRow]) -> Iterable[Evidence]:
    """The address and port outside that were to be used, and towards whom."""
    packets: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.reply is not None and row.nat in ("src", "both"):
            ways = _socket(row.reply.dst, row.reply.dport), _socket(row.reply.src, row.reply.sport)
            packets[ways] = packets.get(ways, 0) + row.packets
    for (source, target), count in sorted(packets.items(), key=lambda item: -item[1])[:3]:
        yield Evidence(f"translated to {source} towards {target}", count, "packets", "the packet's conntrack entry")


def _socket(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"{host}:{port}" if port else address


def _per_s(count: int, seconds: float) -> float:
    return count / max(seconds, 1e-9)


def _is_far_from_full(table: ConntrackRow) -> bool:
    count, limit = _fill(table)
    return bool(limit) and count < (limit or 0) / 2


def _is_hardly_full(case: Case) -> bool:
    """Allocation was refused, and no table that may have refused was anywhere near its limit when it was read.

    Where a probe saw that nothing could be evicted, the table was full.
    """
    if any(row.confidence == "proven" for row in case.rows):
        return False
    tables = _concerned(case)
    return bool(tables) and all(_is_far_from_full(table) for table in tables)


def _holders(case: Case) -> tuple[Owner, ...]:
    """Who opened at least a tenth of a table's entries, most entries first; who is not known is nobody to blame."""
    held: dict[tuple[str, str | None, str, str | None], tuple[Owner, int]] = {}
    for table in _concerned(case):
        total = table.entries if table.entries is not None else table.count
        for holder in table.holders:
            if holder.owner.kind == "unknown" or not holder.entries or holder.entries < _CULPRIT_SHARE * total:
                continue
            _, before = held.get(holder.owner.identity, (holder.owner, 0))
            held[holder.owner.identity] = holder.owner, before + holder.entries
    largest = sorted(held.values(), key=lambda pair: (-pair[1], pair[0].label))
    return tuple(owner for owner, _ in largest[:_CULPRITS])


def _notices_pressure(table: ConntrackRow, seconds: float) -> Noticed | None:
    if not table.early_drop or table.refused:
        return None  # where packets are refused too, it is evidence of a full table
    return Noticed(_PRESSURE.judge(table.early_drop, seconds), _PRESSURE_TITLE)


def _notices_repair(table: ConntrackRow, _seconds: float) -> Noticed | None:
    if not table.clash_resolved:
        return None
    owners = tuple(row.owner for row in table.repairs)
    return Noticed("info", "packets raced for one conntrack entry; repaired, no loss", owners)


# ----------------------------------------------------------------------------------------------------
# What mends it


def _place(case: Case, tables: Sequence[ConntrackRow]) -> Case | ConntrackRow:
    """The namespace that a fix is for: that of the first table, or of the packets where no table was read."""
    return tables[0] if tables else case


def _where(place: Case | ConntrackRow) -> str:
    return f"network namespace {place.netns}"


def _look(action: str, command: str, scope: str, why: str) -> Fix:
    return Fix(action, command, scope, why, "none: this only looks", "nothing to undo")


def _doubled(limit: int) -> int:
    """Twice as many; where that is many, rounded up to a multiple of 1024."""
    return 2 * limit if limit < _ROUNDED_FROM else -(-2 * limit // 1024) * 1024


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


def _raise_max(table: ConntrackRow | None) -> Fix:
    if table is not None and table.max:
        proposed = _doubled(table.max)
        command, undo = f"sysctl -w {_MAX}={proposed}", f"sysctl -w {_MAX}={table.max}"
        memory = (
            f"up to {_mib((proposed - table.max) * _ENTRY_BYTES)} more memory, {_mib(proposed * _ENTRY_BYTES)} in all, "
            f"once {proposed} entries are in use"
        )
        why = f"the limit is {table.max}, and this table refuses or evicts entries because of it"
    else:
        command = f"sysctl -w {_MAX}=$((2 * $(sysctl -n {_MAX})))"
        undo = f"sysctl -w {_MAX}=$(($(sysctl -n {_MAX}) / 2))"
        memory = "more memory once the entries are in use"
        why = "a table refuses or evicts entries because of the limit"
    return Fix(
        f"raise {_MAX}",
        command,
        "the whole node: one value, settable only in the node's own network namespace, with which the count of each "
        "network namespace is compared on its own",
        why,
        f"{memory} (about 320 to 400 bytes an entry); kube-proxy sets its own value again whenever it starts "
        "(--conntrack-max-per-core, --conntrack-min)",
        undo,
    )


def _keep_max() -> Fix:
    return Fix(
        "tell kube-proxy the same value (conntrack.min and maxPerCore), or it overwrites the limit at its next start",
        "kubectl -n kube-system edit configmap kube-proxy",
        "every node that runs kube-proxy with this configuration",
        "kube-proxy sets the greater of min and maxPerCore times the number of CPUs; with maxPerCore 0 neither",
        "the limit of all these nodes changes; it takes effect when kube-proxy is restarted",
        "the same command; the defaults are maxPerCore 32768 and min 131072",
    )


def _raise_buckets(table: ConntrackRow | None, proposed: int | None) -> Fix:
    """Buckets to that number; twice as many where the present number is not known."""
    if table is not None and table.buckets and proposed:
        command, undo = f"sysctl -w {_BUCKETS}={proposed}", f"sysctl -w {_BUCKETS}={table.buckets}"
        why = f"{table.count} entries share {table.buckets} buckets; lookups walk the chain of a bucket"
        memory = f"{_mib(8 * (proposed - table.buckets))} more memory"
    else:
        command = f"sysctl -w {_BUCKETS}=$((2 * $(sysctl -n {_BUCKETS})))"
        undo = f"sysctl -w {_BUCKETS}=$(($(sysctl -n {_BUCKETS}) / 2))"
        why = "many entries share a bucket; lookups walk the chain of a bucket"
        memory = "8 bytes of memory a bucket"
    return Fix(
        f"raise {_BUCKETS} (to between a quarter and half of {_MAX.rpartition('.')[2]})",
        command,
        "the whole node: one hash table for all network namespaces, settable only in the node's own",
        why,
        f"{memory}; tracking stands still for a moment while entries move",
        undo,
    )


def _shorten(setting: str, seconds: int, place: Case | ConntrackRow, why: str, risk: str) -> Fix:
    name = f"net.netfilter.{setting}"
    return Fix(
        f"let entries go sooner: {name}",
        within(place, f"sysctl {name}", f"sysctl -w {name}={seconds}"),
        f"{_where(place)} alone, each has its own value; the first command shows the present VALUE",
        why,
        risk,
        within(place, f"sysctl -w {name}=VALUE"),
    )


def _table_fix(case: Case) -> tuple[Fix, ...]:
    tables = _concerned(case)
    table, place = (tables[0] if tables else None), _place(case, tables)
    top = (
        "conntrack -L | awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^src=/) { n[$i]++; break } } "
        "END { for (s in n) print n[s], s }' | sort -rn | head"
    )
    fixes = [
        _look(
            "find who opens most connections, and whether they should",
            within(place, top),
            _where(place),
            "a limit that one client fills is filled again after it was raised",
        ),
        _raise_max(table),
        _keep_max(),
    ]
    proposed = _doubled(table.max) // 4 if table is not None and table.max else None
    if table is None or not table.buckets or (proposed and proposed > table.buckets):
        fixes.append(_raise_buckets(table, proposed))
    fixes.append(
        _shorten(
            "nf_conntrack_tcp_timeout_established",
            10_800,
            place,
            "entries of connections that ended without a word stay for 5 days (kernel) or 24 hours (kube-proxy)",
            "below 7200, when keep-alives first go out, connections that were idle break: their next packet is INVALID",
        )
    )
    return tuple(fixes)


def _dns_fix(case: Case) -> tuple[Fix, ...]:
    if not case.rows:
        return ()  # nothing was lost
    owner = next((row.owner for row in case.rows if row.owner.namespace and row.owner.workload), None)
    namespace = shlex.quote(owner.namespace or "") if owner else "NAMESPACE"
    workload = shlex.quote((owner.workload or "").lower()) if owner else "deployment/NAME"
    option = '{"spec":{"template":{"spec":{"dnsConfig":{"options":[{"name":"single-request-reopen"}]}}}}}'
    return (
        _look(
            "answer DNS on the node itself: NodeLocal DNSCache, whose queries are not tracked",
            "kubectl -n kube-system get daemonset node-local-dns",
            "every node of the cluster; deploy it if it is not there",
            "a query that is not tracked can lose no race, and the cache asks the cluster's DNS over TCP",
        ),
        Fix(
            "let the resolver send the A and the AAAA query from two sockets (glibc; musl knows no such option)",
            f"kubectl -n {namespace} patch {workload} --type merge -p '{option}'",
            "the pods of this workload, on any node",
            "both queries from one socket make two packets of one connection that may be tracked at the same moment",
            "the pods are replaced; options that were set in dnsConfig before are replaced too",
            f"kubectl -n {namespace} rollout undo {workload}",
        ),
    )


def _nat_rules(place: Case | ConntrackRow) -> str:
    return within(place, "iptables-save -t nat | grep -E 'MASQUERADE|SNAT'", "nft list ruleset | grep -E 'masq|snat'")


def _clash_fix(case: Case) -> tuple[Fix, ...]:
    place = _place(case, _concerned(case))
    return (
        _look(
            "choose ports at random from the whole range: --random-fully (iptables), fully-random (nft)",
            _nat_rules(place),
            f"{_where(place)}; kube-proxy sets it by itself where iptables can, flannel, Calico and others by option",
            "two packets that are translated at the same moment take the same next port; nf_conntrack_max has no part "
            "in it",
        ),
        _more_addresses(place),
    )


def _more_addresses(place: Case | ConntrackRow) -> Fix:
    return _look(
        "translate to more addresses or ports (a range in the SNAT rule, an egress gateway)",
        _nat_rules(place),
        _where(place),
        "one address has at most 64512 ports towards the same address and port outside",
    )


def _exhaustion_fix(case: Case) -> tuple[Fix, ...]:
    place = _place(case, _concerned(case))
    return (
        _look(
            "reuse connections: keep-alive or a pool in the program that opens most of them",
            within(
                place,
                "conntrack -L -n | grep -o -E ' dst=[^ ]+ sport=[0-9]+ dport=[0-9]+' | cut -d' ' -f2,4 | "
                "sort | uniq -c | sort -rn | head",
            ),
            _where(place),
            "each connection to the same address and port outside holds a port, also while it is in TIME_WAIT",
        ),
        _more_addresses(place),
        _shorten(
            "nf_conntrack_tcp_timeout_time_wait",
            30,
            place,
            "a closed connection holds its port for 120 s",
            "a late segment of the old connection may meet a new one on the same port",
        ),
    )


def _liberal(place: Case | ConntrackRow, why: str) -> Fix:
    name = "net.netfilter.nf_conntrack_tcp_be_liberal"
    return Fix(
        "let conntrack accept segments outside the window it computed",
        within(place, f"sysctl -w {name}=1"),
        f"{_where(place)} alone, each has its own value",
        why,
        "forged segments of a connection are no longer sorted out by conntrack; kube-proxy then leaves out its rule "
        "that drops INVALID",
        within(place, f"sysctl -w {name}=0"),
    )


def _rst_fix(case: Case) -> tuple[Fix, ...]:
    place = _place(case, _with_invalid(case))
    return (
        _look(
            "see that forwarded INVALID packets are dropped (kube-proxy's KUBE-FORWARD) and not passed on untranslated",
            within(place, "iptables-save -t filter | grep INVALID", "nft list ruleset | grep 'ct state invalid'"),
            _where(place),
            "an INVALID packet of a translated connection keeps the backend's address, which its receiver never asked",
        ),
        _liberal(place, "a lost or late segment then does not make the next ones INVALID"),
    )


def _invalid_drop_fix(case: Case) -> tuple[Fix, ...]:
    place = _place(case, _concerned(case))
    destination = next((row.dst for row in case.rows if row.dst), "ADDRESS")
    return (
        _look(
            "let both directions of a connection pass this node, or exempt these flows from the INVALID rule",
            within(
                place, f"ip route get {destination}", "iptables-save | grep INVALID", "nft list ruleset | grep invalid"
            ),
            _where(place),
            "conntrack that sees one direction only cannot follow the connection",
        ),
        _liberal(place, "segments of a connection seen half are then accepted"),
    )


def _chain_fix(case: Case) -> tuple[Fix, ...]:
    table = next(iter(_concerned(case)), None)
    proposed = max(2 * (table.buckets or 0), (table.max or 0) // 2) if table is not None else None
    return (_raise_buckets(table, proposed),)


def _stale_fix(case: Case) -> tuple[Fix, ...]:
    row = case.rows[0]
    service = row.dst or "ADDRESS"
    family = " -f ipv6" if row.family == "ipv6" else ""
    return (
        Fix(
            "delete the entries that still lead to the pod that is gone",
            within(case, f"conntrack -D{family} -p udp --orig-dst {service} --dport {row.dport or 'PORT'}"),
            _where(case),
            "as long as the client keeps sending from its socket, the entry never expires",
            "the other clients' flows to this service choose a backend anew too",
            "nothing to undo: the next datagram of each client makes a new entry",
        ),
        _look(
            "bring kube-proxy up to date: it has to delete these entries itself when an endpoint goes",
            "kubectl -n kube-system get daemonset kube-proxy -o wide",
            "every node that runs kube-proxy",
            "some releases missed the change of endpoints of UDP services",
        ),
    )


def _seqadj_fix(case: Case) -> tuple[Fix, ...]:
    place = _place(case, _concerned(case))
    return (
        _look(
            "find the helper (FTP, SIP, …) and remove its assignment if nobody needs it",
            within(
                place,
                "iptables-save -t raw | grep -e --helper",
                "nft list ruleset | grep 'ct helper'",
                "conntrack -L | grep helper=",
            ),
            _where(place),
            "a helper rewrites addresses inside the packets, and conntrack could not adjust the connection to it",
        ),
    )


# ----------------------------------------------------------------------------------------------------

_PRESSURE = Severities(1.0, None, 1)
_PRESSURE_TITLE = "entries are evicted from a nearly full conntrack table"
_RULES_RAISE_NOTHING = "conntrack's own counters rose with these drops; a rule, also in the raw table, raises none"

CAUSES = (
    Cause(
        slug="ct-table-full",
        title="the connection tracking table is full",
        severities=Severities(0.1, 5.0, 3),
        claims=_is_table_full,
        feels="New connections time out at random; those that stand go on.",
        proof="No entry could be allocated: conntrack's drop rose with the packet and insert_failed did not. Proven "
        "where a probe saw the refusal, likely by the CPU's counters at the drop, possible by those of the window.",
        ruled_out=(),
        ruled_out_by_verdict=(
            RuledOut("networkpolicy-drop", _RULES_RAISE_NOTHING),
            RuledOut("ct-snat-port-clash", "insert_failed did not rise: no entry came into being that could clash"),
        ),
        fix=_table_fix,
        evidence=_full_evidence,
        culprits=_holders,
        is_doubtful=_is_hardly_full,
    ),
    Cause(
        slug="ct-pressure-early-drop",
        title=_PRESSURE_TITLE,
        severities=_PRESSURE,
        claims=lambda _: False,
        feels="Flows without an answer yet (UDP, DNS, half-open TCP) lose their translation now and then.",
        proof="early_drop rose in that namespace's statistics while nothing was refused. Here the rates below count "
        "evicted entries, no packets.",
        ruled_out=(RuledOut("ct-table-full", "drop - insert_failed did not rise: every packet got its entry"),),
        fix=_table_fix,
        confidence="likely",
        evidence=_pressure_evidence,
        culprits=_holders,
        notices=_notices_pressure,
    ),
    Cause(
        slug="ct-insert-race-dns",
        title="datagrams (DNS) lost a race for their conntrack entry",
        severities=Severities(0.1, 10.0, 3),
        claims=_is_insert_race,
        feels="Now and then a lookup takes 5 s (or 2.5, or 10), until the resolver asks again.",
        proof="Confirming the entry of a query to port 53 failed on a clash: insert_failed and drop rose with the "
        "packet. Where only clash_resolved rises, the kernel repaired the race, and no packet was lost.",
        ruled_out=(RuledOut("udp-rcvbuf", "lost on the way, before any socket"),),
        ruled_out_by_verdict=(
            RuledOut("networkpolicy-drop", _RULES_RAISE_NOTHING),
            RuledOut("ct-table-full", "insert_failed rose: an entry had been allocated"),
        ),
        fix=_dns_fix,
        evidence=_dns_evidence,
        notices=_notices_repair,
    ),
    Cause(
        slug="ct-snat-port-clash",
        title="connections clash on one translated address and port",
        severities=Severities(0.1, 20.0, 3),
        claims=lambda drop: _by_conntrack(drop, "CLASH", "INSERT_FAILED"),
        feels="Some outbound connections hang at their start for 1, 3, 7 s …, to the same address and port only.",
        proof="The entry could not be confirmed, another one holds the translated address and port: insert_failed and "
        "drop rose with the packet. Without drop the entry was being deleted: then possible at most by counters.",
        ruled_out=(),
        ruled_out_by_verdict=(
            RuledOut("networkpolicy-drop", _RULES_RAISE_NOTHING),
            RuledOut("ct-table-full", "insert_failed rose: an entry had been allocated"),
            RuledOut("snat-port-exhaustion", "no long search for a free port went before"),
        ),
        fix=_clash_fix,
        evidence=_clash_evidence,
    ),
    Cause(
        slug="snat-port-exhaustion",
        title="address translation found no free source port",
        severities=Severities(0.1, 5.0, 3),
        claims=lambda _: False,
        feels="Every new connection to one address and port outside hangs; other destinations work.",
        proof="Clashes at the confirmation of entries that had got another source port than they were sent with, and "
        "not at one such port but at several, towards one socket: each search for a free one ended at a taken one.",
        ruled_out=(),
        ruled_out_by_verdict=(
            RuledOut("networkpolicy-drop", _RULES_RAISE_NOTHING),
            RuledOut("ct-snat-port-clash", "many ports were tried, and all were taken"),
            RuledOut("ct-table-full", "insert_failed rose: an entry had been allocated"),
        ),
        fix=_exhaustion_fix,
        evidence=_exhaustion_evidence,
    ),
    Cause(
        slug="ct-invalid-rst",
        title="untranslated segments met no socket and were reset",
        severities=Severities(0.5, None, 10),
        claims=lambda _: False,
        feels="Long or large transfers through a service end with “connection reset by peer”.",
        proof="A segment in the middle of a connection met no socket, while conntrack on this node called packets "
        "INVALID: those pass untranslated, and their receiver answers with a reset.",
        ruled_out=(RuledOut("closed-port", "no SYN: the segment belongs to a connection that stood"),),
        fix=_rst_fix,
        confidence="likely",
        evidence=_rst_evidence,
    ),
    Cause(
        slug="ct-invalid-drop-asym",
        title="a rule drops what conntrack calls INVALID",
        severities=Severities(1.0, None, 10),
        claims=lambda _: False,
        feels="Connections stall that take another way back than forth, or all that are long idle.",
        proof="A rule dropped packets that have no conntrack entry in a namespace that tracks, and its invalid rose.",
        ruled_out=(),
        ruled_out_by_verdict=(RuledOut("ct-table-full", "conntrack itself refused nothing at these drops"),),
        fix=_invalid_drop_fix,
        confidence="likely",
        evidence=_invalid_drop_evidence,
    ),
    Cause(
        slug="ct-chain-too-long",
        title="hash chains of the conntrack table are too long",
        severities=Severities(0.1, 5.0, 3),
        claims=lambda drop: _by_conntrack(drop, "CHAIN_TOO_LONG"),
        feels="New connections time out at random although the table is not full.",
        proof="insert_failed and chain_too_long rose with the packet, drop did not.",
        ruled_out=(RuledOut("ct-table-full", "an entry had been allocated: raising nf_conntrack_max does nothing"),),
        ruled_out_by_verdict=(RuledOut("networkpolicy-drop", _RULES_RAISE_NOTHING),),
        fix=_chain_fix,
        evidence=_chain_evidence,
    ),
    Cause(
        slug="stale-udp-dnat",
        title="datagrams are still translated to a pod that is gone",
        severities=Severities(0.5, 20.0, 5),
        claims=_is_stale_dnat,
        feels="After a backend of a UDP service (DNS, syslog) was replaced, some clients stay without answer.",
        proof="A datagram of an established, translated flow was dropped because its target cannot be reached.",
        ruled_out=(RuledOut("no-route", "the client sent to the service; only the translated address has no way"),),
        fix=_stale_fix,
        confidence="likely",
        evidence=_stale_evidence,
    ),
    Cause(
        slug="nat-helper-seqadj",
        title="a conntrack helper refused packets of its connection",
        severities=Severities(0.1, 10.0, 3),
        claims=_is_refused_with_entry,
        feels="FTP, SIP or the like stall in the middle of a session.",
        proof="conntrack's drop rose without insert_failed, at a packet that had its entry.",
        ruled_out=(),
        ruled_out_by_verdict=(
            RuledOut("ct-table-full", "the packet had its entry: none was to be allocated"),
            RuledOut("networkpolicy-drop", _RULES_RAISE_NOTHING),
        ),
        fix=_seqadj_fix,
        evidence=_seqadj_evidence,
    ),
)
SLUGS = frozenset(cause.slug for cause in CAUSES)
