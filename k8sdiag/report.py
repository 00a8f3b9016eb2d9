"""The verdict of `check`: its status, its exit code, and the public JSON (schema k8sdiag/check/v1)."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Literal, TypeAlias

import msgspec

from k8sdiag.snapshot import ConntrackRow, DropRow, Finding, NamespaceRow, OwnerRow, Snapshot

SCHEMA = "k8sdiag/check/v1"
Status: TypeAlias = Literal["ok", "warning", "critical", "unknown"]
NEEDED = ("drops",)
"""Signals without which the question "is something wrong?" cannot be answered."""

NAGIOS = {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}
SIMPLE = {"ok": 0, "warning": 0, "critical": 1, "unknown": 3}
EXIT_CODES = {"nagios": NAGIOS, "simple": SIMPLE}


class WindowRow(msgspec.Struct, frozen=True):
    start: str
    duration_s: float


class CniRow(msgspec.Struct, frozen=True):
    name: str | None
    mode: str | None
    evidence: tuple[str, ...]


class NodeRow(msgspec.Struct, frozen=True):
    name: str
    kernel: str
    cni: CniRow | None


class LostRow(msgspec.Struct, frozen=True):
    events: int
    keys: int
    samples: int
    hooks: int


class CapabilityRow(msgspec.Struct, frozen=True):
    signal: str
    status: str
    hook: str
    why: str


class SelfRow(msgspec.Struct, frozen=True):
    cpu_s: float
    rss_bytes: int
    map_bytes: int
    bpf_runs: int | None
    bpf_ns: int | None


class Check(msgspec.Struct, frozen=True, rename={"self_": "self"}):
    """What `check -o json` prints. Sections that are not measured are null."""

    schema: str
    status: Status
    window: WindowRow
    node: NodeRow | None
    filtered: bool
    findings: tuple[Finding, ...]
    namespaces: tuple[NamespaceRow, ...]
    owners: tuple[OwnerRow, ...]
    drops: tuple[DropRow, ...]
    lost: LostRow
    capabilities: tuple[CapabilityRow, ...]
    self_: SelfRow | None
    connections: None = None
    conntrack: tuple[ConntrackRow, ...] | None = None
    tunnels: None = None
    listeners: None = None
    dns: None = None
    machine: None = None
    storage: None = None
    rulesets: None = None
    sysctls: None = None
    policies: None = None
    egress: None = None


def measured(snapshot: Snapshot, signal: str) -> bool:
    """Whether a signal is seen at all: else its numbers are not 0 but unknown."""
    return any(c.signal == signal and c.status != "missing" for c in snapshot.capabilities)


def status(snapshot: Snapshot) -> Status:
    """critical > unknown > warning > ok: a proven finding is never hidden by a loss, a healthy look may be."""
    severities = {finding.severity for finding in snapshot.findings if not finding.ignored}
    if "critical" in severities:
        return "critical"
    seen = {capability.signal: capability.status for capability in snapshot.capabilities}
    blind = any(seen.get(signal, "missing") in ("missing", "counters") for signal in NEEDED)
    if blind or snapshot.lost.events or snapshot.lost.keys:
        return "unknown"
    return "warning" if "warning" in severities else "ok"


def why_unknown(snapshot: Snapshot) -> str:
    """The reason for status "unknown", in words; empty where there is none."""
    parts = [
        f"signal {capability.signal} is {capability.status}: {capability.why}"
        for capability in snapshot.capabilities
        if capability.signal in NEEDED and capability.status in ("missing", "counters")
    ]
    if not any(capability.signal in NEEDED for capability in snapshot.capabilities):
        parts.append("drops were not watched")
    if snapshot.lost.events:
        parts.append(f"{snapshot.lost.events} drops happened that no probe saw")
    if snapshot.lost.keys:
        parts.append(f"{snapshot.lost.keys} drops found no room to be told apart")
    return "; ".join(parts)


def wall_time(snapshot: Snapshot, t_ns: int) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    moment = datetime.fromtimestamp((t_ns + snapshot.boot_to_wall_ns) / 1e9, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def check(snapshot: Snapshot, *, filtered: bool) -> Check:
    """The public object of one window."""
    node, cost, lost = snapshot.node, snapshot.cost, snapshot.lost
    start_ns = snapshot.t_ns - round(snapshot.window_s * 1e9)
    return Check(
        schema=SCHEMA,
        status=status(snapshot),
        window=WindowRow(wall_time(snapshot, start_ns), round(snapshot.window_s, 3)),
        node=NodeRow(node.name, node.kernel, None) if node else None,
        filtered=filtered,
        findings=snapshot.findings,
        namespaces=snapshot.namespaces,
        owners=snapshot.owners,
        drops=snapshot.drops,
        lost=LostRow(lost.events, lost.keys, lost.samples, lost.hooks),
        capabilities=tuple(
            CapabilityRow(capability.signal, capability.status, capability.hook, capability.why)
            for capability in snapshot.capabilities
        ),
        self_=SelfRow(cost.cpu_s, cost.rss_bytes, cost.map_bytes, cost.bpf_runs, cost.bpf_ns) if cost else None,
        conntrack=snapshot.conntrack if measured(snapshot, "conntrack") else None,
    )


def as_json(value: msgspec.Struct) -> bytes:
    """Indented JSON with a newline at its end."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
