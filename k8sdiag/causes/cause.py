"""What an entry of the catalogue consists of."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from k8sdiag.facts import Confidence
from k8sdiag.snapshot import DropRow, Fix, RuledOut, Severity


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
    fix: Callable[[Sequence[DropRow]], tuple[Fix, ...]]
    confidence: Confidence = "proven"


def devices_of(rows: Sequence[DropRow]) -> list[str]:
    """Devices of the drops in the namespace that within() enters, quoted for a shell; a placeholder for none."""
    names = sorted({row.device for row in rows if row.device and row.inside == rows[0].inside})
    return [shlex.quote(name) for name in names[:3]] or ["DEVICE"]


def within(rows: Sequence[DropRow], *commands: str) -> str:
    """One command line that runs each of these in the network namespace of the (largest) drops."""
    inside = rows[0].inside
    return "; ".join(f"{inside} {command}" if inside else command for command in commands)
