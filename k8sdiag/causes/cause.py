"""What an entry of the catalogue consists of."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from k8sdiag.facts import Confidence
from k8sdiag.snapshot import ConntrackRow, DropRow, Evidence, Fix, Owner, RuledOut, Severity


class Drop(NamedTuple):
    """What a rule may look at of a drop. Names are this kernel's own; empty where it does not tell."""

    reason: str
    location: str
    hook: str
    conntrack: str
    family: int
    protocol: int
    src: str
    dst: str
    sport: int
    dport: int
    verdict: str = ""
    """What conntrack had to do with a netfilter drop, as in facts.DropKey."""
    probed: bool = False
    segment: str = ""
    """Of TCP: SYN, SYN_ACK, FIN, RST, OTHER."""
    nat: str = ""
    """SRC, DST or BOTH; src … dport are then those the packet was sent with."""
    reply_dport: int = 0
    """Where the reply goes to: after SNAT the port that is in use outside."""
    is_reply: bool = False


Connections: TypeAlias = Callable[[Sequence[DropRow]], "int | None"]
"""How many distinct 5-tuples some rows of a window stand for; None where they were folded."""


def all_flows(rows: Sequence[DropRow]) -> int | None:
    """Connections where rows have no flow in common."""
    return None if any(row.flows is None for row in rows) else sum(row.flows or 0 for row in rows)


class Window(NamedTuple):
    """What the rules judge: the attributed drops of so many seconds."""

    seconds: float
    drops: Sequence[DropRow]
    connections: Connections = all_flows
    tables: Sequence[ConntrackRow] = ()
    """The connection tables of all network namespaces that track."""


class Case(NamedTuple):
    """What one finding is drawn from: rows of one cause and group, or else (no rows) statistics alone."""

    rows: Sequence[DropRow]
    """Largest first."""
    tables: Sequence[ConntrackRow] = ()
    """All of the window; without rows those that were noticed."""
    seconds: float = 0.0

    @property
    def place(self) -> DropRow | ConntrackRow:
        """Where most of it happened: has `netns` and `inside`."""
        return self.rows[0] if self.rows else self.tables[0]

    @property
    def netns(self) -> int:
        return self.place.netns

    @property
    def inside(self) -> str:
        return self.place.inside


class Noticed(NamedTuple):
    """What a table's statistics alone are worth saying."""

    severity: Severity
    title: str
    concerned: tuple[Owner, ...] = ()
    """Whose packets a probe saw; empty where only the table's own statistics tell."""


class Severities(NamedTuple):
    """Rates (packets per second over the window) from which a finding is more than an information.

    None: never. A single packet proves nothing: `at_least` packets must have been dropped too.
    """

    warning_pps: float | None
    critical_pps: float | None
    at_least: int

    def judge(self, packets: int, seconds: float) -> Severity:
        pps = packets / max(seconds, 1e-9)
        if packets < self.at_least:
            return "info"
        if self.critical_pps is not None and pps >= self.critical_pps:
            return "critical"
        return "warning" if self.warning_pps is not None and pps >= self.warning_pps else "info"


class Cause(NamedTuple):
    """An entry of the catalogue."""

    slug: str
    title: str
    """What happened, in words that fit behind "namespace: "."""
    severities: Severities
    claims: Callable[[Drop], bool]
    feels: str
    """What the user of the pod notices."""
    proof: str
    """How this tool knows."""
    ruled_out: tuple[RuledOut, ...]
    """Look-alikes, and what tells them apart; holds for every finding of this cause."""
    fix: Callable[[Case], tuple[Fix, ...]]
    confidence: Confidence = "proven"
    """At best; that of each row says how it was told."""
    ruled_out_by_verdict: tuple[RuledOut, ...] = ()
    """Look-alikes that are only told apart where every packet has its own verdict (DropKey.verdict)."""
    evidence: Callable[[Case], Iterable[Evidence]] = lambda _: ()
    """What speaks for it besides the drops themselves."""
    culprits: Callable[[Case], tuple[Owner, ...]] = lambda _: ()
    is_doubtful: Callable[[Case], bool] = lambda _: False
    """Whether something speaks against it, so that it is no more than possible."""
    notices: Callable[[ConntrackRow, float], Noticed | None] = lambda _table, _seconds: None
    """What a table's statistics (over so many seconds) are a finding of, although no packet was lost."""


def devices_of(case: Case) -> list[str]:
    """Devices of the drops in the namespace that within() enters, quoted for a shell; a placeholder for none."""
    names = sorted({row.device for row in case.rows if row.device and row.inside == case.inside})
    return [shlex.quote(name) for name in names[:3]] or ["DEVICE"]


def within(place: Case | ConntrackRow, *commands: str) -> str:
    """One command line that runs each of these in a network namespace: that of a table, or of the largest drops."""
    inside = place.inside
    return "; ".join(f"{inside} {command}" if inside else command for command in commands)
